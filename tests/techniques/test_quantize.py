"""Quantization sets formats, and encodes each stored matrix once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from autolite import parts, surgery
from autolite.architecture import shape_of
from autolite.errors import PlanError
from autolite.formats import decode
from autolite.plan import Plan, make_step
from autolite.techniques.base import Student
from autolite.techniques.quantize import Quantize, QuantizeConfig
from autolite.testing import tiny_model

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
        assert len(result.encoded) == 1
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
    plan = Plan((make_step("quantize", {"ffn": "kmeans4"}),))
    assert Plan.from_json(plan.to_json()) == plan
