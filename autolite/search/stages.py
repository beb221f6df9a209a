"""What each stage does with its part of the budget: how many trials, how much training, which plans go on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from autolite.compress import canonical, student_plan
from autolite.errors import PlanError
from autolite.hardware.predict import predict
from autolite.pareto import nondominated, spread_subset
from autolite.search.confirm import TIMING_SECONDS
from autolite.search.evaluate import price
from autolite.search.frontier import seeds
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
FEWEST = 2
REFUSED = math.log(10.0)  # the log latency of what a further target cannot run: as if ten times the baseline's
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


def decide(
    stage: Stage, problem: Problem, studies: dict[Stage, StageStudy], clock: Clock, processes: int = 1
) -> Decision:
    """Plan a stage from what the stages before it found and what they cost; `processes` work on it at once.

    Under a time budget the number of trials is what is done already and as many more as the space allows: a finished
    run that gets more time tries more, and trains it longer.
    """
    space, limits = problem.space, problem.space.stages[stage]
    total = clock.budget.trials
    if stage == "recover" and not space.trains:
        return Decision(0, 0, None)
    count = limits.trials if total is None else trials_for(stage, total, space.trains)
    before = studies["recover"].trials() if stage == "confirm" else []
    source = [] if stage == "screen" else before or studies["screen"].trials()
    deadline = _deadline(stage, problem, source, clock)
    wanted = count if stage == "recover" else math.ceil(count * FINALISTS_SHARE)
    chosen = promote(problem, source, wanted, keep_floor=bool(before))
    effort = limits.effort
    if deadline is not None and space.trains and chosen:
        floor = 2 * space.stages["screen"].effort if stage == "recover" else _effort(source)
        seconds = deadline - clock.spent
        if stage == "confirm":  # every candidate has its folder, and the further formats are scored
            scoring = sorted(map(_scoring_seconds, source))[len(source) // 2]
            others = count * _folder_seconds(problem, processes) + (count - len(chosen)) * scoring
            seconds -= others / processes
        chosen, effort = _fit(chosen, seconds, floor, limits.max_effort, processes)
    queue: list[Params] = [dict(t.params) for t in chosen] or seeds(problem.frontier, count)
    if stage == "confirm":
        queue = [space.complete(params) for params in queue]
        queue += _formats(problem, queue, count - len(queue))
    seen = {t.user_attrs["plan_digest"] for t in studies[stage].trials()}
    queue = [params for params in queue if _digest(problem, params, effort) not in seen]
    if total is None:
        count = (len(queue) if stage == "confirm" else count) + len(seen)
    return Decision(count, effort, deadline, tuple(queue))


def _digest(problem: Problem, params: Params, effort: int) -> str:
    with suppress(PlanError):
        plan = problem.plan(params, effort)
        return canonical(plan, problem.teacher.shape).digest
    return ""


def _deadline(stage: Stage, problem: Problem, source: Sequence[FrozenTrial], clock: Clock) -> float | None:
    """When this stage ends, in active seconds; the test split's scoring is kept free by what scoring costs here."""
    if clock.budget.seconds is None:
        return None
    trains = problem.space.trains
    share = UNTRAINED_SCREEN if stage == "screen" and not trains else TIME_SHARES[stage]
    left = clock.budget.seconds * (1 - RESERVE) - clock.spent
    if stage == "confirm" and source:
        overheads = sorted(map(_scoring_seconds, source))
        scored = len(problem.split("search" if trains else "screen"))
        finalists = math.ceil(problem.space.stages["confirm"].trials * FINALISTS_SHARE)
        left -= min(left / 2, finalists * overheads[len(overheads) // 2] * len(problem.data.test) / scored)
    return clock.spent + max(left, 0.0) * share


def _folder_seconds(problem: Problem, processes: int) -> float:
    """What a confirmed candidate costs beside training and scoring: its folder, and on this machine its timing, for
    which all processes stop."""
    return 3.0 + (TIMING_SECONDS * processes if problem.profile.name == "local" else 0.0)


def expected_seconds(problem: Problem, study: StageStudy, decision: Decision, key: str) -> float:
    """What the next trial will cost, by the last ones: only scoring, if its student is trained already."""
    done = study.trials()[-5:]
    if not done:
        return 0.0
    scoring = sum(map(_scoring_seconds, done)) / len(done)
    place = study.next_in_queue(key)
    if place is not None:
        plan = problem.plan(decision.queue[place], decision.effort)
        student = student_plan(canonical(plan, problem.teacher.shape)).digest
        if any(t.user_attrs["student"] == student for t in study.trials()):
            return scoring
    trained = [t.user_attrs["own_train_seconds"] for t in study.trials() if t.user_attrs["own_train_seconds"] > 0.1]
    return float(scoring + sum(trained[-5:]) / max(len(trained[-5:]), 1))


def _scoring_seconds(trial: FrozenTrial) -> float:
    return float(trial.user_attrs["seconds"] - trial.user_attrs["own_train_seconds"])


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
    """Return [n, objectives] to be minimised: quality lost (1 - kept), log latency and log size relative to the
    baseline's, those of them that are objectives; and the log latency on each further target, if latency is one."""
    base = price(problem, problem.teacher.shape)
    latency, size = base["latency_ms"].value, base["size_bytes"].value
    columns = {
        "quality": [1 - t.user_attrs["kept"] for t in trials],
        "latency": [math.log(t.user_attrs["latency_ms"] / latency) for t in trials],
        "size": [math.log(t.values[2] / size) for t in trials],
    }
    found = [columns[name] for name in problem.settings.objectives]
    for i, prices in enumerate(problem.others if "latency" in problem.settings.objectives else ()):
        whole = predict(prices.teacher, prices.profile, prices.workload)["latency_ms"].value
        there = [t.user_attrs["latency_elsewhere"][i] for t in trials]
        found.append([REFUSED if each is None else math.log(each / whole) for each in there])
    return np.array(found).T


def _fit(
    chosen: list[FrozenTrial], seconds: float, floor: int, ceiling: int, processes: int = 1
) -> tuple[list[FrozenTrial], int]:
    """Drop the last plans until the others can be trained for twice `floor` steps in the time there is, but keep two:
    what looks best now may not stay so. Each of several processes trains whole plans, one after the other."""
    while True:
        overhead = sum(map(_scoring_seconds, chosen))
        second_a_step = sum(t.user_attrs["train_seconds"] / max(t.user_attrs["effort"], 1) for t in chosen)
        rounds = math.ceil(len(chosen) / processes)
        effort = int((seconds * len(chosen) / rounds - overhead) / max(second_a_step, 1e-6))
        if effort >= 2 * floor or len(chosen) <= FEWEST:
            return chosen, max(min(effort, ceiling), 1)
        chosen = chosen[:-1]


def _formats(problem: Problem, queue: list[Params], count: int) -> list[Params]:
    """Choose up to `count` further number formats of the queued plans' students, by predicted latency and size."""
    if count < 1 or not queue or problem.space.trains_formats:
        return []
    each = math.ceil(count / len(queue))
    chosen: list[list[Params]] = []
    for params in queue:
        own, prices = [], []
        for option in (params, *problem.space.variants(params)):
            with suppress(PlanError):  # such as a tied head in another format than its embedding
                prices.append(price(problem, problem.shape(problem.plan(option, 1))))
                own.append(option)
        points = np.log([[p["latency_ms"].value, p["size_bytes"].value] for p in prices])
        front = [i for i in np.flatnonzero(nondominated(points)) if i != 0]
        order = spread_subset(points[front], (points.max(0) + 1e-6).tolist(), each) if front else []
        chosen.append([own[front[i]] for i in order])
    in_turn = [options[i] for i in range(each) for options in chosen if i < len(options)]
    return in_turn[:count]
