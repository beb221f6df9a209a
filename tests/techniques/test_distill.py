"""Distillation: the loss as written down, reproducible, and the teacher run no more than it must be."""

from __future__ import annotations

import copy
import math
import os
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from autolite.architecture import LayerShape, ModelShape, Stack, shape_of
from autolite.errors import DataError, PlanError, StorageError
from autolite.families import FAMILIES
from autolite.plan import make_step
from autolite.techniques import teacher as teacher_module
from autolite.techniques.base import Context, Student
from autolite.techniques.distill import Distill, DistillConfig, stream
from autolite.techniques.features import FeatureCache
from autolite.techniques.losses import hidden_loss, soft_loss
from autolite.techniques.objective import layer_map
from autolite.techniques.prune import Prune, PruneConfig
from autolite.techniques.schedules import WARM_UP
from autolite.techniques.teacher import TeacherOutputs, teacher_outputs, teaching

MakeContext = Callable[..., Context]
DISTILL = Distill()
QUICK = DistillConfig(steps=3, batch_size=4)


def pruned(context: Context) -> Student:
    return Prune().apply(context.teacher, PruneConfig(heads=0.5, ffn=0.5, round_to=8, importance="magnitude"), context)


def same(a: Student, b: Student) -> bool:
    pairs = zip(a.model.named_parameters(), b.model.named_parameters(), strict=True)
    return all(left[0] == right[0] and torch.equal(left[1], right[1]) for left, right in pairs)


def exact_losses(student: Any, context: Context, config: DistillConfig, index: int) -> torch.Tensor:
    """The loss of one batch, from the formulas: sums of p * log(p / q), squares and variances by hand."""
    batch = list(context.task.batches(context.train, config.batch_size, context.pad_id))[index]
    inputs = {name: torch.from_numpy(array) for name, array in batch.inputs.items()}
    ours = student(**inputs, output_hidden_states=True)
    with torch.no_grad():
        theirs = context.teacher.model(**inputs, output_hidden_states=True)
    hard = -torch.log_softmax(ours.logits, -1)[torch.arange(len(batch.labels)), torch.from_numpy(batch.labels)].mean()
    p = torch.softmax(theirs.logits / config.temperature, -1)
    q = torch.softmax(ours.logits / config.temperature, -1)
    soft = config.temperature**2 * (p * (p.log() - q.log())).sum(-1).mean()
    keep = inputs["attention_mask"].bool()
    hidden = []
    for mine, its in zip(ours.hidden_states[1:], theirs.hidden_states[1:], strict=True):
        mine, its = mine[keep], its.to(torch.bfloat16).float()[keep]
        hidden.append(((mine - its) ** 2).mean() / ((its - its.mean()) ** 2).mean())
    return config.alpha * hard + (1 - config.alpha) * soft + config.hidden * torch.stack(hidden).mean()


@pytest.mark.parametrize(("alpha", "hidden", "temperature"), [(0.3, 2.0, 4.0), (1.0, 0.0, 1.0), (0.0, 1.0, 2.0)])
def test_one_step_follows_the_gradient_of_the_loss(
    alpha: float, hidden: float, temperature: float, make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of distillation is AdamW's first step on the hand-written loss, its gradient clipped to norm 1."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    context = make_context()
    student = pruned(context)
    config = DistillConfig(
        steps=1, batch_size=4, alpha=alpha, hidden=hidden, temperature=temperature, embeddings=True, learning_rate=1e-2
    )
    expected: Any = copy.deepcopy(student.model)
    loss = exact_losses(expected, context, config, next(stream(config, context)).batch)
    torch.autograd.backward(loss)
    nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
    moved = DISTILL.apply(student, config, context)
    checked, total = 0, 0
    rate = config.learning_rate / WARM_UP
    for (name, old), new in zip(expected.named_parameters(), moved.model.parameters(), strict=True):
        if name.endswith("key.bias"):
            continue  # the softmax ignores it, so that its gradient is rounding
        gradient = torch.zeros_like(old) if old.grad is None else old.grad
        # The first step of Adam is lr * g / (|g| + eps); decoupled weight decay applies to matrices only.
        decay = 0.01 if old.ndim >= 2 and old.grad is not None else 0.0
        target = old * (1 - rate * decay) - rate * gradient / (gradient.abs() + 1e-8)
        sure = (gradient == 0) | (gradient.abs() > 1e-5)  # elsewhere rounding decides the quotient
        checked, total = checked + int(sure.sum()), total + sure.numel()
        torch.testing.assert_close(new[sure], target[sure], atol=2e-5, rtol=1e-3, msg=name)
    assert checked > 0.8 * total


@given(st.integers(1, 6), st.integers(2, 5), st.floats(1, 10), st.integers(0, 99))
def test_the_soft_loss_is_the_scaled_divergence(rows: int, classes: int, temperature: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(rows, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    p, q = (torch.softmax(x / temperature, -1) for x in (teacher, student))
    expected = temperature**2 * (p * torch.log(p / q)).sum() / rows
    torch.testing.assert_close(soft_loss(student, teacher, temperature).double(), expected, atol=1e-4, rtol=1e-4)
    assert soft_loss(teacher, teacher, temperature).abs() < 1e-6


def test_padding_is_outside_the_hidden_loss() -> None:
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    before = hidden_loss([student], [teacher], mask)
    student[1, 1:], teacher[1, 1:] = 1e6, math.nan
    assert torch.equal(hidden_loss([student], [teacher], mask), before)


def test_the_hidden_loss_of_the_mean_is_one() -> None:
    teacher = 5 + 3 * torch.randn(2, 7, 16)
    guess = torch.full_like(teacher, teacher.mean().item())
    assert hidden_loss([guess], [teacher], torch.ones(2, 7)).item() == pytest.approx(1, rel=1e-4)


def shape(layers: int, source: tuple[tuple[int, ...], ...] = ()) -> ModelShape:
    stack = Stack("encoder", 32, tuple(LayerShape(4, 4, 8, 64, i, i) for i in range(layers)))
    return ModelShape("bert", (stack,), 96, 32, 64, 3, source_layers=source)


def test_layers_imitate_the_ones_they_came_from() -> None:
    assert layer_map(shape(3, ((0, 3, 5),)), shape(6)) == (0, 3, 5)
    assert layer_map(shape(3), shape(6)) == (1, 3, 5)
    assert layer_map(shape(4), shape(6)) == (1, 2, 4, 5)
    assert layer_map(shape(1, ((0,),)), shape(6)) == (5,), "the head reads the last layer's state"


def test_an_epoch_never_repeats_a_batch(make_context: MakeContext) -> None:
    def order(seed: int) -> list[int]:
        context = make_context(seed=seed, examples=28)
        return [item.batch for item in islice(stream(QUICK, context), 21)]

    first = order(3)
    assert all(sorted(first[i : i + 7]) == list(range(7)) for i in (0, 7, 14))
    assert first[:7] != first[7:14]
    assert first == order(3)
    assert first != order(4)


def test_a_batch_holds_examples_of_like_lengths(make_context: MakeContext) -> None:
    (teacher,), *_ = next(stream(QUICK, make_context()))
    lengths = [batch.inputs["attention_mask"].sum(1) for batch in teacher.batches]
    assert all(short.max() <= long.min() for short, long in pairwise(lengths))


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"vit"}))
def test_a_student_of_any_family_learns_and_its_teacher_is_untouched(family: str, make_context: MakeContext) -> None:
    context = make_context(family)
    student = pruned(context)
    before = copy.deepcopy((context.teacher, student))
    done = DISTILL.apply(student, DistillConfig(steps=25, batch_size=8, learning_rate=3e-3), context)
    assert same(context.teacher, before[0])
    assert same(student, before[1])
    assert done.shape == student.shape == shape_of(done.model)
    assert all(p.requires_grad and p.grad is None for p in done.model.parameters())

    def loss(model: Any) -> float:
        config = DistillConfig(batch_size=24)
        return exact_losses(model, context, config, 0).item()

    assert loss(done.model) < 0.9 * loss(student.model)


def test_a_language_model_learns_from_the_soft_targets_of_its_tokens(make_context: MakeContext) -> None:
    context = make_context("llama", "language-modeling")
    student = pruned(context)
    done = DISTILL.apply(student, DistillConfig(steps=20, batch_size=8, alpha=0.0, learning_rate=3e-3), context)
    batch = next(context.task.batches(context.train, 24, context.pad_id))
    inputs = {name: torch.from_numpy(array) for name, array in batch.inputs.items()}
    labels = torch.from_numpy(batch.labels)

    @torch.no_grad()
    def distance(model: Any) -> float:
        ours, theirs = (context.task.soft_targets(m(**inputs).logits, labels) for m in (model, context.teacher.model))
        return soft_loss(ours, theirs, temperature=1.0).item()

    assert distance(done.model) < 0.9 * distance(student.model)


def test_equal_seeds_give_equal_students(make_context: MakeContext) -> None:
    first = DISTILL.apply(pruned(make_context()), QUICK, make_context())
    again = DISTILL.apply(pruned(make_context()), QUICK, make_context())
    other = DISTILL.apply(pruned(make_context()), QUICK, make_context(seed=1))
    assert same(first, again)
    assert not same(first, other)


def test_what_is_remembered_changes_nothing(make_context: MakeContext, tmp_path: Path) -> None:
    fresh = DISTILL.apply(pruned(make_context()), QUICK, make_context())
    warm = make_context(cache=tmp_path)
    DISTILL.apply(warm.teacher, replace_steps(QUICK, 9), warm)
    assert same(DISTILL.apply(pruned(warm), QUICK, warm), fresh)
    from_disk = make_context(cache=tmp_path)
    assert same(DISTILL.apply(pruned(from_disk), QUICK, from_disk), fresh)


def replace_steps(config: DistillConfig, steps: int) -> DistillConfig:
    return config.model_copy(update={"steps": steps})


def test_no_memory_means_more_work_and_the_same_numbers(
    make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    plenty = DISTILL.apply(pruned(make_context()), replace_steps(QUICK, 8), make_context())
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 400}))
    context = make_context()
    assert same(DISTILL.apply(pruned(context), replace_steps(QUICK, 8), context), plenty)


def test_zero_steps_return_the_student_itself(make_context: MakeContext) -> None:
    context = make_context()
    assert DISTILL.apply(context.teacher, DistillConfig(steps=0), context) is context.teacher
    assert not context.memory


def test_embeddings_stay_unless_asked(make_context: MakeContext) -> None:
    context = make_context()
    frozen = DISTILL.apply(context.teacher, QUICK, context).model
    trained = DISTILL.apply(context.teacher, QUICK.model_copy(update={"embeddings": True}), context).model
    name = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(frozen.get_parameter(name), context.teacher.model.get_parameter(name))
    assert not torch.equal(trained.get_parameter(name), context.teacher.model.get_parameter(name))


def test_divergence_blames_the_learning_rate(make_context: MakeContext) -> None:
    context = make_context()
    student = Student(copy.deepcopy(context.teacher.model), context.teacher.shape)
    with torch.no_grad():
        student.model.get_parameter("classifier.weight").fill_(math.inf)
    with pytest.raises(PlanError, match=r"distill\.learning_rate: 0\.5 made the loss nan at step 1 of 3; try 0\.05"):
        DISTILL.apply(student, QUICK.model_copy(update={"learning_rate": 0.5}), context)


def test_progress_ends_at_the_last_step(make_context: MakeContext) -> None:
    seen: list[tuple[int, int]] = []
    context = replace(make_context(), progress=lambda done, total: seen.append((done, total)))
    DISTILL.apply(context.teacher, replace_steps(QUICK, 23), context)
    assert seen == [(10, 23), (20, 23), (23, 23)]


def test_a_short_run_asks_the_teacher_only_about_its_own_batches(
    make_context: MakeContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []
    original = TeacherOutputs._run

    def counted(self: TeacherOutputs, index: int, *wanted: Any) -> Any:
        runs.append(index)
        return original(self, index, *wanted)

    monkeypatch.setattr(TeacherOutputs, "_run", counted)
    short = replace_steps(QUICK, 4)
    context = make_context(cache=tmp_path)
    DISTILL.apply(context.teacher, short, context)
    assert len(runs) == len(set(runs)) == 4
    DISTILL.apply(context.teacher, short, context)
    DISTILL.apply(context.teacher, short, make_context(cache=tmp_path))
    assert len(runs) == 4, "memory, then disk"
    DISTILL.apply(context.teacher, short.model_copy(update={"values": 1.0}), context)
    assert len(runs) == 8, "what was not asked for before is asked for now"


def test_who_trains_on_the_same_batches_at_once_shares_out_what_the_teacher_says(
    make_context: MakeContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[tuple[str, int]] = []
    original = TeacherOutputs._run

    def counted(self: TeacherOutputs, index: int, *wanted: Any) -> Any:
        runs.append((threading.current_thread().name, index))
        time.sleep(0.05)  # or the first is through before the second begins
        return original(self, index, *wanted)

    monkeypatch.setattr(TeacherOutputs, "_run", counted)
    contexts = [make_context(examples=80, cache=tmp_path) for _ in range(2)]
    outputs = [teacher_outputs(context, 4) for context in contexts]
    order = list(range(20))
    said: dict[str, list[torch.Tensor]] = {"a": [], "b": []}

    def ask(name: str, own: TeacherOutputs) -> None:
        said[name] = [own.of(i, True, ahead=order[i + 1 : i + 5])["logits"] for i in order]

    threads = [threading.Thread(target=ask, args=each, name=each[0]) for each in zip("ab", outputs, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(index for _, index in runs) == order, "each batch once"
    assert {name for name, _ in runs} == {"a", "b"}
    assert all(torch.equal(a, b) for a, b in zip(said["a"], said["b"], strict=True))
    counts = [teaching(context).batches for context in contexts]
    assert sum(counts) == 20
    assert min(counts) > 0


def test_a_process_that_does_not_end_is_not_waited_for(
    make_context: MakeContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = teacher_outputs(make_context(), 4).of(0, True)
    monkeypatch.setattr(teacher_module, "PATIENCE", 0.05)
    monkeypatch.setattr(FeatureCache, "claimed", lambda self, key: nullcontext(False))
    found = teacher_outputs(make_context(cache=tmp_path), 4).of(0, True, ahead=[1, 2])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("damage", [lambda old: b"", lambda old: old[:-9], lambda old: old[:-1] + bytes([old[-1] ^ 1])])
def test_damaged_outputs_are_made_again(
    make_context: MakeContext, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    context = make_context(cache=tmp_path)
    whole = DISTILL.apply(context.teacher, QUICK, context)
    files = {file: file.read_bytes() for file in tmp_path.rglob("*.safetensors")}
    assert len(files) == QUICK.steps
    for file, content in files.items():
        file.write_bytes(damage(content))
    context = make_context(cache=tmp_path)
    assert same(DISTILL.apply(context.teacher, QUICK, context), whole)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.safetensors")} == files


def test_a_full_disk_is_named(make_context: MakeContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    context = make_context(cache=tmp_path)
    with pytest.raises(StorageError, match="No space left on device; free some space"):
        DISTILL.apply(context.teacher, QUICK, context)
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and file.suffix != ".lock"]


def test_nothing_to_train_on_is_said(make_context: MakeContext) -> None:
    context = make_context()
    with pytest.raises(DataError, match="training split is empty"):
        DISTILL.apply(context.teacher, QUICK, replace(context, train=context.train.take([])))


@pytest.mark.parametrize("setting", [{"steps": -1}, {"temperature": 0.5}, {"alpha": 2}, {"hidden": -1}, {"steps": 1.5}])
def test_settings_out_of_range_are_named(setting: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=f"distill.{next(iter(setting))}"):
        make_step("distill", setting)
