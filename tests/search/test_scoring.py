"""Intervals against the binomial distribution, and pairing."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest

from autolite import registry
from autolite.search import scoring
from autolite.search.scoring import Score, compared, interval, kept, quality
from autolite.tasks.base import Split
from autolite.tasks.custom import CustomTask


def binary(correct: np.ndarray) -> Score:
    return Score(np.stack([correct.astype(float), np.ones(len(correct))], axis=1))


def test_the_interval_of_an_accuracy_is_the_binomial_one() -> None:
    task = registry.get("task", "text-classification")
    right = np.arange(1000) < 800
    found = quality(binary(right), task, "test", seed=0)
    half = 1.96 * math.sqrt(0.8 * 0.2 / 1000)
    assert found.value == 0.8
    assert abs(found.low - (0.8 - half)) < 0.004
    assert abs(found.high - (0.8 + half)) < 0.004


def test_kept_is_paired_so_that_an_equal_model_keeps_exactly_all() -> None:
    task = registry.get("task", "text-classification")
    right = np.random.default_rng(0).random(300) < 0.7
    found = kept(binary(right), binary(right), task, seed=0)
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)


def test_kept_of_a_language_model_is_one_less_the_rise_of_its_loss_in_nats() -> None:
    task = registry.get("task", "language-modeling")
    teacher = Score(np.array([[20.0, 10.0], [30.0, 10.0]]))
    student = Score(np.array([[21.0, 10.0], [31.0, 10.0]]))
    found = kept(student, teacher, task, seed=0)
    assert math.isclose(found.value, 0.9)
    assert math.isclose(quality(student, task, "test", 0).value, math.exp(2.6))


def test_resamples_are_the_same_however_many_are_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    task = registry.get("task", "text-classification")
    right = binary(np.arange(100) < 80)
    at_once = quality(right, task, "test", seed=0)
    monkeypatch.setattr(scoring, "IN_MEMORY", 700)
    assert quality(right, task, "test", seed=0) == at_once


def test_a_quotient_for_which_few_examples_count_has_an_interval() -> None:
    """Resamples without any of them are a quotient of nothing."""
    examples = np.zeros((50, 2))
    examples[:2] = [[2, 2], [0, 1]]
    task = CustomTask(registry.get("task", "text-classification"), own_metric=lambda logits, labels: labels)
    found = quality(Score(examples), task, "test", seed=0)
    assert (found.low, found.value, found.high) == (0.0, 2 / 3, 1.0)


class Says:
    """A language model that has made up its mind: the same logits for every text."""

    def __init__(self, seed: int) -> None:
        self.rows, self.calls = np.random.default_rng(seed).normal(size=(9, 20)).astype(np.float32), 0

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.calls += 1
        batch, tokens = inputs["input_ids"].shape
        return {"logits": np.tile(self.rows[:tokens], (batch, 1, 1))}


def test_finalists_are_compared_with_the_teacher_batch_by_batch_and_it_is_run_once() -> None:
    task = registry.get("task", "language-modeling")
    rng = np.random.default_rng(0)
    split = Split("test", [rng.integers(20, size=rng.integers(2, 10)) for _ in range(70)], None, np.zeros(0, np.int64))
    runners = {"teacher": Says(0), "a": Says(1), "b": Says(2)}
    found = compared(runners, "teacher", task, split, pad_id=0)
    assert [runner.calls for runner in runners.values()] == [5, 5, 5]
    assert found["teacher"]["teacher_agreement"].ratio == 1
    (whole,) = task.batches(split, 70, 0)
    said = {name: runner.run(whole.inputs)["logits"] for name, runner in runners.items()}
    for name in runners:
        at_once = task.further(said[name], said["teacher"], whole.labels)
        for what, sums in at_once.items():
            assert found[name][what].examples[whole.indices] == pytest.approx(sums)
    kl = interval(found["a"]["kl_to_teacher_nats"], seed=0)
    assert 0 < kl.low < kl.value < kl.high
