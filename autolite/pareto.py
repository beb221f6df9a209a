"""Dominance, hypervolume and choice among points; all take points to be *minimised*, float [n, objectives].

What no point dominates is kept as disjoint cells. They are few for the hundreds of points of a search (in five
objectives, about 10,000 for 120 points), and what a point takes of all of them is one computation on arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Points = NDArray[np.float64]
_MOST = 4_000_000  # products of points and cells at once: 32 MB


def _points(values: ArrayLike) -> Points:
    points = np.asarray(values, dtype=np.float64)
    return points.reshape(0, 1) if points.size == 0 else points


def nondominated(values: ArrayLike) -> NDArray[np.bool_]:
    """Return bool [n]: True where no other point is at least as good in every objective and better in one.

    Equal points do not dominate each other, so all copies of a front point are on the front.
    """
    points = _points(values)
    no_worse = (points[:, None, :] <= points[None, :, :]).all(-1)
    better = (points[:, None, :] < points[None, :, :]).any(-1)
    return np.asarray(~(no_worse & better).any(0))


def hypervolume(values: ArrayLike, reference: Sequence[float]) -> float:
    """Return the volume dominated by the points and bounded by `reference`; points beyond it count nothing.

    Exact, as the sum of what each point takes of the cells that the points before it left.
    """
    return _free(_points(values), np.asarray(reference, dtype=np.float64))[1]


def gains(candidates: ArrayLike, front: ArrayLike, reference: Sequence[float]) -> Points:
    """Return float [m]: what each of the candidates [m, d] alone would add to the hypervolume of `front` [n, d].

    Exact, and exactly 0 only for a candidate that a point of the front equals or dominates, or that is not within
    `reference`. All candidates are compared with the same cells, so that many of them cost little more than one.
    """
    limit = np.asarray(reference, dtype=np.float64)
    cells, _ = _free(_points(front), limit)
    return _within(cells, _points(candidates))


def spread_subset(values: ArrayLike, reference: Sequence[float], size: int) -> list[int]:
    """Return up to `size` indices, each chosen greedily as the one that adds the most hypervolume.

    Greedy subset selection is within 1 - 1/e of the best subset (Nemhauser et al. 1978: hypervolume is submodular).
    Points that add nothing come last, by their first objective.
    """
    points, limit = _points(values), np.asarray(reference, dtype=np.float64)
    adds = (points < limit).all(-1) if len(points) else np.zeros(0, dtype=bool)
    gain = np.where(adds, np.maximum(limit - points, 0).prod(-1), 0.0)
    cells = _all(limit)
    chosen: list[int] = []
    while adds.any() and len(chosen) < size:
        best = int(np.argmax(np.where(adds, gain, -np.inf)))
        chosen.append(best)
        taken, cells = _carve(cells, points[best])
        # By comparison, not by gain > 0: what is left of a gain after many subtractions may be a rounding error.
        adds &= ~(points >= points[best]).all(-1)
        gain[adds] -= _within(taken, points[adds])
    left = sorted(set(range(len(points))) - set(chosen), key=lambda i: (points[i, 0], i))
    return chosen + left[: size - len(chosen)]


@dataclass(frozen=True)
class _Cells:
    """Disjoint boxes, `lower` and `upper` float [k, d]; the lower sides may be infinitely far."""

    lower: Points
    upper: Points


def _all(limit: Points) -> _Cells:
    return _Cells(np.full((1, len(limit)), -np.inf), limit[None])


def _free(points: Points, limit: Points) -> tuple[_Cells, float]:
    """Return the cells below `limit` that no point dominates, and the volume of the others."""
    points = points[(points < limit).all(-1)] if len(points) else points
    cells, volume = _all(limit), 0.0
    if len(points):
        points = np.unique(points[nondominated(points)], axis=0)
        # The largest boxes first: in a poor order, such as by a coordinate, there are up to a hundred times the cells.
        points = points[np.argsort(-(limit - points).prod(-1), kind="stable")]
    for point in points:
        taken, cells = _carve(cells, point)
        volume += float((taken.upper - taken.lower).prod(-1).sum())
    return cells, volume


def _carve(cells: _Cells, point: Points) -> tuple[_Cells, _Cells]:
    """Cut what `point` dominates out of the cells; return it, and what is left, which has more cells than before.

    A cell loses one slab after the other, all that is below the point in the first objective, then in the second ...;
    what remains of it in the end is dominated. (Incremental box decompositions: Lacour et al. 2017, where the cells are
    fewer and the bookkeeping is more.)
    """
    hit = (cells.upper > point).all(-1)
    left = [_Cells(cells.lower[~hit], cells.upper[~hit])]
    lower, upper = cells.lower[hit], cells.upper[hit]
    for objective, value in enumerate(point):
        cut = lower[:, objective] < value
        slab = _Cells(lower[cut], upper[cut])
        slab.upper[:, objective] = value
        left.append(slab)
        lower[cut, objective] = value
    rest = _Cells(np.concatenate([each.lower for each in left]), np.concatenate([each.upper for each in left]))
    return _Cells(lower, upper), rest


def _within(cells: _Cells, points: Points) -> Points:
    """Return float [n]: the volume of the cells that each of the points dominates."""
    found = np.zeros(len(points))
    some = max(1, _MOST // max(len(points), 1))
    for begin in range(0, len(cells.lower) if len(points) else 0, some):
        lower, upper = cells.lower[begin : begin + some], cells.upper[begin : begin + some]
        volumes = np.ones((len(points), len(lower)))
        for objective in range(points.shape[1]):
            sides = upper[:, objective] - np.maximum(lower[:, objective], points[:, objective, None])
            volumes *= np.maximum(sides, 0)
        found += volumes.sum(-1)
    return found
