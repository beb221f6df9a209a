"""Intervals against the binomial distribution, and pairing."""

from __future__ import annotations

import math

import numpy as np
import pytest

from autolite import registry
from autolite.search import scoring
from autolite.search.scoring import Score, kept, quality
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
