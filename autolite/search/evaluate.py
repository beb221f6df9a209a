"""From a plan to numbers: compress, emit, score, price."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autolite.architecture import ModelShape
from autolite.compress import compress
from autolite.front import Interval
from autolite.measure import Measurement
from autolite.plan import Plan
from autolite.search.problem import Problem
from autolite.search.racing import Behind, raced
from autolite.search.scoring import Score, kept, score, scoring_threads
from autolite.techniques.base import Student
from autolite.vocabulary import trimmed


@dataclass(frozen=True)
class Evaluation:
    """What one plan came to at one fidelity. `train_seconds` is the part spent in compression; `seen` are the places of
    the split's examples that were scored, fewer than all if the plan was given up."""

    student: Student
    score: Score
    predicted: dict[str, Measurement]
    files: tuple[Path, ...]
    train_seconds: float
    seen: NDArray[np.int64]


def price(problem: Problem, shape: ModelShape) -> dict[str, Measurement]:
    """Predict latency, size, memory and energy of a shape on the first target, without weights."""
    return problem.prices[0].of_shape(shape)


def kept_on(problem: Problem, scored: Score, split: str) -> Interval:
    """Return the fraction of the teacher's quality that is kept on a whole split."""
    return kept(scored, problem.teacher_score(split), problem.task, problem.settings.seed)


def evaluate(
    problem: Problem,
    plan: Plan,
    split: str,
    folder: Path,
    progress: Callable[[int, int], None],
    behind: Behind | None = None,
    *,
    last: bool = False,
    final: bool = False,
) -> Evaluation:
    """Compress by `plan`, emit the artifact into `folder` and score that artifact on a split: in growing parts until
    it is `behind`, if that is given. The `last` student of its plan is trained no further; of a `final` one, the
    artifact is the fastest of equivalent ones.

    Raises:
        PlanError: if the plan cannot be applied.
    """
    begun = time.monotonic()
    # Plans of the screen are many, and trained for a few steps only.
    trunks = None if split == "screen" else problem.settings.out / "cache" / "trunks"
    context = replace(problem.context, seed=plan.seed, progress=progress, trunks=trunks, last=last)
    student = compress(plan, context, students=problem.settings.out / "students")
    trained = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    files = problem.emit(student, folder, final=final)
    runner = problem.runtime.load(files[0], threads=scoring_threads())
    if student.vocabulary is None:
        examples, pad_id = problem.split(split), problem.context.pad_id
    else:  # in the tokens that the exported tokenizer makes
        tokenizer = trimmed(problem.tokenizer, student.vocabulary)
        examples, pad_id = problem.split(split, problem.data_of(tokenizer)), tokenizer.pad_token_id or 0
    if behind is None:
        scored, seen = score(runner, problem.task, examples, pad_id), np.arange(len(examples))
    else:
        scored, seen = raced(runner, problem.task, examples, pad_id, problem.settings.seed, behind)
    predicted = price(problem, student.shape)
    size = float(sum(f.stat().st_size for f in files))
    predicted["size_bytes"] = replace(predicted["size_bytes"], value=size, low=size, high=size, source="measured")
    return Evaluation(student, scored, predicted, tuple(files), trained - begun, seen)
