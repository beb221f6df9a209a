"""Scaling of channels leaves the function of every model as it is, and loses less where it is meant to."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autolite import contracts, formats
from autolite.parts import layers_of, matrices_of
from autolite.surgery import keep_heads, keep_neurons, share_layers
from autolite.techniques.base import Context
from autolite.techniques.inputs import Inputs, examples, second_moments
from autolite.techniques.scaling import Scaling, folds, scaled
from autolite.testing import tiny_inputs

TOLERANCE = 1e-5  # of the largest logit


def context_of(family: str, **config: Any) -> Context:
    return contracts.tiny_context(family, contracts.tiny_task(family), **config)


def layer_formats(model: Any, form: str) -> dict[str, str]:
    return {key: form for part in ("attention", "ffn") for key in matrices_of(model)[part]}


@pytest.mark.parametrize("form", ["awq", "smooth"])
@pytest.mark.parametrize("reshaped", [False, True])
@pytest.mark.parametrize("family", contracts.FAMILIES)
def test_the_function_stays(family: str, reshaped: bool, form: Scaling) -> None:
    context = context_of(family)
    model = context.teacher.model
    if reshaped:
        keep_heads(model, 1, [0])
        keep_neurons(model, 1, range(24))
        if family != "albert":
            share_layers(model, attention=[0, 1, 0], feed_forward=[0, 1, 0])
    other = scaled(model, layer_formats(model, "int8"), form, context)
    inputs = tiny_inputs(model)
    with torch.no_grad():
        expected, found = model(**inputs).logits, other(**inputs).logits
    assert (found - expected).abs().max() < TOLERANCE * expected.abs().max()
    changed = [name for name, weight in other.named_parameters() if not torch.equal(weight, model.get_parameter(name))]
    assert changed


@pytest.mark.parametrize("family", contracts.FAMILIES)
def test_any_positive_scales_may_be_folded(family: str) -> None:
    model = context_of(family).teacher.model
    inputs = tiny_inputs(model)
    with torch.no_grad():
        expected = model(**inputs).logits
    generator = torch.Generator().manual_seed(0)
    for fold in folds(model):
        fold.scale(torch.rand(int(fold.index.max()) + 1, generator=generator) + 0.5)
    with torch.no_grad():
        assert (model(**inputs).logits - expected).abs().max() < TOLERANCE * expected.abs().max()


def test_places_are_found_where_scaling_is_exact_and_nowhere_else() -> None:
    layers = 3
    count = {family: len(folds(context_of(family).teacher.model)) for family in contracts.FAMILIES}
    assert count["bert"] == layers, "normalised after the sum: only values and the output projection"
    assert count["albert"] == 1, "in the one stored layer"
    assert count["gpt2"] == count["vit"] == 3 * layers, "norms too"
    assert count["llama"] == count["qwen3"] == 4 * layers, "and the gated units"
    assert len(folds(context_of("bert", hidden_act="relu").teacher.model)) == 2 * layers, "ReLU lets positive scales by"


def test_awq_never_loses_more_of_a_product_than_rounding_alone() -> None:
    context = context_of("llama")
    model = context.teacher.model
    with torch.no_grad():  # a few channels much larger than the others: what AWQ is for
        for layer in layers_of(model):
            layer.attention_norm.weight[::8] *= 20
    other = scaled(model, layer_formats(model, "int4"), "awq", context)

    def lost(which: Any) -> list[float]:
        matrices = {key: m for group in matrices_of(which).values() for key, m in group.items()}
        keys = list(layer_formats(which, "int4"))
        inputs = Inputs(which, keys, examples(context), "cpu")
        found = []
        for stage in inputs.stages:
            moments = second_moments(inputs, stage)
            errors = [
                formats.decode(formats.encode(m.weight, "int4")) - m.weight.detach()
                for m in (matrices[key] for key in stage.keys)
            ]
            found.append(float(sum(((error @ moments) * error).sum() for error in errors)))
        return found

    before, after = lost(model), lost(other)
    assert all(b <= a * 1.001 for a, b in zip(before, after, strict=True))
    assert sum(after) < 0.9 * sum(before)


def test_smooth_brings_inputs_and_weights_to_one_size() -> None:
    context = context_of("llama")
    model = context.teacher.model
    with torch.no_grad():
        for layer in layers_of(model):
            layer.attention_norm.weight[::8] *= 50
    other = scaled(model, layer_formats(model, "int8"), "smooth", context)
    keys = [layers_of(model)[0].query.key]

    def spread(which: Any) -> float:
        inputs = Inputs(which, keys, examples(context), "cpu")
        largest: list[torch.Tensor] = []
        inputs.visit(inputs.stages[0], lambda rows: largest.append(rows.abs().amax(0)))
        channels = torch.stack(largest).amax(0)
        return float(channels.max() / channels.median())

    assert spread(other) < spread(model) / 3
    same = scaled(model, layer_formats(model, "bf16"), "smooth", context)
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), model.parameters(), strict=True)), (
        "where inputs are not quantized nothing is scaled"
    )
