"""Arrays of lists of different lengths, one list after the other."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def starts_of(counts: Ints) -> Ints:
    """Return where each list begins [lists], for their lengths [lists]."""
    found: Ints = counts.cumsum() - counts
    return found


def segments(starts: Ints, counts: Ints) -> tuple[Ints, Ints]:
    """Take some lists, each as often as it is named.

    Args:
        starts: where each begins [lists].
        counts: their lengths [lists].

    Returns:
        Of all items, one list after the other: the number of the list, and the place [items] each.
    """
    owners = np.repeat(np.arange(len(counts)), counts)
    return owners, np.arange(len(owners)) + (starts - starts_of(counts))[owners]


def sums_by(owners: Ints, values: Array, count: int) -> Array:
    """Return the sums [count] of values by their owners [values] each; 0 of none."""
    return np.bincount(owners, values, count).astype(np.float64, copy=False)


def distinct(numbers: Ints) -> tuple[Ints, Ints]:
    """Return the place of one of each kind of equal numbers [kinds], and the kind of each [numbers].

    The kinds are few: looking each number up is as fast as sorting them, and faster if there are few.
    """
    index: dict[int, int] = {}
    kinds = np.array([index.setdefault(number, len(index)) for number in numbers.tolist()], np.int64)
    places = np.empty(len(index), np.int64)
    places[kinds] = np.arange(len(kinds))
    return places, kinds
