"""Finalists in few bits: trained for their number formats where rounding cost them something."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from autolite import formats
from autolite.compress import student_plan, training
from autolite.errors import PlanError
from autolite.plan import Plan, make_step
from autolite.search.evaluate import evaluate, kept_on
from autolite.search.problem import Problem
from autolite.techniques.recover import RecoverConfig

SHARE = 1 / 12  # of a plan's steps of training, which are trained again for its formats
SLOWER = 2.5  # times as long as one of those is a step that rounds all matrices
LOST = 0.003  # of the teacher's quality, by rounding: below that there is nothing to regain


@dataclass(frozen=True)
class Recovered:
    """A plan, now with quantization-aware training if that helped; what of the teacher's quality its student keeps on
    the *search* split in float32, and in its formats before and after that; and seconds of compression."""

    plan: Plan
    whole: float
    rounded: float
    after: float | None = None
    seconds: float = 0.0


def recovered(
    problem: Problem,
    plan: Plan,
    folder: Path,
    progress: Callable[[int, int], None],
    in_time: Callable[[int], int],
) -> Recovered | None:
    """Train a trained plan's student for its formats, if some are of few bits and rounding to them lost something.

    What comes of it is taken if it keeps more on the *search* split: on the others nothing is chosen.

    Args:
        problem: of the search.
        plan: canonical, without such training.
        folder: for artifacts.
        progress: told of training steps.
        in_time: says how many of so many steps there is time for.

    Returns:
        What was found; None if the plan is not of that kind, or there is no time from the beginning.
    """
    student = student_plan(plan)
    few = any(formats.get(form).bits <= RecoverConfig().bits for form in problem.shape(plan).formats)
    wanted = math.ceil(training(plan) * SHARE)
    if student == plan or not few or min(wanted, in_time(wanted)) < 1:
        return None

    def searched(tried: Plan) -> tuple[float, float]:
        found = evaluate(problem, tried, "search", folder, progress, last=True)
        return kept_on(problem, found.score, "search").value, found.train_seconds

    (whole, first), (rounded, second) = searched(student), searched(plan)
    found = Recovered(plan, whole, rounded, None, first + second)
    steps = in_time(wanted) if whole - rounded >= LOST else 0
    if steps < 1:
        return found
    trained = replace(plan, steps=(*plan.steps, make_step("recover", {"steps": steps})))
    try:
        after, third = searched(trained)
    except PlanError:  # a loss that diverges
        return found
    return Recovered(trained if after > rounded else plan, whole, rounded, after, first + second + third)
