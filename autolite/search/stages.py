"""What each stage does with its part of the budget: how many trials, how much training, which plans go on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from autolite.compress import canonical
from autolite.errors import PlanError
from autolite.pareto import nondominated, spread_subset
from autolite.search.additive import log_lost, tolerated, worst
from autolite.search.durations import FEWEST, Durations, Fitted, folder_seconds, scoring_seconds
from autolite.search.evaluate import price
from autolite.search.frontier import first_plans
from autolite.search.problem import Problem
from autolite.search.progress import Clock
from autolite.search.settings import Budget
from autolite.search.studies import StageStudy, params_of
from autolite.search.timing import seconds_together
from autolite.space import Params, Stage

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

RUNGS: dict[Stage, int] = {"screen": 1, "recover": 2, "confirm": 1}
ROUNDING = 0.1  # of the time for finalists: for what is trained for few bits then
RESERVE = 0.05  # of a time budget: scoring the test split and writing
# What each rung of a stage may use of the time that is left when it begins.
TIME_SHARES: dict[Stage, tuple[float, ...]] = {"screen": (0.25,), "recover": (0.22, 0.3), "confirm": (1.0,)}
FEWER, LONGER = 2, 3  # times fewer plans, and times as long a training, at the next rung
UNTRAINED_SCREEN = 0.8  # nothing is trained, so the screen's scores are final and most of the time is its
TRIAL_SHARES: dict[Stage, float] = {"recover": 0.3, "confirm": 0.2}
UNRUNNABLE = math.log(10.0)  # the log latency of what a further target cannot run: as if ten times the baseline's
RECOVERED = 0.2  # of the quality lost after the first rung of recovery: twice what may be lost in the end
OPEN_SHARE = 1 / 3  # of the first rung that trains: plans whose training settings are drawn; the others have defaults
FINALISTS_SHARE = 0.5  # of the confirm trials; the others are further number formats of the finalists' students


@dataclass(frozen=True)
class Decision:
    """What a rung of a stage will do: until its study has `trials` trials, with `effort` training steps each, or until
    `deadline` (active seconds; None under a trial budget). What is queued has `efforts` of its own, if there are any.
    Kept in the store, so that a resumed rung goes on with the same. `name` is what the queue is called in the study."""

    name: str
    trials: int
    effort: int
    deadline: float | None
    queue: tuple[Params, ...] = ()
    efforts: tuple[int, ...] = ()

    def effort_at(self, place: int | None) -> int:
        """Return the training steps of a trial by its place in the queue; None if it is not from there: of a plan whose
        size is not known, the fewest."""
        return self.effort if place is None or not self.efforts else self.efforts[place]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self) | {"queue": list(self.queue), "efforts": list(self.efforts)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Decision:
        """Rebuild from `to_json`'s form."""
        return cls(**{**data, "queue": tuple(data["queue"]), "efforts": tuple(data["efforts"])})


def trials_for(stage: Stage, total: int, trains: bool) -> int:
    """Split a budget of `total` trials over the stages; the three numbers add up to `total`."""
    confirm = max(1, round(total * TRIAL_SHARES["confirm"]))
    recover = round((total - confirm) * TRIAL_SHARES["recover"]) if trains else 0
    return {"screen": total - confirm - recover, "recover": recover, "confirm": confirm}[stage]


def trials_at(stage: Stage, rung: int, count: int, budget: Budget) -> int:
    """Return how many of a stage's trials are of this rung; under a budget of trials they add up to `count`."""
    if stage != "recover":
        return count
    if budget.trials is None:
        return math.ceil(count / (FEWER if rung else 1))
    last = count // (FEWER + 1)
    return last if rung else count - last


def decide(
    stage: Stage,
    rung: int,
    problem: Problem,
    studies: dict[Stage, StageStudy],
    clock: Clock,
    durations: Durations,
) -> Decision:
    """Plan a rung of a stage from what was found before and how long that took.

    Under a time budget the number of trials is what is done already and as many more as the space allows: a finished
    run that gets more time tries more, and trains it longer.
    """
    space, limits, budget = problem.space, problem.space.stages[stage], clock.budget
    name = f"{budget} {rung}"
    if stage == "recover" and not space.trains:
        return Decision(name, 0, 0, None)
    count = limits.trials if budget.trials is None else trials_for(stage, budget.trials, space.trains)
    new = trials_at(stage, rung, count, budget)
    source = _source(stage, rung, studies)
    deadline = _deadline(stage, rung, problem, source, clock)
    first = stage == "recover" and rung == 0
    if source:
        effort = max(1, limits.effort // LONGER) if first else limits.effort
        chosen = _promoted(stage, source, new, problem)
        fitted = [(trial, effort) for trial in chosen]
        if deadline is not None and space.trains:
            queued = len(_queue(stage, rung, problem, fitted, new))
            fitted = _fitted(stage, first, problem, source, chosen, queued, deadline - clock.spent, durations)
        queue = _queue(stage, rung, problem, fitted, new)
    else:
        queue = [(params, limits.effort) for params in _first(problem, new)]
    seen = {t.user_attrs["plan_digest"] for t in studies[stage].trials()}

    def is_new(params: Params, effort: int) -> bool:
        # What recovery has the sampler draw settings for is a plan of its own each time.
        drawn = stage == "recover" and params.keys() != space.complete(params).keys()
        return drawn or _digest(problem, params, effort) not in seen

    queue = [each for each in queue if is_new(*each)]
    if budget.trials is None:
        new = (len(queue) if stage == "confirm" else new) + len(seen)
    elif rung:
        new = count
    efforts = tuple(effort for _, effort in queue)
    return Decision(name, new, min(efforts, default=limits.effort), deadline, tuple(each for each, _ in queue), efforts)


def _source(stage: Stage, rung: int, studies: dict[Stage, StageStudy]) -> list[FrozenTrial]:
    """The trials that a rung's plans are promoted from; none for the screen."""
    if stage == "screen":
        return []
    recovered = latest(studies["recover"].trials()) if rung or stage == "confirm" else []
    return recovered or studies["screen"].trials()


def _promoted(stage: Stage, source: list[FrozenTrial], new: int, problem: Problem) -> list[FrozenTrial]:
    """Promote plans for up to `new` trials, of which some are for other settings of training, or number formats."""
    screened = source[0].user_attrs["stage"] == "screen"
    share = FINALISTS_SHARE if stage == "confirm" else 1 - OPEN_SHARE if screened else 1.0
    return promote(problem, source, math.ceil(new * share), keep_floor=not screened)


def _fitted(
    stage: Stage,
    first: bool,
    problem: Problem,
    source: list[FrozenTrial],
    chosen: list[FrozenTrial],
    queued: int,
    seconds: float,
    durations: Durations,
) -> list[Fitted]:
    """Return those of the chosen plans that there is time for, and for how many steps each is trained."""
    space, most = problem.space, problem.space.stages[stage].max_effort
    if first:
        # Some are trained again, with other settings.
        least = 4 * space.stages["screen"].effort
        return durations.fit(chosen, seconds * len(chosen) / queued, lambda trial: least, most)
    # To go on with what is behind in everything would take the time of what is not.
    chosen = [t for place, t in enumerate(chosen) if place < FEWEST or not any(behind(t, each) for each in chosen)]
    if stage == "recover":
        return durations.in_order(durations.fit(chosen, seconds, lambda trial: 2 * _effort([trial]), most))
    # A front of several plans is worth more than training few of them for twice as long. Every candidate has its
    # folder, and the further formats are scored.
    seeds, processes = durations.seeds, durations.processes
    scored = queued * (1 if seeds == 1 else 1 + 2 * seeds) - len(chosen)
    seconds -= (queued * folder_seconds(problem, processes) + scored * scoring_seconds(source)) / processes
    fitted = durations.fit(chosen, seconds * (1 - ROUNDING), lambda trial: _effort([trial]), most)
    if seeds == 1:  # a shorter training than the last would be a step back, and hardly cheaper
        fitted = [(trial, max(steps, _effort([trial]))) for trial, steps in fitted]
    return durations.in_order(fitted)


def behind(trial: FrozenTrial, rival: FrozenTrial) -> bool:
    """Whether a rival is as fast (on every target) and as small, and keeps more than chance may have given it."""
    ours, theirs = trial.user_attrs, rival.user_attrs
    cheaper = all(a <= b for a, b in zip(theirs["prices"], ours["prices"], strict=True))
    return bool(cheaper and theirs["kept_low"] > ours["kept"])


def _queue(stage: Stage, rung: int, problem: Problem, fitted: Sequence[Fitted], new: int) -> list[tuple[Params, int]]:
    """The parameters and the training steps of up to `new` trials: of the promoted plans, and at first of some again,
    with their settings of training left to the sampler; or of further number formats of the finalists' students."""
    found: list[tuple[Params, int]] = [(problem.frontier.settled(params_of(t)), steps) for t, steps in fitted]
    queue = [(problem.space.complete(params), steps) for params, steps in found]
    if stage == "confirm":
        return queue + _formats(problem, queue, new - len(queue))
    return queue if rung else queue + found[: min(new - len(queue), math.ceil(len(queue) / 2))]


def _first(problem: Problem, count: int) -> list[Params]:
    """What a screen begins with: for the additive model the start plans alone, for a sampler that does not know the
    estimates a third of all."""
    few = len(problem.space.start) + 1 if problem.additive else math.ceil(count / 3)
    return first_plans(problem.frontier, min(few, count))


def _digest(problem: Problem, params: Params, effort: int) -> str:
    with suppress(PlanError):
        plan = problem.plan(params, effort)
        return canonical(plan, problem.teacher.shape).digest
    return ""


def latest(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return of the trials of one plan the one that was trained longest."""
    found: dict[str, FrozenTrial] = {}
    for trial in sorted(trials, key=lambda t: int(t.user_attrs["effort"])):
        found[trial.user_attrs["recipe"]] = trial
    return list(found.values())


def _deadline(stage: Stage, rung: int, problem: Problem, source: Sequence[FrozenTrial], clock: Clock) -> float | None:
    """When this stage ends, in active seconds; the test split's scoring is kept free by what scoring costs here."""
    if clock.budget.seconds is None:
        return None
    trains = problem.space.trains
    share = UNTRAINED_SCREEN if stage == "screen" and not trains else TIME_SHARES[stage][rung]
    left = clock.budget.seconds * (1 - RESERVE) - clock.spent
    if stage == "confirm" and source:
        scored = len(problem.split("search" if trains else "screen"))
        finalists = math.ceil(problem.space.stages["confirm"].trials * FINALISTS_SHARE)
        last = finalists * scoring_seconds(source) * len(problem.data.test) / scored
        last += seconds_together(problem, problem.space.stages["confirm"].trials)
        left -= min(left / 2, last)
    return clock.spent + max(left, 0.0) * share


def _effort(trials: Sequence[FrozenTrial]) -> int:
    return max((int(t.user_attrs["effort"]) for t in trials), default=0)


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


def _formats(problem: Problem, queue: list[tuple[Params, int]], count: int) -> list[tuple[Params, int]]:
    """Choose up to `count` further number formats of the queued plans' students, by predicted latency and size."""
    if count < 1 or not queue or problem.space.trains_formats:
        return []
    each = math.ceil(count / len(queue))
    chosen: list[list[tuple[Params, int]]] = []
    for params, steps in queue:
        own, prices = [], []
        for option in (params, *problem.space.variants(params)):
            with suppress(PlanError):  # such as a tied head in another format than its embedding
                prices.append(price(problem, problem.shape(problem.plan(option, 1))))
                own.append((option, steps))
        points = np.log([[p["latency_ms"].value, p["size_bytes"].value] for p in prices])
        front = [i for i in np.flatnonzero(nondominated(points)) if i != 0]
        order = spread_subset(points[front], (points.max(0) + 1e-6).tolist(), each) if front else []
        chosen.append([own[front[i]] for i in order])
    in_turn = [options[i] for i in range(each) for options in chosen if i < len(options)]
    return in_turn[:count]
