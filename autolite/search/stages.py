"""What each stage does with its part of the budget: how many trials, how much training, which plans go on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from autolite.pareto import nondominated, spread_subset
from autolite.search.evaluate import price
from autolite.search.problem import Problem
from autolite.search.progress import Clock
from autolite.search.studies import StageStudy
from autolite.space import Params, Stage

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

RESERVE = 0.05  # of a time budget: scoring the test split and writing
# What each stage may use of the time that is left when it begins.
TIME_SHARES: dict[Stage, float] = {"screen": 0.25, "recover": 0.45, "confirm": 1.0}
UNTRAINED_SCREEN = 0.8  # nothing is trained, so the screen's scores are final and most of the time is its
TRIAL_SHARES: dict[Stage, float] = {"recover": 0.3, "confirm": 0.2}
FINALISTS_SHARE = 0.5  # of the confirm trials; the others are further number formats of the finalists' students


@dataclass(frozen=True)
class Decision:
    """What a stage will do: at most `trials` trials with `effort` training steps each, until `deadline` (active
    seconds; None under a trial budget). Kept in the store, so that a resumed stage goes on with the same."""

    trials: int
    effort: int
    deadline: float | None
    queue: tuple[Params, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self) | {"queue": list(self.queue)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Decision:
        """Rebuild from `to_json`'s form."""
        return cls(**{**data, "queue": tuple(data["queue"])})


def trials_for(stage: Stage, total: int, trains: bool) -> int:
    """Split a budget of `total` trials over the stages; the three numbers add up to `total`."""
    confirm = max(1, round(total * TRIAL_SHARES["confirm"]))
    recover = round((total - confirm) * TRIAL_SHARES["recover"]) if trains else 0
    return {"screen": total - confirm - recover, "recover": recover, "confirm": confirm}[stage]


def decide(stage: Stage, problem: Problem, studies: dict[Stage, StageStudy], clock: Clock) -> Decision:
    """Plan a stage from what the stages before it found and what they cost."""
    space, limits = problem.space, problem.space.stages[stage]
    total = clock.budget.trials
    deadline = _deadline(stage, space.trains, clock)
    if stage == "recover" and not space.trains:
        return Decision(0, 0, deadline)
    count = limits.trials if total is None else trials_for(stage, total, space.trains)
    if stage == "screen":
        return Decision(count, limits.effort, deadline, tuple(space.start[:count]))
    before = studies["recover"].trials() if stage == "confirm" else []
    source = before or studies["screen"].trials()
    wanted = count if stage == "recover" else math.ceil(count * FINALISTS_SHARE)
    chosen = promote(problem, source, wanted, keep_floor=bool(before))
    effort = limits.effort
    if deadline is not None and space.trains and chosen:
        floor = 2 * space.stages["screen"].effort if stage == "recover" else _effort(source)
        chosen, effort = _fit(chosen, deadline - clock.spent, floor, limits.max_effort, formats=stage == "confirm")
    queue = [dict(t.params) for t in chosen]
    if stage == "confirm":
        queue += _formats(problem, queue, count - len(queue))
        count = max(len(queue), 1) if total is None else count
    return Decision(count, effort, deadline, tuple(queue))


def _deadline(stage: Stage, trains: bool, clock: Clock) -> float | None:
    if clock.budget.seconds is None:
        return None
    share = UNTRAINED_SCREEN if stage == "screen" and not trains else TIME_SHARES[stage]
    left = clock.budget.seconds * (1 - RESERVE) - clock.spent
    return clock.spent + max(left, 0.0) * share


def _effort(trials: Sequence[FrozenTrial]) -> int:
    return max((int(t.user_attrs["effort"]) for t in trials), default=0)


def promote(problem: Problem, trials: list[FrozenTrial], count: int, *, keep_floor: bool) -> list[FrozenTrial]:
    """Choose the trials that together dominate the most of (quality, log latency, log size), the best first.

    With `keep_floor` (qualities after recovery), what lies far below the quality asked for counts nothing. Plans that
    differ only in number formats share a student, so each student is chosen once as long as there are others.
    """
    if not trials or count < 1:
        return []
    points = objectives(problem, trials)
    worst = points.max(0) + 1e-6
    if keep_floor:
        drop = problem.settings.constraints.max_drop
        floor = 0.1 if drop is None else max(4 * drop, 0.02)
        worst[0] = min(worst[0], floor)
    worst[1:] = np.maximum(worst[1:], 1e-6)
    order = spread_subset(points, worst.tolist(), len(trials))
    students = [str(trials[i].user_attrs["student"]) for i in order]
    first = [i for place, i in enumerate(order) if students[place] not in students[:place]]
    rest = [i for i in order if i not in first]
    return [trials[i] for i in (first + rest)[:count]]


def objectives(problem: Problem, trials: Sequence[FrozenTrial]) -> np.ndarray:
    """Return [n, 3] to be minimised: quality lost (1 - kept), log latency and log size relative to the baseline's."""
    base = price(problem, problem.teacher.shape)
    latency, size = base["latency_ms"].value, base["size_bytes"].value
    return np.array(
        [
            [1 - t.user_attrs["kept"], math.log(t.user_attrs["latency_ms"] / latency), math.log(t.values[2] / size)]
            for t in trials
        ]
    )


def _fit(
    chosen: list[FrozenTrial], seconds: float, floor: int, ceiling: int, *, formats: bool
) -> tuple[list[FrozenTrial], int]:
    """Drop the last plans until the others can be trained for more than `floor` steps in the time there is."""
    if formats:
        seconds *= 0.75  # the rest scores further number formats of these students
    while True:
        overhead = sum(t.user_attrs["seconds"] - t.user_attrs["train_seconds"] for t in chosen)
        second_a_step = sum(t.user_attrs["train_seconds"] / max(t.user_attrs["effort"], 1) for t in chosen)
        effort = int((seconds - overhead) / max(second_a_step, 1e-6))
        if effort >= 2 * floor or len(chosen) == 1:
            return chosen, max(min(effort, ceiling), floor, 1)
        chosen = chosen[:-1]


def _formats(problem: Problem, queue: list[Params], count: int) -> list[Params]:
    """Choose up to `count` further number formats of the queued plans' students, by predicted latency and size."""
    if count < 1 or not queue:
        return []
    each = math.ceil(count / len(queue))
    chosen: list[list[Params]] = []
    for params in queue:
        own = [params, *problem.space.variants(params)]
        shapes = [problem.shape(problem.space.plan(p, 1, problem.settings.seed)) for p in own]
        prices = [price(problem, shape) for shape in shapes]
        points = np.log([[p["latency_ms"].value, p["size_bytes"].value] for p in prices])
        front = [i for i in np.flatnonzero(nondominated(points)) if i != 0]
        order = spread_subset(points[front], (points.max(0) + 1e-6).tolist(), each) if front else []
        chosen.append([own[front[i]] for i in order])
    in_turn = [options[i] for i in range(each) for options in chosen if i < len(options)]
    return in_turn[:count]
