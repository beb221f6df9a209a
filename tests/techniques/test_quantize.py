"""Quantization sets formats, and encodes each stored matrix once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autolite import contracts, parts, surgery
from autolite.architecture import shape_of
from autolite.compress import compress
from autolite.errors import PlanError
from autolite.export import decoded
from autolite.formats import decode
from autolite.plan import Plan, make_step
from autolite.reload import load_student, save_student
from autolite.runtime.onnxruntime import OnnxRuntime
from autolite.techniques.base import Student
from autolite.techniques.calibrate import Method, input_ranges
from autolite.techniques.quantize import Quantize, QuantizeConfig
from autolite.testing import tiny_inputs, tiny_model

FAMILIES = ("bert", "distilbert", "roberta", "albert", "gpt2", "llama", "qwen2", "qwen3")
ALL = QuantizeConfig(attention="int4", ffn="kmeans4", embedding="int8", head="int8")


def student_of(family: str, task: str = "text-classification", **settings: Any) -> Student:
    model = tiny_model(family, task, **settings)
    return Student(model, shape_of(model))


def quantize(student: Student, config: QuantizeConfig) -> Student:
    return Quantize().apply(student, config, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_is_encoded_in_the_format_of_its_group(family: str) -> None:
    student = student_of(family)
    result = quantize(student, ALL)
    groups = parts.matrices_of(student.model)
    found = {group: {result.encoded[key].format for key in matrices} for group, matrices in groups.items()}
    assert found == {"attention": {"int4"}, "ffn": {"kmeans4"}, "embedding": {"int8"}, "head": {"int8"}}
    assert set(result.encoded) == {key for matrices in groups.values() for key in matrices}
    for matrices in groups.values():
        for key, matrix in matrices.items():
            assert (decode(result.encoded[key]) - matrix.weight).abs().max() < matrix.weight.abs().max() / 4


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shape_announced_is_the_shape_made(family: str) -> None:
    student = student_of(family)
    result = quantize(student, ALL)
    assert result.shape == Quantize().shape(student.shape, ALL)
    (stack,) = result.shape.stacks
    assert {(x.attention_format, x.ffn_format) for x in stack.layers} == {("int4", "kmeans4")}
    assert (result.shape.embedding_format, result.shape.head_format) == ("int8", "int8")


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "albert", "gpt2"])
def test_learned_positions_follow_the_words(family: str) -> None:
    student = student_of(family)
    found = quantize(student, QuantizeConfig(embedding="int4")).encoded
    tables = parts.embeddings_of(student.model)
    assert tables.word is not None
    assert tables.position is not None
    assert found[tables.word.key].format == found[tables.position.key].format == "int4"
    assert found[tables.position.key].shape == tuple(tables.position.weight.shape) == (64, tables.word.weight.shape[1])
    assert tables.token_type is None or tables.token_type.key not in found


def test_positions_of_images_are_no_table() -> None:
    student = student_of("vit")
    position = parts.embeddings_of(student.model).position
    assert position is not None
    assert position.key not in quantize(student, QuantizeConfig(attention="bf16", embedding="bf16")).encoded


def test_masters_and_the_student_given_stay_untouched() -> None:
    student = student_of("bert")
    before = {k: v.clone() for k, v in student.model.state_dict().items()}
    result = quantize(student, ALL)
    assert result.model is student.model
    assert not student.encoded
    assert all(torch.equal(v, before[k]) for k, v in result.model.state_dict().items())


def test_fp32_encodes_nothing_and_a_later_step_replaces_an_earlier_one() -> None:
    student = student_of("bert")
    assert not quantize(student, QuantizeConfig()).encoded
    again = quantize(quantize(student, ALL), QuantizeConfig(attention="int8"))
    assert {e.format for e in again.encoded.values()} == {"int8"}
    assert set(again.encoded) == set(parts.matrices_of(student.model)["attention"])


def test_shared_matrices_are_encoded_once() -> None:
    model = tiny_model("bert")
    surgery.share_layers(model, attention=[0, 0, 0], feed_forward=[0, 0, 0])
    result = quantize(Student(model, shape_of(model)), QuantizeConfig(attention="int8", ffn="int8"))
    assert len(result.encoded) == 6
    assert all(".layer.0." in key for key in result.encoded)


@pytest.mark.parametrize(("family", "settings"), [("gpt2", {}), ("llama", {"tie_word_embeddings": True})])
def test_a_tied_head_follows_the_embedding_or_the_plan_is_refused(family: str, settings: dict[str, bool]) -> None:
    student = student_of(family, "language-modeling", **settings)
    assert student.shape.tied
    for config in (QuantizeConfig(embedding="int8"), QuantizeConfig(embedding="int8", head="int8")):
        result = quantize(student, config)
        assert result.shape.head_format == "int8"
        assert len(result.encoded) == (2 if family == "gpt2" else 1), "the table, and GPT-2's of positions"
    with pytest.raises(PlanError, match="head=int8 and embedding=int4 contradict"):
        Quantize().shape(student.shape, QuantizeConfig(embedding="int4", head="int8"))
    with pytest.raises(PlanError, match="head=kmeans4"):
        quantize(student, QuantizeConfig(head="kmeans4"))
    assert Quantize().shape(replace(student.shape, tied=False), QuantizeConfig(head="int8")).head_format == "int8"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"ffn": "int5"}, r"quantize\.ffn.*one of fp32, bf16, int8.*kmeans4.*'int5'"),
        ({"embedding": "int8-static"}, r"quantize\.embedding.*one of fp32, bf16, int8, int8-tensor.*'int8-static'"),
        ({"attn": "int8"}, "unknown setting 'attn'"),
    ],
)
def test_wrong_settings_are_refused_by_name(config: dict[str, str], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make_step("quantize", config)


def test_a_plan_with_it_survives_json() -> None:
    for settings in ({"ffn": "kmeans4"}, {"ffn": ["int8", "int4", "fp32"], "levels": "int3,int4", "average_bits": 4.5}):
        plan = Plan((make_step("quantize", settings),))
        assert Plan.from_json(plan.to_json()) == plan
        assert hash(plan) == hash(Plan.from_json(plan.to_json()))


MIXED = QuantizeConfig(attention=("int8-weight", "fp32", "kmeans4"), ffn=("kmeans4", "int8-weight", "bf16"))
GATE = [
    {"rounding": "gptq", "scaling": "awq", "embedding": "bf16"},
    {"rounding": "weighted", "scaling": "smooth", "attention": "int8-static", "calibration": "percentile"},
]


@pytest.mark.parametrize("family", [*FAMILIES, "vit"])
def test_each_layer_has_the_format_given(family: str) -> None:
    student = Student(model := tiny_model(family, layers=3), shape_of(model))
    if family == "albert":
        with pytest.raises(
            PlanError, match="layers 0 and 1 have the same weights, which cannot be both int8-weight and fp"
        ):
            Quantize().shape(student.shape, MIXED)
        return
    result = quantize(student, MIXED)
    assert result.shape == Quantize().shape(student.shape, MIXED)
    layers = result.shape.stacks[0].layers
    assert tuple(layer.attention_format for layer in layers) == MIXED.attention
    assert tuple(layer.ffn_format for layer in layers) == MIXED.ffn
    for layer, part in zip(layers, parts.layers_of(student.model), strict=True):
        for matrices, form in (
            (part.attention_matrices, layer.attention_format),
            (part.ffn_matrices, layer.ffn_format),
        ):
            found = {result.encoded[m.key].format for m in matrices if m.key in result.encoded}
            assert found == ({form} if form != "fp32" else set())


def test_formats_by_layer_that_do_not_fit_are_refused() -> None:
    student = student_of("bert")
    with pytest.raises(PlanError, match=r"quantize\.ffn: 2 formats for 3 layers; give one, or one for each layer"):
        Quantize().shape(student.shape, QuantizeConfig(ffn=("int8", "int4")))
    surgery.share_layers(student.model, attention=[0, 1, 2], feed_forward=[0, 1, 0])
    shared = shape_of(student.model)
    assert Quantize().shape(shared, QuantizeConfig(ffn=("int8", "int4", "int8")))
    with pytest.raises(
        PlanError, match="ffn: layers 0 and 2 have the same weights, which cannot be both int8 and int4"
    ):
        Quantize().shape(shared, QuantizeConfig(ffn=("int8", "int4", "int4")))
    with pytest.raises(PlanError, match=r"quantize\.ffn.*one of fp32"):
        make_step("quantize", {"ffn": ["int8", "int5"]})


def test_models_without_a_map_get_one_format_and_no_scaling() -> None:
    model = tiny_model("electra", embedding_size=32, intermediate_size=64)
    context = contracts.tiny_context("bert", contracts.tiny_task("bert"))
    student = Student(model, shape_of(model))
    with pytest.raises(PlanError, match=r"quantize\.ffn: one format is needed"):
        Quantize().shape(student.shape, MIXED.model_copy(update={"attention": "int8"}))
    with pytest.raises(PlanError, match=r"quantize\.scaling needs the architecture map"):
        Quantize().shape(student.shape, QuantizeConfig(ffn="int8", scaling="awq"))
    result = Quantize().apply(student, QuantizeConfig(ffn="int4", attention="kmeans4", rounding="gptq"), context)
    plain = Quantize().apply(student, QuantizeConfig(ffn="int4", attention="kmeans4"), context)
    assert {key: e.format for key, e in result.encoded.items()} == {key: e.format for key, e in plain.encoded.items()}
    assert any(not torch.equal(decode(e), decode(plain.encoded[key])) for key, e in result.encoded.items())


def test_settings_without_effect_are_no_part_of_a_resolved_plan() -> None:
    context = contracts.tiny_context("bert", contracts.tiny_task("bert"))
    shape = context.teacher.shape
    idle = QuantizeConfig(ffn="int8-weight", calibration="entropy", scaling="smooth", order=False, levels=("int4",))
    assert Quantize().resolve(shape, idle, context) == QuantizeConfig(ffn="int8-weight")
    kept = QuantizeConfig(ffn="int8-static", calibration="entropy", scaling="smooth", rounding="gptq", order=False)
    assert Quantize().resolve(shape, kept, context) == kept


@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_the_calibration_asked_for_is_used(method: Method) -> None:
    context = contracts.tiny_context("bert", contracts.tiny_task("bert"))
    config = QuantizeConfig(ffn="int8-static", calibration=method)
    result = Quantize().apply(context.teacher, config, context)
    assert result.ranges == input_ranges(context.teacher.model, list(result.ranges), context, method)
    assert set(result.ranges) == set(parts.matrices_of(context.teacher.model)["ffn"])


@pytest.mark.parametrize("family", contracts.FAMILIES)
def test_what_is_encoded_is_what_is_reloaded_and_exported(family: str, tmp_path: Path) -> None:
    """All roundings and scalings, after sharing and pruning, with formats by layer."""
    context = contracts.tiny_context(family, contracts.tiny_task(family))
    steps = [make_step("share", {"part": "attention", "groups": 2})] if family != "albert" else []
    steps.append(make_step("prune", {"heads": 0.5, "ffn": 0.5, "round_to": 8}))
    student = compress(Plan(tuple(steps)), context)
    several = {} if family == "albert" else {"ffn": ("bf16", "int8-weight", "fp32")}
    for number, settings in enumerate(GATE):
        config = QuantizeConfig(**{"attention": "int8-weight", "ffn": "int8-weight"} | several | settings)
        result = Quantize().apply(student, config, context)
        inputs = tiny_inputs(student.model)
        wanted = decoded(result)
        with torch.no_grad():
            expected = wanted(**inputs).logits
        folder = tmp_path / str(number)
        save_student(wanted, result.shape, folder)
        model, shape = load_student(folder)
        assert shape == result.shape
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, expected), "reloaded, to the bit"
        file = OnnxRuntime().emit(result, folder)[0]
        found = OnnxRuntime().load(file).run({name: tensor.numpy() for name, tensor in inputs.items()})["logits"]
        real = inputs.get("attention_mask", torch.ones(found.shape[:2])).numpy().astype(bool)
        rows = (found, expected.numpy()) if found.ndim == 2 else (found[real], expected.numpy()[real])
        tolerance = 0.2 if "attention" in settings else 1e-4  # 8-bit activations of random weights
        assert np.abs(rows[0] - rows[1]).max() < tolerance * np.abs(rows[1]).max()
