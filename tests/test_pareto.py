"""Dominance and hypervolume against definitions and an independent computation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from autolite import pareto
from autolite.pareto import gains, hypervolume, nondominated, spread_subset

# A coarse grid makes ties, the hard case, common.
points = st.integers(1, 4).flatmap(
    lambda d: arrays(np.float64, st.tuples(st.integers(1, 12), st.just(d)), elements=st.integers(0, 6).map(float))
)


@given(points)
def test_nondominated_is_the_definition(values: np.ndarray) -> None:
    expected = [not any((other <= point).all() and (other < point).any() for other in values) for point in values]
    assert nondominated(values).tolist() == expected


@given(points)
def test_hypervolume_equals_counting_cells(values: np.ndarray) -> None:
    # On an integer grid the dominated volume is the number of unit cells whose lower corner is dominated.
    cells = np.stack(np.meshgrid(*[np.arange(6)] * values.shape[1], indexing="ij"), -1).reshape(-1, values.shape[1])
    covered = (values[None] <= cells[:, None]).all(-1).any(-1).sum()
    assert hypervolume(values, [6.0] * values.shape[1]) == covered


@given(points, st.integers(0, 12))
def test_gains_are_differences_of_hypervolume(values: np.ndarray, split: int) -> None:
    # Halves: some candidates are not within the reference, others touch it.
    front, candidates, reference = values[:split], values[split:], [5.5] * values.shape[1]
    volume = hypervolume(front, reference)
    expected = [hypervolume([*front, each], reference) - volume for each in candidates]
    assert gains(candidates, front, reference).tolist() == expected


def test_gains_in_many_objectives_and_parts_are_differences_of_hypervolume(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pareto, "_MOST", 100)
    rng = np.random.default_rng(0)
    front, candidates, reference = rng.random((20, 5)), rng.random((30, 5)), [1.1] * 5
    expected = [hypervolume([*front, each], reference) - hypervolume(front, reference) for each in candidates]
    assert np.allclose(gains(candidates, front, reference), expected, rtol=0, atol=1e-12)


@given(points, st.integers(0, 12))
def test_a_spread_subset_adds_the_most_hypervolume_with_each_index(values: np.ndarray, size: int) -> None:
    reference, left = [5.5] * values.shape[1], list(range(len(values)))
    expected: list[int] = []
    while len(expected) < min(size, len(values)):
        volume = hypervolume(values[expected], reference)
        added = [hypervolume(values[[*expected, i]], reference) - volume for i in left]
        best = int(np.argmax(added)) if max(added) else min(range(len(left)), key=lambda k: values[left[k], 0])
        expected.append(left.pop(best))
    assert spread_subset(values, reference, size) == expected


@given(points)
def test_a_spread_subset_as_large_as_the_front_has_all_its_volume(values: np.ndarray) -> None:
    reference = [6.5] * values.shape[1]
    front = len(np.unique(values[nondominated(values)], axis=0))
    chosen = spread_subset(values, reference, front)
    assert np.isclose(hypervolume(values[chosen], reference), hypervolume(values, reference))


def test_no_points_have_no_volume() -> None:
    assert hypervolume([], [1.0, 1.0]) == 0.0
    assert hypervolume([[2.0, 2.0]], [1.0, 1.0]) == 0.0
