"""What recovery is expected to make of plans that only the screen has tried, by what it made of others.

A few steps of training show what is quickly learned, not what is lost for good: a plan without half of the vocabulary
may lose less than others at first, and more in the end. What recovery found of some plans says so of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from autolite.search.additive import CHANCE, log_lost, structural, tolerated, worst
from autolite.search.promotion import lost
from autolite.search.studies import params_of
from autolite.space import Space

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

PAIRS = 8  # plans that both stages tried, without which nothing is expected of others
SHRINKAGE = 0.3  # of the coefficients, of columns with a spread of one


def expected(
    space: Space, screened: Sequence[FrozenTrial], recovered: Sequence[FrozenTrial], allowed: float = 0.0
) -> list[FrozenTrial]:
    """Return the screen's trials of students that recovery has not trained, with what they are expected to keep when it
    has, in the place of what they kept. None, if too few plans were tried by both.

    What is lost after recovery is regressed on what was lost before, latency, size (all logarithms) and the values of
    settings that are the same for all layers (`ridge`). Nobody is expected to lose more than in the screen, or to keep
    more than the best that was recovered; what was ruined there is left out, unless the user `allowed` to lose so much.
    """
    after = {t.user_attrs["recipe"]: t for t in recovered}
    both = [t for t in screened if t.user_attrs["recipe"] in after]
    trained = {t.user_attrs["trunk"] for t in recovered}
    if len(both) < PAIRS:
        return []
    gone = lost(screened)
    most = worst(gone, tolerated(space.trains, allowed))
    others = [
        t for t, each in zip(screened, gone, strict=True) if each <= most and t.user_attrs["trunk"] not in trained
    ]
    if not others:
        return []
    found = lost([after[t.user_attrs["recipe"]] for t in both])
    columns = columns_of(space, [*both, *others])
    logs = ridge(columns[: len(both)], log_lost(found), columns[len(both) :])
    hoped = np.clip(np.exp(logs) - CHANCE, found.min(), np.maximum(lost(others), found.min()))
    return [_with(trial, 1 - float(each)) for trial, each in zip(others, hoped, strict=True)]


def ridge(known: NDArray[np.float64], values: NDArray[np.float64], asked: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return what a linear model predicts [m] at `asked` [m, columns], fitted to `values` [n] at `known` [n, columns].

    Columns are scaled to a spread of one among the known; coefficients are shrunk towards zero, the mean is not (Hoerl
    and Kennard 1970). What does not vary among the known has no coefficient.
    """
    mean, spread, level = known.mean(0), known.std(0), values.mean()
    varied = np.ptp(known, axis=0) > 0  # the spread of equal numbers may be their rounding
    scaled, wanted = ((each[:, varied] - mean[varied]) / spread[varied] for each in (known, asked))
    normal = scaled.T @ scaled + SHRINKAGE * np.eye(int(varied.sum()))
    predicted: NDArray[np.float64] = level + wanted @ np.linalg.solve(normal, scaled.T @ (values - level))
    return predicted


def columns_of(space: Space, trials: Sequence[FrozenTrial]) -> NDArray[np.float64]:
    """Return what is regressed on [trials, columns]: numbers, and each value of each setting as one or zero."""
    numbers = [log_lost(lost(trials)), *np.log([[t.user_attrs["latency_ms"], t.values[2]] for t in trials]).T]
    settings = [structural(space, space.complete(params_of(t))) for t in trials]
    values = sorted({each for row in settings for each in row.items()}, key=str)
    chosen = [[float(row.get(name) == value) for name, value in values] for row in settings]
    return np.column_stack([*numbers, np.array(chosen).reshape(len(trials), -1)])


def _with(trial: FrozenTrial, kept: float) -> FrozenTrial:
    """Return a trial that is expected to keep so much. It puts no other behind itself: that takes more than a
    prediction."""
    found = copy(trial)
    found.user_attrs = {**trial.user_attrs, "kept": kept, "kept_low": 0.0}
    return found
