"""How long trials will take, by how long they took before: compression, scoring, folders and timing, in seconds."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heapreplace
from statistics import mean, median
from typing import TYPE_CHECKING

import numpy as np

from autolite.compress import canonical, student_plan, untrained
from autolite.errors import PlanError
from autolite.hardware import LOCAL
from autolite.plan import Plan
from autolite.search.problem import Problem
from autolite.search.timing import SECONDS

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from autolite.search.stages import Decision
    from autolite.search.studies import StageStudy

FEWEST = 2
Fitted = tuple["FrozenTrial", int]  # a plan, by a trial of it, and for how many steps it is trained


@dataclass(frozen=True)
class Durations:
    """How long plans that were tried before will train.

    Attributes:
        trials: those of the screen and of recovery.
        since: the number of the first trial of recovery whose checkpoints are still there.
        processes: that train at once, each a whole plan.
        seeds: that each plan is trained with; those beyond the first from the beginning.
    """

    trials: Sequence[FrozenTrial]
    since: int = 0
    processes: int = 1
    seeds: int = 1

    def goes_on(self, trial: FrozenTrial) -> bool:
        """Whether a longer training of this plan begins with what this one left."""
        return trial.user_attrs["stage"] == "recover" and trial.number >= self.since

    def training(self, trial: FrozenTrial, steps: int) -> float:
        """Seconds that training a trial's plan for so many steps in all takes, but for new batches (`teaching`)."""
        return self._begin(trial) + self.seeds * self._step(trial) * steps

    def teaching(self, steps: int) -> float:
        """Seconds of running the teacher that trainings of so many steps need: on the batches that none came to yet."""
        batches, seconds, epoch = self._taught
        there = max((t.user_attrs["effort"] for t in self.trials if self.since == 0 or self.goes_on(t)), default=0)
        return max(0.0, min(self.seeds * steps, epoch) - there) * seconds / max(1.0, batches)

    @cached_property
    def _taught(self) -> tuple[float, float, float]:
        """On how many batches the teacher was run, for how many seconds, and how many an epoch has."""
        taught = np.array([t.user_attrs["taught"] for t in self.trials] or [(0, 0.0, 0)], dtype=float)
        return float(taught[:, 0].sum()), float(taught[:, 1].sum()), float(taught[:, 2].max())

    @cached_property
    def _again(self) -> float:
        """Seconds, in each step of training, of running the teacher where it was run before: what was not kept."""
        batches, seconds, epoch = self._taught
        efforts = [int(t.user_attrs["effort"]) for t in self.trials]
        trained = sum(int(t.user_attrs["trained_steps"]) for t in self.trials if _trained(t))
        needed = min(max(efforts, default=0), epoch)
        return max(0.0, batches - needed) / max(1.0, trained) * seconds / max(1.0, batches)

    def like(self, trunk: str) -> FrozenTrial | None:
        """Return the longest trained trial of a plan that is known by what its trainings have in common."""
        alike = (t for t in self.trials if t.user_attrs["trunk"] == trunk)
        return max(alike, key=lambda t: (self.goes_on(t), t.user_attrs["effort"]), default=None)

    def fit(
        self, chosen: Sequence[FrozenTrial], seconds: float, least: Callable[[FrozenTrial], int], most: int
    ) -> list[Fitted]:
        """Share out the time there is: each plan is trained for as many seconds, but for its `least` steps at least,
        and for `most` at most.

        Equal steps would go where they are dear, to the largest students, which need them least. If there is no time
        for the least, the last plans are dropped, but two are kept: what looks best now may not stay so.
        """
        plans = list(chosen)
        while self._end(self._shared(plans, 0.0, least, most)) > seconds:
            if len(plans) <= FEWEST:
                return self._longest(plans, seconds, lambda trial: 1, most)
            del plans[-1]
        return self._longest(plans, seconds, least, most)

    def in_order(self, fitted: list[Fitted]) -> list[Fitted]:
        """Return plans as they were, or if several processes train, those that take longest first: they end together
        then."""
        return fitted if self.processes == 1 else sorted(fitted, key=lambda each: -self.training(*each))

    def _longest(
        self, plans: Sequence[FrozenTrial], seconds: float, least: Callable[[FrozenTrial], int], most: int
    ) -> list[Fitted]:
        """Share out in equal parts, as large as there is time for."""
        milliseconds = range(1, max(0, math.ceil(1000 * seconds)) + 1)
        part = bisect_right(
            milliseconds, seconds, key=lambda ms: self._end(self._shared(plans, ms / 1000, least, most))
        )
        return self._shared(plans, part / 1000, least, most)

    def _shared(
        self, plans: Sequence[FrozenTrial], part: float, least: Callable[[FrozenTrial], int], most: int
    ) -> list[Fitted]:
        steps = [(part - self._begin(t)) / (self.seeds * max(self._step(t), 1e-9)) for t in plans]
        return [(t, int(min(max(n, least(t), 1), most))) for t, n in zip(plans, steps, strict=True)]

    def _begin(self, trial: FrozenTrial) -> float:
        """Seconds of training a plan that its number of steps adds nothing to; below 0, what earlier steps spare."""
        once, step = self._once(trial), self._step(trial)
        return self.seeds * once - (once + step * trial.user_attrs["resumable_steps"] if self.goes_on(trial) else 0.0)

    def _step(self, trial: FrozenTrial) -> float:
        return float(trial.user_attrs["step_seconds"]) + self._again

    def _once(self, trial: FrozenTrial) -> float:
        """Such as fitting again what pruning left."""
        recipe = trial.user_attrs["recipe"]
        return max(map(_once, (trial, *(t for t in self.trials if t.user_attrs["recipe"] == recipe))))

    def _end(self, fitted: Sequence[Fitted]) -> float:
        if not fitted:
            return 0.0
        scoring = scoring_seconds([trial for trial, _ in fitted])
        training = makespan([self.training(*each) + scoring for each in fitted], self.processes)
        return training + self.teaching(max(steps for _, steps in fitted)) / self.processes


def makespan(seconds: Sequence[float], processes: int) -> float:
    """Return when the last of several processes ends, if whoever is free begins what takes longest (Graham 1969)."""
    ends = [0.0] * processes
    for each in sorted(seconds, reverse=True):
        heapreplace(ends, ends[0] + each)
    return max(ends)


def expected_seconds(
    problem: Problem, study: StageStudy, decision: Decision, durations: Durations, place: int | None
) -> float:
    """What a trial of a stage will cost, the one at this place of its queue or one from no queue: only scoring, if its
    student is trained already; by what its plan took before, if that was tried; else by the last trials."""
    done = study.trials()
    scoring = scoring_seconds(done[-5:]) if done else 0.0
    effort = decision.effort_at(place)
    if place is not None:
        student = _student(problem, decision, place)
        if student is None:  # it will be told as refused
            return 0.0
        if study.stage == "confirm":
            # Further number formats stand behind the student's own in the queue, and wait for it.
            given_up = study.given_up(decision.name)
            before = (_student(problem, decision, i) for i in range(place) if i not in given_up)
            trained = {t.user_attrs["student"] for t in done}
            if student.digest in trained or any(each is not None and each.digest == student.digest for each in before):
                return scoring
        known = durations.like(untrained(student).digest)
        if known is not None:
            return scoring + durations.training(known, effort) + durations.teaching(effort)
    last = [t for t in done if _trained(t)][-5:]
    if not last:
        return scoring
    step, once = mean(t.user_attrs["step_seconds"] for t in last), mean(map(_once, last))
    return float(scoring + once + effort * step)


def _student(problem: Problem, decision: Decision, place: int) -> Plan | None:
    """The plan of the student at a place of a queue; None for what is refused."""
    try:
        plan = problem.plan(decision.queue[place], decision.effort_at(place))
        return student_plan(canonical(plan, problem.teacher.shape))
    except PlanError:
        return None


def scoring_seconds(trials: Sequence[FrozenTrial]) -> float:
    """The median of what trials cost beside training; those that were given up early say little."""
    whole = max(t.user_attrs["examples"] for t in trials)
    return median(
        float(t.user_attrs["seconds"] - t.user_attrs["own_train_seconds"])
        for t in trials
        if t.user_attrs["examples"] == whole
    )


def folder_seconds(problem: Problem, processes: int) -> float:
    """What a confirmed candidate costs beside training and scoring: its folder, and on this machine its timing, for
    which all processes stop."""
    return 3.0 + (2 * SECONDS * processes if problem.profile.name == LOCAL else 0.0)


def _trained(trial: FrozenTrial) -> bool:
    """Whether it was trained in this trial, and not read from the disk."""
    return bool(trial.user_attrs["own_train_seconds"] > 0.1)


def _once(trial: FrozenTrial) -> float:
    attributes = trial.user_attrs
    return max(0.0, float(attributes["train_seconds"] - attributes["trained_steps"] * attributes["step_seconds"]))
