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
from autolite.search.durations import FEWEST, Durations, Fitted, folder_seconds, scoring_seconds
from autolite.search.evaluate import price
from autolite.search.frontier import first_plans
from autolite.search.outlook import expected
from autolite.search.problem import Problem
from autolite.search.progress import Clock
from autolite.search.promotion import behind, latest, promote
from autolite.search.settings import Budget
from autolite.search.studies import StageStudy, params_of
from autolite.search.timing import seconds_together
from autolite.space import Params, Stage
from autolite.tasks.base import Further

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
OPEN_SHARE = 1 / 3  # of the first rung that trains: plans whose training settings are drawn; the others have defaults
NEWCOMERS_SHARE = 0.5  # of a later rung, at most: plans that are expected to be good, but were not in the rung before
COMPARING = 3  # times as long as scoring the finalists: where they run once more, beside the teacher
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
    source = _source(stage, rung, studies, problem)
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


def _source(stage: Stage, rung: int, studies: dict[Stage, StageStudy], problem: Problem) -> list[FrozenTrial]:
    """The trials that plans are promoted from; none for the screen. A later rung of recovery also has what only
    the screen tried, with what it is expected to keep."""
    if stage == "screen":
        return []
    screened = studies["screen"].trials()
    recovered = latest(studies["recover"].trials()) if rung or stage == "confirm" else []
    if stage == "recover" and recovered:
        allowed = problem.settings.constraints.max_drop or 0.0
        return [*recovered, *expected(problem.space, screened, recovered, allowed)]
    return recovered or screened


def _promoted(stage: Stage, source: list[FrozenTrial], new: int, problem: Problem) -> list[FrozenTrial]:
    """Promote plans for up to `new` trials, of which some are for other settings of training, or number formats."""
    screened = source[0].user_attrs["stage"] == "screen"
    share = FINALISTS_SHARE if stage == "confirm" else 1 - OPEN_SHARE if screened else 1.0
    count = math.ceil(new * share)
    order = promote(problem, source, len(source), keep_floor=not screened)
    if screened:
        return order[:count]
    newcomers = [t for t in order if t.user_attrs["stage"] == "screen"][: int(count * NEWCOMERS_SHARE)]
    return [t for t in order if t.user_attrs["stage"] != "screen" or t in newcomers][:count]


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
        last *= COMPARING if isinstance(problem.task, Further) else 1
        last += seconds_together(problem, problem.space.stages["confirm"].trials)
        left -= min(left / 2, last)
    return clock.spent + max(left, 0.0) * share


def _effort(trials: Sequence[FrozenTrial]) -> int:
    return max((int(t.user_attrs["effort"]) for t in trials), default=0)


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
