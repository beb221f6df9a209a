"""Confirming a plan: train it, write its folder, score the artifact on the selection split, measure or price it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from autolite import export
from autolite.compress import training
from autolite.errors import PlanError
from autolite.front import Candidate
from autolite.hardware import LOCAL
from autolite.hardware.predict import predict_faster
from autolite.plan import Plan
from autolite.search.evaluate import Evaluation, evaluate, kept_on
from autolite.search.few_bits import Recovered, recovered
from autolite.search.problem import Problem, provenance
from autolite.search.scoring import quality
from autolite.search.timing import measured
from autolite.store import storage_errors


@dataclass(frozen=True)
class Confirmed:
    """A candidate, how it was evaluated, and what rounding to few bits did to it, if that was looked at."""

    candidate: Candidate
    evaluation: Evaluation
    rounding: Recovered | None


def confirm(
    problem: Problem,
    plan: Plan,
    progress: Callable[[int, int], None],
    stage: str = "confirm",
    mark: str = "",
    check: Callable[[], None] = lambda: None,
    seeds: int = 1,
    in_time: Callable[[int], int] = lambda steps: 0,
) -> Confirmed:
    """Make a candidate of a plan: its whole folder under `candidates/`, and its entry for the front.

    With several `seeds` the plan is trained with its own and the next ones, and the student that is best on the
    *search* split becomes the candidate, whose `kept_of_seeds` says what each keeps. Where rounding to few bits lost
    something, it is trained for its formats (`recovered`), as far as that is `in_time`.

    The folder appears under its name only when it is complete and `check` raises nothing; until then `mark` keeps it
    apart from that of another process. On a target that is this machine, latency is measured,
    interleaved with the baseline; elsewhere it is predicted, until the finalists are timed together on a device.
    """
    settings = problem.settings
    part = settings.out / "candidates" / f".{plan.digest[:8]}{mark}"
    shutil.rmtree(part, ignore_errors=True)
    tried = _with_seeds(problem, plan, seeds, part, progress) if seeds > 1 and training(plan) else []
    plan = max(tried, key=lambda each: each.searched).plan if tried else plan
    rounding = recovered(problem, plan, part, progress, in_time)
    if rounding is not None:
        plan = rounding.plan
        shutil.rmtree(part, ignore_errors=True)
    name = plan.digest[:8]
    found = evaluate(problem, plan, "selection", part, progress, last=True, final=True)
    seconds = sum(each.seconds for each in tried) + (0.0 if rounding is None else rounding.seconds)
    found = replace(found, train_seconds=found.train_seconds + seconds)
    used = problem.runtime_of(found.files[0])
    numbers = {
        **found.predicted,
        "faster": predict_faster(problem.teacher.shape, found.student.shape, problem.profile, problem.workload),
    }
    if problem.profile.name == LOCAL:
        vocab = min(problem.teacher.shape.vocab, found.student.shape.vocab)
        numbers |= measured(problem, {"candidate": found.files}, vocab)["candidate"]
    files = [file.relative_to(part).as_posix() for file in found.files]
    candidate = Candidate(
        id=name,
        path=f"candidates/{name}",
        plan=plan,
        quality=quality(found.score, problem.task, "selection", settings.seed),
        test=None,
        kept=kept_on(problem, found.score, "selection"),
        latency_ms=numbers["latency_ms"],
        faster=numbers["faster"],
        size_bytes=numbers["size_bytes"],
        memory_bytes=numbers["memory_bytes"],
        energy_mj=numbers["energy_mj"],
        ttft_ms=numbers.get("ttft_ms"),
        tokens_per_second=numbers.get("tokens_per_second"),
        p90_ms=numbers.get("p90_ms"),
        artifacts=({"runtime": used.name, "version": used.version, "files": files},),
        seeds=tuple(each.plan.seed for each in tried) or (plan.seed,),
        kept_of_seeds=tuple(each.selected for each in tried),
        stage=stage,
    )
    with storage_errors(str(part)):
        export.write_candidate(part, found.student, candidate, provenance(problem))
    check()
    final = settings.out / candidate.path
    shutil.rmtree(final, ignore_errors=True)
    part.replace(final)
    return Confirmed(candidate, found, rounding)


@dataclass(frozen=True)
class Seeded:
    """A plan with one of several seeds: what it keeps on the *search* and the *selection* split, and seconds of
    training."""

    plan: Plan
    searched: float
    selected: float
    seconds: float


def _with_seeds(
    problem: Problem, plan: Plan, seeds: int, folder: Path, progress: Callable[[int, int], None]
) -> list[Seeded]:
    """Try a plan with its seed and the next ones, but for those with which it cannot be trained."""
    found, failed = [], None
    for seed in range(plan.seed, plan.seed + seeds):
        try:
            found.append(seeded(problem, replace(plan, seed=seed), folder, progress))
        except PlanError as error:  # a loss that diverges
            failed = error
    shutil.rmtree(folder, ignore_errors=True)
    if failed is not None and not found:
        raise failed
    return found


def seeded(problem: Problem, plan: Plan, folder: Path, progress: Callable[[int, int], None]) -> Seeded:
    """Train a plan with its seed, and score it."""
    found = {split: evaluate(problem, plan, split, folder, progress, last=True) for split in ("search", "selection")}
    fractions = {split: kept_on(problem, each.score, split).value for split, each in found.items()}
    seconds = sum(each.train_seconds for each in found.values())
    return Seeded(plan, fractions["search"], fractions["selection"], seconds)
