"""What there is time for: what a rung does, whether another trial ends before the deadline, what is to spare."""

from __future__ import annotations

import math
from dataclasses import dataclass

from autolite.compress import student_plan, untrained
from autolite.plan import Plan
from autolite.search.durations import Durations, expected_seconds, folder_seconds, scoring_seconds
from autolite.search.few_bits import SLOWER
from autolite.search.leases import WORKER
from autolite.search.problem import Problem
from autolite.search.progress import Clock
from autolite.search.stages import RUNGS, Decision, decide
from autolite.search.studies import StageStudy
from autolite.space import STAGES, Stage
from autolite.store import Store

SINCE = "checkpoints since"  # the fact with the number of the first trial of recovery whose checkpoints are there


@dataclass(frozen=True)
class Schedule:
    """The plans of one run, by its clock and by what its trials took so far."""

    problem: Problem
    studies: dict[Stage, StageStudy]
    store: Store
    clock: Clock

    def decision(self, stage: Stage, rung: int) -> Decision:
        """Read what a rung decided under this budget, or decide now."""
        key = self._key(stage, rung)
        known = self.store.get(key)
        if known is not None:
            return Decision.from_json(known)
        decision = decide(stage, rung, self.problem, self.studies, self.clock, self.durations(stage))
        self.store.put(key, decision.to_json())
        return Decision.from_json(self.store.get(key))  # as any other process reads it

    def is_over(self, stage: Stage, rung: int) -> bool:
        """Whether the next rung, or the first of the next stage, was decided already: by a process that ended in it."""
        order = [(each, number) for each in STAGES for number in range(RUNGS[each])]
        later = order[order.index((stage, rung)) + 1 :]
        return bool(later) and self.store.get(self._key(*later[0])) is not None

    def _key(self, stage: Stage, rung: int) -> str:
        return f"stage {stage} {self.clock.budget} {rung}"

    def durations(self, stage: Stage) -> Durations:
        """Return how long the plans that were tried will train in a stage."""
        trials = [*self.studies["screen"].trials(), *self.studies["recover"].trials()]
        processes = 1 + len(self.store.leases(WORKER))
        return Durations(trials, int(self.store.get(SINCE, 0)), processes, self.seeds(stage))

    def seeds(self, stage: Stage) -> int:
        """Return with how many seeds a stage trains each plan."""
        return self.problem.settings.seeds if stage == "confirm" else 1

    def another(self, stage: Stage, decision: Decision) -> bool:
        """Whether there is a further trial to begin, and time for it."""
        study = self.studies[stage]
        if len(study.begun()) >= decision.trials:
            return False
        # Under a time budget the later stages only run what was promoted; there is no time to explore any more.
        open_end = decision.deadline is None or stage == "screen" or study.waiting() > 0
        return open_end and self.in_time(stage, decision)

    def is_open(self, stage: Stage, decision: Decision) -> bool:
        """Whether what a dead process left is taken up: before the deadline, for it was in time when it began and goes
        on from its checkpoint. A stage always does one trial, so that a tight budget still ends with a model."""
        return decision.deadline is None or not self.studies[stage].trials() or self.clock.spent <= decision.deadline

    def in_time(self, stage: Stage, decision: Decision) -> bool:
        """Whether the next trial ends before the deadline; a stage always does one."""
        study = self.studies[stage]
        if decision.deadline is None or not study.trials():
            return True
        (place, *_) = [*study.queued(decision.name), None]
        return self.clock.spent + self._expected(stage, decision, place) <= decision.deadline

    def _expected(self, stage: Stage, decision: Decision, place: int | None) -> float:
        return expected_seconds(self.problem, self.studies[stage], decision, self.durations(stage), place)

    def recovery(self, stage: Stage, decision: Decision, plan: Plan, steps: int, step_seconds: float | None) -> int:
        """Return how many of so many steps of training for its formats there is time for, of a plan whose steps without
        rounding take so long (None if it was not trained now): until the deadline, but for what is left to do for the
        plan itself, and for this process's part of what is queued."""
        if decision.deadline is None:
            return steps
        durations, study = self.durations(stage), self.studies[stage]
        if step_seconds is None:
            like = durations.like(untrained(student_plan(plan)).digest)
            step_seconds = math.inf if like is None else float(like.user_attrs["step_seconds"])
        waiting = sum(self._expected(stage, decision, place) for place in study.queued(decision.name))
        last = 2 * scoring_seconds(durations.trials) + folder_seconds(self.problem, durations.processes)
        spare = decision.deadline - self.clock.spent - last - waiting / durations.processes
        return max(0, min(steps, int(spare / (SLOWER * step_seconds))))
