"""Dominance, hypervolume and choice among points; all take points to be *minimised*, float [n, objectives]."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Points = NDArray[np.float64]


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

    Exact, by slicing along the last objective (While et al., "A faster algorithm for calculating hypervolume",
    2006); meant for the few hundred points and two to four objectives of a search.
    """
    limit = np.asarray(reference, dtype=np.float64)
    points = _points(values)
    points = points[(points < limit).all(-1)] if len(points) else points
    if not len(points):
        return 0.0
    points = points[nondominated(points)]
    if points.shape[1] == 1:
        return float(limit[0] - points.min())
    points = points[np.argsort(points[:, -1], kind="stable")]
    tops = np.append(points[1:, -1], limit[-1])
    slabs = tops - points[:, -1]
    rest = list(limit[:-1])
    return float(sum(s * hypervolume(points[: i + 1, :-1], rest) for i, s in enumerate(slabs) if s > 0))


def spread_subset(values: ArrayLike, reference: Sequence[float], size: int) -> list[int]:
    """Return up to `size` indices, each chosen greedily as the one that adds the most hypervolume.

    Greedy subset selection is within 1 - 1/e of the best subset (Nemhauser et al. 1978: hypervolume is submodular).
    Points that add nothing come last, by their first objective.
    """
    points = _points(values)
    chosen: list[int] = []
    left = list(range(len(points)))
    volume = 0.0
    while left and len(chosen) < size:
        volumes = [hypervolume(points[[*chosen, i]], reference) for i in left]
        best = int(np.argmax(volumes))
        if volumes[best] <= volume:
            break
        volume = volumes[best]
        chosen.append(left.pop(best))
    left.sort(key=lambda i: (points[i, 0], i))
    return chosen + left[: size - len(chosen)]
