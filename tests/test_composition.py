"""Any technique after any other, for every family: compacted = reloaded = exported, and training goes on."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from autolite import contracts, registry
from autolite.architecture import shape_of
from autolite.compress import compress, shape_after
from autolite.errors import PlanError
from autolite.formats import decode
from autolite.parts import matrices_of
from autolite.plan import Plan, make_step
from autolite.reload import load_student, save_student
from autolite.surgery import clone
from autolite.techniques.base import Context, Student
from autolite.testing import tiny_inputs

# In the order of application. Formats are those of weights alone, so that a graph can be held against the weights that
# they decode to: 1e-4 of the largest logit is what another order of sums in float32 amounts to in these models.
SETTINGS: dict[str, dict[str, Any]] = {
    "share": {"part": "ffn", "groups": 2, "init": "mean", "rank": 2},
    "embedding": {"rank": 0.5, "vocabulary": 0.75},
    "prune": {"heads": 0.5, "ffn": (16, 16, 24), "hidden": 0.75, "round_to": 8, "importance": "wanda"},
    "distill": {"steps": 2, "batch_size": 8, "hidden": 0.0},
    "quantize": {"attention": "int8-weight", "ffn": "bf16", "embedding": "bf16", "head": "bf16"},
}
TOLERANCE = 1e-4
PAIRS = list(itertools.combinations(SETTINGS, 2))


def plan_of(family: str, *techniques: str) -> Plan:
    """Return a plan of these techniques, leaving out what the family has nothing of: images no words, language models
    no tokens to spare, ALBERT's one layer no different widths, a table that is its own head no format of its own."""
    settings = {name: dict(SETTINGS[name]) for name in techniques}
    decoder = family in contracts.DECODERS
    if family == "vit":
        settings.pop("embedding", None)
    for name, key in (("embedding", "vocabulary"), ("quantize", "head")):
        if decoder and name in settings:
            del settings[name][key]
    if "prune" in settings and (family == "albert" or "share" in settings):
        settings["prune"]["ffn"] = 0.5
    return Plan(tuple(make_step(name, values) for name, values in settings.items()))


def decoded(student: Student) -> PreTrainedModel:
    """Return the student's model with the values that its number formats stand for."""
    model = clone(student.model)
    matrices = {key: matrix for group in matrices_of(model).values() for key, matrix in group.items()}
    with torch.no_grad():
        for key, encoded in student.encoded.items():
            matrices[key].weight.copy_(decode(encoded))
    return model


def inputs_of(context: Context, student: Student) -> dict[str, torch.Tensor]:
    inputs = tiny_inputs(context.teacher.model)
    if student.vocabulary is not None:
        inputs["input_ids"] = torch.from_numpy(student.vocabulary.table)[inputs["input_ids"]]
    return inputs


@torch.no_grad()
def logits_of(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs).logits


def exported(student: Student, inputs: dict[str, torch.Tensor], folder: Path) -> torch.Tensor:
    runtime = registry.get("runtime", "onnxruntime")
    folder.mkdir(exist_ok=True)
    runner = runtime.load(runtime.emit(student, folder)[0])
    return torch.from_numpy(runner.run({name: tensor.numpy() for name, tensor in inputs.items()})["logits"])


def assert_close(found: torch.Tensor, expected: torch.Tensor, inputs: dict[str, torch.Tensor]) -> None:
    if expected.ndim == 3:
        real = inputs["attention_mask"].bool()
        found, expected = found[real], expected[real]
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


def compressed(family: str, *techniques: str) -> tuple[Context, Student]:
    context = contracts.tiny_context(family, contracts.tiny_task(family))
    return context, compress(plan_of(family, *techniques), context)


@pytest.mark.parametrize("family", contracts.FAMILIES)
@pytest.mark.parametrize(("first", "second"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
def test_a_pair_is_exported_as_it_computes(first: str, second: str, family: str, tmp_path: Path) -> None:
    context, student = compressed(family, first, second)
    assert shape_of(student.model) == student.shape.without_formats()
    inputs = inputs_of(context, student)
    assert_close(exported(student, inputs, tmp_path), logits_of(decoded(student), inputs), inputs)


@pytest.mark.parametrize("family", contracts.FAMILIES)
def test_all_together_are_reloaded_trained_on_and_saved_again(family: str, tmp_path: Path) -> None:
    context, student = compressed(family, *SETTINGS)
    inputs = inputs_of(context, student)
    before = logits_of(student.model, inputs)
    assert_close(exported(student, inputs, tmp_path / "onnx"), logits_of(decoded(student), inputs), inputs)

    save_student(student.model, student.shape, tmp_path / "one")
    model, shape = load_student(tmp_path / "one")
    assert shape == student.shape
    assert torch.equal(logits_of(model, inputs), before)

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(**inputs).logits.square().mean().backward()
    optimizer.step()
    after = logits_of(model, inputs)
    assert not torch.equal(after, before)
    assert shape_of(model) == shape.without_formats(), "what is shared, tied or cut stays so in training"
    save_student(model, shape, tmp_path / "two")
    again, _ = load_student(tmp_path / "two")
    assert torch.equal(logits_of(again, inputs), after)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([("share", {"part": "ffn", "rank": 2}), ("prune", {"ffn": 0.5, "reconstruct": True})], "low-rank differences"),
        ([("prune", {"sparsity": "2:4"}), ("quantize", {"ffn": "kmeans4"})], "exact zero"),
        ([("prune", {"sparsity": "2:4"}), ("prune", {"heads": 0.5})], "zeros already"),
        ([("quantize", {"ffn": "int8"}), ("prune", {"heads": 0.5})], "put it before quantize"),
        ([("prune", {"ffn": (8, 16, 24), "round_to": 8}), ("share", {"part": "ffn"})], "cannot share"),
        ([("share", {"part": "ffn"}), ("quantize", {"ffn": ("int8", "int4", "int8")})], "ffn"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(steps: list[tuple[str, dict[str, Any]]], message: str) -> None:
    context = contracts.tiny_context("bert", contracts.tiny_task("bert"))
    plan = Plan(tuple(make_step(name, values) for name, values in steps))
    with pytest.raises(PlanError, match=message):
        shape_after(plan, context.teacher.shape)


@pytest.mark.parametrize("rounding", ["nearest", "weighted", "gptq", "hqq"])
@pytest.mark.parametrize("form", ["int4", "int3-asym"])
def test_zeros_survive_training_and_every_rounding(form: str, rounding: str) -> None:
    context = contracts.tiny_context("bert", contracts.tiny_task("bert"))
    steps = {
        "prune": {"sparsity": "2:4"},
        "distill": {"steps": 2, "batch_size": 8},
        "quantize": {"ffn": form, "rounding": rounding},
        "recover": {"steps": 2, "batch_size": 8},
    }
    student = compress(Plan(tuple(make_step(name, values) for name, values in steps.items())), context)
    for key in student.encoded:
        groups = decode(student.encoded[key]).unflatten(1, (-1, 4))
        assert ((groups != 0).sum(-1) <= 2).all(), key


@pytest.mark.parametrize("rounding", ["weighted", "gptq"])
@pytest.mark.parametrize("family", contracts.FAMILIES)
def test_roundings_see_what_other_techniques_left(family: str, rounding: str, tmp_path: Path) -> None:
    context = contracts.tiny_context(family, contracts.tiny_task(family))
    plan = plan_of(family, "share", "embedding", "prune")
    quantized = make_step("quantize", {"attention": "int4", "ffn": "int3", "embedding": "int4", "rounding": rounding})
    student = compress(replace(plan, steps=(*plan.steps, quantized)), context)
    encoded = {key for key, matrix in student.encoded.items() if matrix.format in ("int4", "int3")}
    groups = matrices_of(student.model)
    layers = {key for group in ("attention", "ffn") for key, m in groups[group].items() if not m.factor}
    assert layers <= encoded
    inputs = inputs_of(context, student)
    found, expected = exported(student, inputs, tmp_path), logits_of(decoded(student), inputs)
    assert (found - expected).abs().mean() <= 0.05 * expected.abs().mean(), "but for activations in 8 bits"
