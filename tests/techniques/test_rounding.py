"""Rounding: compensated errors are smaller in what a product gives, and every format and family can be rounded so."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autolite import contracts, formats
from autolite.architecture import shape_of
from autolite.errors import PlanError
from autolite.export import decoded
from autolite.formats import FORMATS
from autolite.parts import embeddings_of, layers_of, matrices_of
from autolite.plan import make_step
from autolite.surgery import share_layers
from autolite.techniques.base import Student
from autolite.techniques.hqq import POWER, half_quadratic
from autolite.techniques.inputs import Inputs, examples, second_moments
from autolite.techniques.quantize import Quantize, QuantizeConfig
from autolite.techniques.rounding import DAMPING, compensated
from autolite.testing import PAD

ROUNDED = sorted(name for name, form in FORMATS.items() if form.bits <= 8)
LINEAR = sorted(name for name in ROUNDED if FORMATS[name].linear)


def matrix(seed: int, n: int = 24, k: int = 80) -> tuple[Tensor, Tensor]:
    """A matrix [n, k] and the second moments of correlated inputs of different size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator) * torch.rand(k, generator=generator)
    rows = torch.randn(4 * k, k, generator=generator) @ mix
    return torch.randn(n, k, generator=generator), rows.T @ rows / len(rows)


def lost(found: Tensor, weight: Tensor, moments: Tensor) -> float:
    error = (found - weight).double()
    return float(((error @ moments.double()) * error).sum())


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("form", ROUNDED)
def test_compensated_products_err_less_than_the_nearest(form: str, order: bool) -> None:
    weight, moments = matrix(0)
    nearest = formats.decode(formats.encode(weight, form))
    found = formats.decode(compensated(weight, moments, form, order))
    assert lost(found, weight, moments) < 0.8 * lost(nearest, weight, moments)


@pytest.mark.parametrize("form", ["int4", "int3-asym", "kmeans3", "nf4", "int8"])
def test_compensation_is_that_of_the_paper(form: str) -> None:
    """The algorithm written down as in optimal brain compression: after each column the inverse Hessian loses it."""
    weight, moments = matrix(1, 8, 40)
    hessian = moments.double() + DAMPING * moments.diagonal().mean() * torch.eye(40).double()
    inverse, left = torch.linalg.inv(hessian), weight.double().clone()
    grid = formats.get(form).fit(weight, moments.diagonal())
    expected = torch.empty_like(weight)
    for j in range(40):
        column = left[:, j : j + 1].float()
        expected[:, j : j + 1] = grid.dequantize(grid.quantize(column, j), j)
        error = (left[:, j] - expected[:, j]) / inverse[j, j]
        left -= error[:, None] * inverse[j][None]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    found = formats.decode(compensated(weight, moments, form, order=False))
    same = torch.isclose(found, expected, rtol=1e-4, atol=1e-5).float().mean()
    assert same > 0.98, "ties in float32 aside"


def test_without_correlation_compensated_is_nearest() -> None:
    weight, _ = matrix(2)
    found = compensated(weight, torch.eye(80), "int4", order=True)
    assert torch.equal(formats.decode(found), formats.decode(formats.encode(weight, "int4")))


@pytest.mark.parametrize("form", ["int8", "int4", "int3-asym", "nf4"])
def test_zeros_stay_and_the_others_make_up_for_them(form: str) -> None:
    weight, moments = matrix(4)
    sparse = weight * (weight.abs() > 0.6)
    nearest = formats.decode(formats.encode(sparse, form))
    found = formats.decode(compensated(sparse, moments, form, order=True))
    assert not found[sparse == 0].any()
    assert lost(found, sparse, moments) < lost(nearest, sparse, moments)


def test_inputs_that_are_never_there_do_no_harm() -> None:
    weight, moments = matrix(3)
    moments[:, :10] = moments[:10] = 0
    found = formats.decode(compensated(weight, moments, "int4", order=True))
    assert torch.isfinite(found).all()
    assert (found[:, :10] - weight[:, :10]).abs().max() < 1
    assert torch.isfinite(formats.decode(compensated(weight, torch.zeros(80, 80), "int4", order=False))).all()


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(LINEAR), st.integers(0, 1000))
def test_half_quadratic_never_has_a_larger_norm_than_the_nearest(form: str, seed: int) -> None:
    weight = matrix(seed)[0]
    weight = weight * (1 + 9 * (torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) > 0.98))
    norms = [
        float((formats.decode(found) - weight).abs().pow(POWER).sum())
        for found in (half_quadratic(weight, form), formats.encode(weight, form))
    ]
    assert norms[0] <= norms[1] * (1 + 1e-5)


def test_half_quadratic_gains_where_there_are_outliers() -> None:
    weight, _ = matrix(0, 64, 128)
    weight[:, ::16] *= 4
    for form in ("int4-asym", "int3-asym", "int4", "int3"):
        found, nearest = (
            formats.decode(e) - weight for e in (half_quadratic(weight, form), formats.encode(weight, form))
        )
        assert found.abs().pow(POWER).sum() < 0.99 * nearest.abs().pow(POWER).sum()


@pytest.mark.parametrize("family", contracts.FAMILIES)
@pytest.mark.parametrize("rounding", ["weighted", "gptq", "hqq"])
def test_all_families_are_rounded(family: str, rounding: str) -> None:
    context = contracts.tiny_context(family, contracts.tiny_task(family))
    model = context.teacher.model
    if family != "albert":
        share_layers(model, attention=[0, 1, 0], feed_forward=[0, 0, 2])
    student = Student(model, shape_of(model))
    embedding = "int4" if family != "vit" else "fp32"
    config = QuantizeConfig(attention="int4", ffn="int3-asym", embedding=embedding, rounding=rounding)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = Quantize().apply(student, config, context)
    nearest = Quantize().apply(student, config.model_copy(update={"rounding": "nearest"}), context)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {key: (e.format, e.shape, e.nbytes) for key, e in found.encoded.items()} == {
        key: (e.format, e.shape, e.nbytes) for key, e in nearest.encoded.items()
    }
    groups = matrices_of(model)
    for key in groups["attention"]:
        if rounding == "gptq":
            assert not torch.equal(formats.decode(found.encoded[key]), formats.decode(nearest.encoded[key]))


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2"])
def test_positions_count_by_how_many_examples_reach_them(family: str) -> None:
    context = contracts.tiny_context(family, contracts.tiny_task(family))
    position = embeddings_of(context.teacher.model).position
    assert position is not None
    counts = torch.ones(len(position.weight), 1)
    for ids in context.train.input_ids:
        for place in range(len(ids)):
            counts[place + (PAD + 1 if family == "roberta" else 0)] += 1
    for rounding in ("weighted", "gptq"):
        config = QuantizeConfig(embedding="kmeans6", rounding=rounding)  # one codebook for all rows
        found = Quantize().apply(context.teacher, config, context).encoded[position.key]
        expected, alike = (formats.encode(position.weight, "kmeans6", weights) for weights in (counts, None))
        assert torch.equal(formats.decode(found), formats.decode(expected))
        assert not torch.equal(formats.decode(found), formats.decode(alike))


def test_later_layers_are_rounded_for_the_inputs_they_will_have() -> None:
    context = contracts.tiny_context("llama", contracts.tiny_task("llama"))
    found = Quantize().apply(context.teacher, QuantizeConfig(attention="int3", ffn="int3", rounding="gptq"), context)
    model = decoded(found)
    last = layers_of(context.teacher.model)[-1].ffn_out
    keys = [m.key for layer in layers_of(model) for m in (*layer.attention_matrices, *layer.ffn_matrices)]
    inputs = Inputs(model, keys, examples(context), "cpu")
    moments = second_moments(inputs, next(s for s in inputs.stages if last.key in s.keys))
    expected = compensated(last.weight.detach(), moments, "int3", order=True)
    assert torch.equal(formats.decode(expected), formats.decode(found.encoded[last.key]))


def test_what_a_format_has_no_rounding_for_is_refused_or_left() -> None:
    context = contracts.tiny_context("bert", contracts.tiny_task("bert"))
    with pytest.raises(PlanError, match="hqq fits scales of evenly spaced levels, which kmeans4 has not; use gptq"):
        Quantize().shape(context.teacher.shape, QuantizeConfig(ffn="kmeans4", rounding="hqq"))
    found = Quantize().apply(context.teacher, QuantizeConfig(ffn="bf16", rounding="gptq"), context)
    nearest = Quantize().apply(context.teacher, QuantizeConfig(ffn="bf16"), context)
    assert all(torch.equal(formats.decode(e), formats.decode(nearest.encoded[key])) for key, e in found.encoded.items())
    with pytest.raises(PlanError, match=r"quantize\.rounding.*'gtpq'"):
        make_step("quantize", {"rounding": "gtpq"})
