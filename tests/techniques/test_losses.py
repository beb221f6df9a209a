"""The losses as their papers write them down, in numpy and float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autolite.techniques.ensemble import combined
from autolite.techniques.losses import attention_loss, attention_scores, hidden_loss, relation_loss
from autolite.techniques.schedules import scheduled

SIZES = {"seed": st.integers(0, 999), "heads": st.sampled_from([1, 2, 4]), "others": st.sampled_from([1, 2, 4])}
LENGTHS = (5, 3, 1)


def drawn(seed: int, *size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max())
    quotient: np.ndarray = powers / powers.sum()
    return quotient


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    return float((p * np.log(p / q)).sum())


def allowed_by_lengths(causal: bool) -> torch.Tensor:
    """Real queries look at real keys, at none after them if `causal`."""
    real = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
    pairs = real[:, None, :, None] & real[:, None, None, :]
    return pairs.tril() if causal else pairs


@given(causal=st.booleans(), **SIZES)
def test_attention_divergence_is_that_of_each_query_of_each_head(
    causal: bool, seed: int, heads: int, others: int
) -> None:
    student, teacher = drawn(seed, 3, heads, 5, 5), drawn(seed + 1, 3, others, 5, 5)
    a, b = student.double().numpy(), teacher.double().numpy()
    terms = []
    for example, length in enumerate(LENGTHS):
        for query in range(length):
            stop = query + 1 if causal else length
            q = [softmax(a[example, head, query, :stop]) for head in range(heads)]
            p = [softmax(b[example, head, query, :stop]) for head in range(others)]
            if heads == others:
                terms += [divergence(p[head], q[head]) for head in range(heads)]
            else:
                terms.append(divergence(np.mean(p, 0), np.mean(q, 0)))
    found = attention_loss(student, teacher, allowed_by_lengths(causal), "kl").item()
    assert found == pytest.approx(np.mean(terms), rel=1e-4, abs=1e-6)


@given(causal=st.booleans(), **SIZES)
def test_attention_error_is_relative_to_the_spread_of_the_scores(
    causal: bool, seed: int, heads: int, others: int
) -> None:
    student, teacher = drawn(seed, 3, heads, 5, 5), drawn(seed + 1, 3, others, 5, 5)
    a, b = student.double().numpy(), teacher.double().numpy()
    if heads != others:
        a, b = a.mean(1, keepdims=True), b.mean(1, keepdims=True)
    keep = np.broadcast_to(allowed_by_lengths(causal).numpy(), a.shape)
    expected = ((a[keep] - b[keep]) ** 2).mean() / b[keep].var()
    found = attention_loss(student, teacher, allowed_by_lengths(causal), "mse").item()
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_equal_maps_are_no_distance_apart_and_padding_is_not_seen(kind: Any) -> None:
    teacher, allowed = drawn(0, 3, 2, 5, 5), allowed_by_lengths(causal=False)
    student = torch.where(allowed, teacher, torch.tensor(1e4)).requires_grad_()
    loss = attention_loss(student, teacher, allowed, kind)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, student)
    assert torch.isfinite(gradient).all()


def test_scores_are_those_of_grouped_queries() -> None:
    query, key = drawn(0, 2, 4, 3, 8), drawn(1, 2, 2, 3, 8)
    scores = attention_scores(query, key, 0.5)
    for head in range(4):
        expected = 0.5 * torch.einsum("bqd,bkd->bqk", query[:, head], key[:, head // 2])
        torch.testing.assert_close(scores[:, head], expected)


@given(relation_heads=st.sampled_from([1, 2, 4]), **SIZES)
def test_relations_are_between_the_channels_dealt_to_each_relation_head(
    relation_heads: int, seed: int, heads: int, others: int
) -> None:
    student, teacher = drawn(seed, 3, heads, 5, 8), drawn(seed + 1, 3, others, 5, 4)
    mask = torch.arange(5) < torch.tensor(LENGTHS)[:, None]

    def relation(values: torch.Tensor, example: int, head: int, length: int) -> np.ndarray:
        channels = np.concatenate([values[example, h, :length].double().numpy() for h in range(values.shape[1])], 1)
        own = np.split(channels, relation_heads, axis=1)[head]
        scores = own @ own.T / math.sqrt(own.shape[1])
        return np.stack([softmax(row) for row in scores])

    terms = [
        divergence(p, q)
        for example, length in enumerate(LENGTHS)
        for head in range(relation_heads)
        for p, q in zip(relation(teacher, example, head, length), relation(student, example, head, length), strict=True)
    ]
    found = relation_loss(student, teacher, mask, relation_heads).item()
    assert found == pytest.approx(np.mean(terms), rel=1e-4, abs=1e-6)


def test_the_cosine_loss_sees_directions_alone() -> None:
    teacher = drawn(0, 2, 3, 8)
    mask = torch.ones(2, 3)
    assert hidden_loss([3 * teacher], [teacher], mask, "cosine").item() == pytest.approx(0, abs=1e-6)
    assert hidden_loss([-teacher], [teacher], mask, "cosine").item() == pytest.approx(2)


@given(st.integers(0, 999), st.floats(1, 10))
def test_the_mean_of_teachers_is_that_of_their_probabilities(seed: int, temperature: float) -> None:
    teachers = [drawn(seed + i, 4, 3) for i in range(3)]
    found = combined(teachers, torch.zeros(4, dtype=torch.int64), temperature, "mean")
    expected = torch.stack([torch.softmax(t.double() / temperature, -1) for t in teachers]).mean(0)
    torch.testing.assert_close(torch.softmax(found.double() / temperature, -1), expected, atol=1e-5, rtol=1e-4)


def test_the_best_teacher_is_right_or_else_sure() -> None:
    right, sure = torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([[0.0, 9.0], [0.0, 9.0]])
    found = combined([right, sure], torch.tensor([0, -100]), 4.0, "best")
    assert torch.equal(found, torch.stack([right[0], sure[1]]))


@given(st.floats(-5, 5), st.floats(-5, 5), st.floats(0, 1))
def test_schedules_lead_from_start_to_end(start: float, end: float, progress: float) -> None:
    low, high = min(start, end), max(start, end)
    assert scheduled(start, end, "constant", progress) == scheduled(start, None, "cosine", progress) == start
    for kind in ("linear", "cosine"):
        assert scheduled(start, end, kind, 0.0) == start  # type: ignore[arg-type]
        assert scheduled(start, end, kind, 1.0) == pytest.approx(end, abs=1e-9)  # type: ignore[arg-type]
        assert scheduled(start, end, kind, 0.5) == pytest.approx((start + end) / 2, abs=1e-9)  # type: ignore[arg-type]
        assert low - 1e-9 <= scheduled(start, end, kind, progress) <= high + 1e-9  # type: ignore[arg-type]
