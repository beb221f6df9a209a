"""What a trial remembers of its evaluation, in its attributes: the later stages plan by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from autolite.compress import student_plan, training, untrained
from autolite.front import Interval
from autolite.machine import cpu_name
from autolite.plan import Plan
from autolite.search.prices import NEVER
from autolite.space import Stage
from autolite.techniques.distill import DistillConfig, begins_alike
from autolite.techniques.schedules import stable_steps
from autolite.techniques.teacher import Teaching

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial


def of_evaluation(
    stage: Stage, plan: Plan, kept: Interval, examples: int, latency: float, prices: Sequence[float]
) -> dict[str, Any]:
    """Return the attributes that say what was found.

    Args:
        stage: of the trial.
        plan: canonical.
        kept: of the teacher's quality.
        examples: that were scored.
        latency: in milliseconds on the first target, measured or predicted.
        prices: predicted before: latency on the first target, bytes, and the latencies on the others or `NEVER`.
    """
    return {
        "stage": stage,
        "plan": plan.to_json(),
        "plan_digest": plan.digest,
        "recipe": untrained(plan).digest,
        "scored_on": cpu_name(),
        "kept": kept.value,
        "kept_low": kept.low,
        "examples": examples,
        "latency_ms": latency,
        "latency_elsewhere": [None if each == NEVER else each for each in prices[2:]],
        "prices": list(prices),
    }


@dataclass(frozen=True)
class Times:
    """What a trial took in seconds: in all; of that in compression; of that again in running teachers. And a training
    step without these (`a_step`; None if that is not known)."""

    whole: float
    compression: float
    taught: Teaching = field(default_factory=Teaching)
    step: float | None = None


def of_training(
    stage: Stage,
    plan: Plan,
    effort: int,
    times: Times,
    before: Sequence[FrozenTrial],
    beside: Sequence[FrozenTrial],
) -> dict[str, Any]:
    """Return the attributes that say which student a plan has, and what it cost to make. One that was trained before
    cost nothing now, and one that was trained for fewer steps before less.

    Args:
        stage: of the trial.
        plan: canonical.
        effort: training steps.
        times: what the trial took now. What is neither in steps nor in running teachers is work done once.
        before: trials whose training may have been gone on from.
        beside: trials of this stage, which may have the same student.
    """
    student, trunk = student_plan(plan).digest, untrained(student_plan(plan)).digest
    shorter = [t.user_attrs for t in before if t.user_attrs["trunk"] == trunk and t.user_attrs["effort"] < effort]
    resumed = max((each["resumable_steps"] for each in shorter), default=0)
    siblings = [t.user_attrs for t in beside if t.user_attrs["student"] == student]
    seconds = max(0.0, times.compression - times.taught.seconds)
    rate = seconds / max(effort - resumed, 1) if times.step is None else times.step
    costs = [(seconds, effort - resumed, rate)]
    costs += [(each["train_seconds"], each["trained_steps"], each["step_seconds"]) for each in siblings]
    dearest, steps, rate = max(costs)
    return {
        "student": student,
        "trunk": trunk,
        "effort": effort,
        "seconds": times.whole,
        "own_train_seconds": times.compression,
        "taught": [times.taught.batches, times.taught.seconds, times.taught.epoch],
        "train_seconds": dearest,
        "trained_steps": steps,
        "step_seconds": rate,
        "resumable_steps": stable_steps(effort) if stage == "recover" and _is_resumable(plan) else 0,
    }


def _is_resumable(plan: Plan) -> bool:
    """Whether a longer training goes on from what this one leaves."""
    trained = [step.config for step in plan.steps if training(Plan((step,)))]
    return bool(trained) and all(isinstance(each, DistillConfig) and begins_alike(each) for each in trained)


def a_step(marks: Sequence[tuple[float, int]]) -> float | None:
    """Return the seconds that a training step takes, by when so many were done; None if too few were made to say. Where
    a training begins, its number of steps starts again."""
    spans = [(later - before, more - steps) for (before, steps), (later, more) in pairwise(marks) if more > steps]
    seconds, steps = (sum(each) for each in zip(*spans, strict=True)) if spans else (0.0, 0)
    return seconds / steps if steps else None
