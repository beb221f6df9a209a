"""Dominance and hypervolume against definitions and an independent computation."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from autolite.pareto import hypervolume, nondominated, spread_subset

# A coarse grid makes ties, the hard case, common.
points = st.integers(1, 3).flatmap(
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
def test_a_spread_subset_holds_distinct_indices_and_as_many_as_asked(values: np.ndarray, size: int) -> None:
    chosen = spread_subset(values, [6.5] * values.shape[1], size)
    assert len(chosen) == len(set(chosen)) == min(size, len(values))


@given(points)
def test_a_spread_subset_as_large_as_the_front_has_all_its_volume(values: np.ndarray) -> None:
    reference = [6.5] * values.shape[1]
    front = len(np.unique(values[nondominated(values)], axis=0))
    chosen = spread_subset(values, reference, front)
    assert np.isclose(hypervolume(values[chosen], reference), hypervolume(values, reference))


def test_no_points_have_no_volume() -> None:
    assert hypervolume([], [1.0, 1.0]) == 0.0
    assert hypervolume([[2.0, 2.0]], [1.0, 1.0]) == 0.0
