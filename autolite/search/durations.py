"""How long trials will take, by how long they took before: compression, scoring, folders and timing, in seconds."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from heapq import heapreplace
from statistics import mean, median
from typing import TYPE_CHECKING

from autolite.compress import canonical, student_plan, untrained
from autolite.errors import PlanError
from autolite.search.problem import Problem
from autolite.search.timing import SECONDS

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from autolite.search.stages import Decision
    from autolite.search.studies import StageStudy

FEWEST = 2


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

    def step(self, trial: FrozenTrial) -> float:
        """Seconds of a training step of a trial's plan; the least that was seen, since whoever trains longer than all
        before waits for the teacher too, once."""
        return min(float(t.user_attrs["step_seconds"]) for t in (trial, *self._alike(trial.user_attrs["trunk"])))

    def once(self, trial: FrozenTrial) -> float:
        """Seconds of compression that more training steps do not add to, such as fitting again what pruning left."""
        recipe = trial.user_attrs["recipe"]
        return max(map(_once, (trial, *(t for t in self.trials if t.user_attrs["recipe"] == recipe))))

    def training(self, trial: FrozenTrial, steps: int) -> float:
        """Seconds that training a trial's plan for so many steps in all takes."""
        step, once = self.step(trial), self.once(trial)
        spared = once + step * trial.user_attrs["resumable_steps"] if self.goes_on(trial) else 0.0
        return self.seeds * (once + step * steps) - spared

    def like(self, trunk: str) -> FrozenTrial | None:
        """Return the longest trained trial of a plan that is known by what its trainings have in common."""
        return max(self._alike(trunk), key=lambda t: (self.goes_on(t), t.user_attrs["effort"]), default=None)

    def _alike(self, trunk: str) -> list[FrozenTrial]:
        return [t for t in self.trials if t.user_attrs["trunk"] == trunk]

    def fit(self, chosen: list[FrozenTrial], seconds: float, least: int, most: int) -> tuple[list[FrozenTrial], int]:
        """Drop the last plans until the others can be trained for `least` steps in the time there is, but keep two:
        what looks best now may not stay so. Returns the plans, and for how many steps."""
        while True:
            effort = bisect_right(range(1, most + 1), seconds, key=partial(self._end, chosen))
            if effort >= least or len(chosen) <= FEWEST:
                return chosen, max(effort, 1)
            chosen = chosen[:-1]

    def in_order(self, chosen: list[FrozenTrial], steps: int) -> list[FrozenTrial]:
        """Return plans as they were, or if several processes train, those that take longest first: they end together
        then."""
        return chosen if self.processes == 1 else sorted(chosen, key=lambda t: -self.training(t, steps))

    def _end(self, chosen: list[FrozenTrial], steps: int) -> float:
        scoring = scoring_seconds(chosen)
        return makespan([self.training(t, steps) + scoring for t in chosen], self.processes)


def makespan(seconds: Sequence[float], processes: int) -> float:
    """Return when the last of several processes ends, if whoever is free begins what takes longest (Graham 1969)."""
    ends = [0.0] * processes
    for each in sorted(seconds, reverse=True):
        heapreplace(ends, ends[0] + each)
    return max(ends)


def expected_seconds(problem: Problem, study: StageStudy, decision: Decision, durations: Durations) -> float:
    """What the next trial of a stage will cost: only scoring, if its student is trained already; by what its plan took
    before, if that was tried; else by the last trials."""
    done = study.trials()
    if not done:
        return 0.0
    scoring = scoring_seconds(done[-5:])
    place = study.next_in_queue(decision.name)
    if place is not None:
        try:
            plan = canonical(problem.plan(decision.queue[place], decision.effort), problem.teacher.shape)
        except PlanError:  # it will be told as refused
            return 0.0
        student = student_plan(plan)
        if any(t.user_attrs["student"] == student.digest for t in done):
            return scoring
        known = durations.like(untrained(student).digest)
        if known is not None:
            return scoring + durations.training(known, decision.effort)
    trained = [t for t in done if t.user_attrs["own_train_seconds"] > 0.1][-5:]
    if not trained:
        return scoring
    step, once = mean(t.user_attrs["step_seconds"] for t in trained), mean(map(_once, trained))
    return float(scoring + once + decision.effort * step)


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
    return 3.0 + (2 * SECONDS * processes if problem.profile.name == "local" else 0.0)


def _once(trial: FrozenTrial) -> float:
    attributes = trial.user_attrs
    return max(0.0, float(attributes["train_seconds"] - attributes["trained_steps"] * attributes["step_seconds"]))
