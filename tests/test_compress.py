"""A plan applied to a teacher, and trained students kept on disk."""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autolite import compress as compress_module
from autolite import registry
from autolite.architecture import ModelShape, shape_of
from autolite.compress import (
    canonical,
    compress,
    is_trained,
    read_weights,
    resolve,
    shape_after,
    student_plan,
    write_weights,
)
from autolite.errors import PlanError, StorageError
from autolite.plan import Plan, make_step
from autolite.tasks.base import Split
from autolite.techniques.base import Context, Student
from autolite.techniques.distill import Distill
from autolite.techniques.prune import Prune
from autolite.techniques.recover import Recover
from autolite.testing import PAD, VOCAB, tiny_model

PRUNE = make_step("prune", {"heads": 0.5, "ffn": 0.5, "round_to": 8, "depth": 0.7})
DISTILL = make_step("distill", {"steps": 2, "batch_size": 4})
PLAN = Plan((PRUNE, DISTILL))
WORDS = "bert.embeddings.word_embeddings.weight"


def context_of(family: str = "bert", cache: Path | None = None) -> Context:
    rng = np.random.default_rng(7)
    train = Split("train", [rng.integers(4, VOCAB, n) for n in (3, 5, 9, 4) * 3], None, rng.integers(0, 3, 12))
    model = tiny_model(family)
    return Context(
        Student(model, shape_of(model)), registry.get("task", "text-classification"), train, PAD, cache=cache
    )


def same(a: Student, b: Student) -> bool:
    pairs = zip(a.model.state_dict().items(), b.model.state_dict().items(), strict=True)
    return a.shape == b.shape and all(m == n and torch.equal(x, y) for (m, x), (n, y) in pairs)


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps of each training that was really done."""
    done: list[int] = []
    original = Distill.apply

    def counted(self: Distill, student: Student, config: Any, context: Context) -> Student:
        done.append(config.steps)
        return original(self, student, config, context)

    monkeypatch.setattr(Distill, "apply", counted)
    return done


def test_the_empty_plan_is_the_teacher() -> None:
    context = context_of()
    assert compress(Plan(), context) is context.teacher


@pytest.mark.parametrize("family", ["bert", "albert", "gpt2", "qwen3"])
def test_steps_are_applied_in_order_and_give_the_shape_foretold(family: str) -> None:
    context = context_of(family)
    before = copy.deepcopy(context.teacher)
    student = compress(PLAN, context)
    assert student.shape == shape_after(PLAN, context.teacher.shape) == shape_of(student.model)
    assert same(context.teacher, before)
    pruned = compress(Plan((PRUNE,)), context)
    assert same(student, Distill().apply(pruned, DISTILL.config, context))


def test_the_seed_of_the_plan_counts_not_that_of_the_context() -> None:
    assert same(compress(PLAN, context_of()), compress(PLAN, replace(context_of(), seed=5)))
    assert not same(compress(PLAN, context_of()), compress(replace(PLAN, seed=5), context_of()))


def test_steps_that_change_nothing_are_dropped() -> None:
    shape = context_of().teacher.shape
    idle = [
        make_step("prune", {}),
        make_step("prune", {"importance": "magnitude", "round_to": 16}),
        make_step("distill", {"steps": 0, "temperature": 7}),
    ]
    assert canonical(Plan((idle[0], PRUNE, *idle[1:], DISTILL)), shape) == PLAN
    assert canonical(Plan(tuple(idle)), shape) == Plan()
    assert canonical(Plan((DISTILL,)), shape) == Plan(), "the teacher has nothing to learn from itself"


def test_equal_students_are_trained_once(trainings: list[int], tmp_path: Path) -> None:
    first = compress(PLAN, context_of(), tmp_path)
    idle = make_step("prune", {})
    again = compress(Plan((idle, *PLAN.steps)), context_of(), tmp_path)
    assert trainings == [2]
    assert same(first, again)
    assert same(first, compress(PLAN, context_of()))


def test_what_training_begins_with_is_made_once_for_runs_of_every_length(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pruned: list[int] = []
    original = Prune.apply

    def counted(self: Prune, *arguments: Any) -> Student:
        pruned.append(1)
        return original(self, *arguments)

    monkeypatch.setattr(Prune, "apply", counted)
    longer = Plan((PRUNE, make_step("distill", {"steps": 3, "batch_size": 4})))
    context = replace(context_of(), trunks=tmp_path / "trunks")
    students = [compress(plan, context, tmp_path / "students") for plan in (PLAN, longer)]
    assert pruned == [1]
    assert all(same(s, compress(plan, context_of())) for s, plan in zip(students, (PLAN, longer), strict=True))


def test_another_process_can_tell_whether_a_student_is_trained(tmp_path: Path) -> None:
    context = context_of()
    formats = make_step("quantize", {"ffn": "int8"})
    assert is_trained(Plan((formats,)), context, tmp_path), "there is nothing to train"
    assert not is_trained(PLAN, context, tmp_path)
    compress(PLAN, context, tmp_path)
    assert is_trained(PLAN, context_of(), tmp_path)
    assert is_trained(Plan((*PLAN.steps, formats)), context_of(), tmp_path), "formats share the student"
    assert not is_trained(replace(PLAN, seed=5), context, tmp_path)


@pytest.mark.parametrize("family", ["bert", "albert", "distilbert", "gpt2", "qwen3"])
def test_a_stored_student_comes_back_bit_for_bit(family: str, tmp_path: Path) -> None:
    context = context_of(family)
    student = compress(PLAN, context, tmp_path)
    back = read_weights(next(tmp_path.iterdir()), PLAN, context.teacher)
    assert back is not None
    assert same(back, student)
    assert shape_of(back.model) == student.shape


def test_shared_weights_are_stored_once(tmp_path: Path) -> None:
    context = context_of()
    plan = Plan((make_step("share", {"part": "all", "groups": 1}), *PLAN.steps))
    student = compress(plan, context, tmp_path)
    (file,) = tmp_path.iterdir()
    back = read_weights(file, plan, context.teacher)
    assert back is not None
    assert same(back, student)
    assert len(list(back.model.parameters())) == len(list(student.model.parameters()))


def test_only_what_training_changed_is_stored(tmp_path: Path) -> None:
    context = context_of()
    student = compress(PLAN, context, tmp_path)
    (file,) = tmp_path.iterdir()
    embeddings = student.model.get_parameter(WORDS)
    total = sum(p.numel() for p in student.model.parameters()) * 4
    assert file.stat().st_size < total - embeddings.numel() * 4 + 16384


def test_all_formats_reuse_one_student(trainings: list[int], tmp_path: Path) -> None:
    plans = [Plan((*PLAN.steps, make_step("quantize", {"ffn": form}))) for form in ("int8", "int4")]
    assert {student_plan(plan) for plan in plans} == {PLAN}
    students = [compress(plan, context_of(), tmp_path) for plan in plans]
    assert trainings == [2]
    assert len(list(tmp_path.iterdir())) == 1
    assert [s.shape.stacks[0].layers[0].ffn_format for s in students] == ["int8", "int4"]
    assert all(same(s, compress(plan, context_of())) for s, plan in zip(students, plans, strict=True))


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.99])
def test_half_a_file_is_ignored_and_made_again(keep: float, trainings: list[int], tmp_path: Path) -> None:
    student = compress(PLAN, context_of(), tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: int(keep * len(whole))])
    assert same(compress(PLAN, context_of(), tmp_path), student)
    assert trainings == [2, 2]
    assert file.read_bytes() == whole


def test_another_teacher_or_other_data_is_another_student(trainings: list[int], tmp_path: Path) -> None:
    context = context_of()
    compress(PLAN, context, tmp_path)
    compress(PLAN, replace(context_of(), train=context.train.take(range(8))), tmp_path)
    other = context_of()
    with torch.no_grad():
        next(other.teacher.model.parameters()).add_(1)
    compress(PLAN, other, tmp_path)
    assert trainings == [2, 2, 2]
    assert len(list(tmp_path.iterdir())) == 3


def test_an_untrained_student_is_not_stored(tmp_path: Path) -> None:
    compress(Plan((PRUNE,)), context_of(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_crash_while_writing_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    context = context_of()
    student = compress(PLAN, context)
    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(StorageError, match="No space left on device; free some space"):
        write_weights(student, tmp_path / "student.safetensors", context.teacher)
    assert not list(tmp_path.iterdir())


def test_a_plan_that_cannot_be_applied_is_refused_before_training(trainings: list[int]) -> None:
    context = context_of()
    plan = Plan((DISTILL, make_step("quantize", {"ffn": "int8"}), PRUNE))
    with pytest.raises(PlanError, match="put it before quantize"):
        compress(plan, context)
    assert not trainings


def test_no_weights_are_needed_for_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compress_module, "clone", None)
    shape = ModelShape.from_json(context_of().teacher.shape.to_json())
    after = shape_after(PLAN, shape)
    assert [layer.heads for layer in after.stacks[0].layers] == [2, 2]
    assert after.source_layers == ((0, 2),)


QUANTIZE = make_step("quantize", {"ffn": "int3", "attention": "int4-asym", "rounding": "gptq"})
RECOVER = make_step("recover", {"steps": 2, "batch_size": 4})


@pytest.fixture
def recoveries(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps of each recovery that was really done."""
    done: list[int] = []
    original = Recover.apply

    def counted(self: Recover, student: Student, config: Any, context: Context) -> Student:
        done.append(config.steps)
        return original(self, student, config, context)

    monkeypatch.setattr(Recover, "apply", counted)
    return done


def encodings(student: Student) -> dict[str, tuple[Any, ...]]:
    return {
        key: (found.format, found.shape, {name: tensor.tolist() for name, tensor in found.tensors.items()})
        for key, found in student.encoded.items()
    }


@pytest.mark.parametrize("family", ["bert", "albert", "gpt2", "qwen3"])
def test_what_was_recovered_comes_back_bit_for_bit(
    family: str, trainings: list[int], recoveries: list[int], tmp_path: Path
) -> None:
    plan = Plan((*PLAN.steps, QUANTIZE, RECOVER))
    assert student_plan(plan) == plan
    first = compress(plan, context_of(family), tmp_path)
    again = compress(plan, context_of(family), tmp_path)
    assert (trainings, recoveries) == ([2], [2]), "a second call trains nothing"
    assert same(first, again)
    assert encodings(first) == encodings(again)
    assert first.ranges == again.ranges
    assert encodings(first) == encodings(compress(plan, context_of(family)))


def test_formats_share_the_distilled_student_and_each_has_its_recovered_one(
    trainings: list[int], recoveries: list[int], tmp_path: Path
) -> None:
    other = make_step("quantize", {"ffn": "int2", "attention": "int8-static"})
    for step in (QUANTIZE, other, QUANTIZE):
        compress(Plan((*PLAN.steps, step, RECOVER)), context_of(), tmp_path)
    compress(Plan((*PLAN.steps, QUANTIZE)), context_of(), tmp_path)
    assert trainings == [2]
    assert recoveries == [2, 2]
    assert len(list(tmp_path.iterdir())) == 3


def test_a_crash_in_recovery_does_not_lose_the_distillation(
    trainings: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan((*PLAN.steps, QUANTIZE, RECOVER))
    with monkeypatch.context() as patch:
        patch.setattr(Recover, "apply", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            compress(plan, context_of(), tmp_path)
    compress(plan, context_of(), tmp_path)
    assert trainings == [2]


def test_recovery_that_has_nothing_to_do_is_no_part_of_the_plan(recoveries: list[int]) -> None:
    context = context_of()
    coarse, fine = (make_step("quantize", {"ffn": form}) for form in ("int4", "int8"))
    kept = [canonical(resolve(Plan((step, RECOVER)), context), context.teacher.shape) for step in (coarse, fine)]
    assert kept == [Plan((coarse, RECOVER)), Plan((fine,))]
    compress(Plan((fine, RECOVER)), context)
    assert not recoveries


def test_a_teacher_that_is_only_quantized_can_be_recovered(recoveries: list[int], tmp_path: Path) -> None:
    plan = Plan((QUANTIZE, RECOVER))
    students = [compress(plan, context_of(), tmp_path) for _ in range(2)]
    assert recoveries == [2]
    assert encodings(students[0]) == encodings(students[1])


def test_a_student_of_another_layout_is_trained_again(
    trainings: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as earlier:
        earlier.setattr(compress_module, "LAYOUT", compress_module.LAYOUT - 1)
        compress(PLAN, context_of(), tmp_path)
    compress(PLAN, context_of(), tmp_path)
    assert len(trainings) == 2
