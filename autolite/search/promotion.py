"""Which plans go on from a rung to the next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from autolite.pareto import spread_subset
from autolite.search.additive import log_lost, tolerated, worst
from autolite.search.evaluate import price
from autolite.search.problem import Problem

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

UNRUNNABLE = math.log(10.0)  # the log latency of what a further target cannot run: as if ten times the baseline's
RECOVERED = 0.2  # of the quality lost after the first rung of recovery: twice what may be lost in the end


def promote(problem: Problem, trials: list[FrozenTrial], count: int, *, keep_floor: bool) -> list[FrozenTrial]:
    """Choose the trials that together dominate the most of (quality, latency, size), in logarithms, the best first.

    What has lost very much counts nothing; with `keep_floor` (qualities after recovery), what lies far below the
    quality asked for. Plans that differ only in number formats share a student, so each student is chosen once as long
    as there are others.
    """
    if not trials or count < 1:
        return []
    points = objectives(problem, trials)
    reference = points.max(0) + 1e-6
    drop = problem.settings.constraints.max_drop
    if keep_floor:
        most = RECOVERED if drop is None else max(8 * drop, 0.04)
    else:
        most = worst(lost(trials), tolerated(problem.space.trains, drop or 0.0))
    reference[0] = min(reference[0], log_lost(most))
    reference[1:] = np.maximum(reference[1:], 1e-6)
    order = spread_subset(points, reference.tolist(), len(trials))
    students = [str(trials[i].user_attrs["student"]) for i in order]
    first = [i for place, i in enumerate(order) if students[place] not in students[:place]]
    rest = [i for i in order if i not in first]
    return [trials[i] for i in (first + rest)[:count]]


def lost(trials: Sequence[FrozenTrial]) -> np.ndarray:
    """Return which part of the teacher's quality each has lost [n]; below 0, what is better than the teacher."""
    return np.array([1 - t.user_attrs["kept"] for t in trials])


def objectives(problem: Problem, trials: Sequence[FrozenTrial]) -> np.ndarray:
    """Return [n, objectives] to be minimised, all logarithms: of the quality lost (`log_lost`), and of latency and size
    relative to the baseline's, those of them that are objectives; and of latency on each further target, if latency is
    one."""
    base = price(problem, problem.teacher.shape)
    latency, size = base["latency_ms"].value, base["size_bytes"].value
    columns = {
        "quality": log_lost(lost(trials)).tolist(),
        "latency": [math.log(t.user_attrs["latency_ms"] / latency) for t in trials],
        "size": [math.log(t.values[2] / size) for t in trials],
    }
    found = [columns[name] for name in problem.settings.objectives]
    for i, prices in enumerate(problem.others if "latency" in problem.settings.objectives else ()):
        whole = prices.of_shape(prices.teacher)["latency_ms"].value
        there = [t.user_attrs["latency_elsewhere"][i] for t in trials]
        found.append([UNRUNNABLE if each is None else math.log(each / whole) for each in there])
    return np.array(found).T


def behind(trial: FrozenTrial, rival: FrozenTrial) -> bool:
    """Whether a rival is as fast (on every target) and as small, and keeps more than chance may have given it."""
    ours, theirs = trial.user_attrs, rival.user_attrs
    cheaper = all(a <= b for a, b in zip(theirs["prices"], ours["prices"], strict=True))
    return bool(cheaper and theirs["kept_low"] > ours["kept"])


def latest(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return of the trials of one plan the one that was trained longest."""
    found: dict[str, FrozenTrial] = {}
    for trial in sorted(trials, key=lambda t: int(t.user_attrs["effort"])):
        found[trial.user_attrs["recipe"]] = trial
    return list(found.values())
