"""What a run leaves: the finalists timed together, the front chosen and scored on the test split, and its folders."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

from autolite.errors import DeviceError
from autolite.front import Candidate, Front, front_file, write_json
from autolite.inference import MANIFEST
from autolite.machine import cpu_name
from autolite.plan import Plan
from autolite.search.choose import blocked, choose
from autolite.search.confirm import confirm
from autolite.search.evaluate import price
from autolite.search.prices import front_on
from autolite.search.problem import Problem, describe_model, versions
from autolite.search.progress import Clock
from autolite.search.promotion import promote
from autolite.search.studies import StageStudy
from autolite.search.tested import tested
from autolite.search.timing import baseline_together, measured_together
from autolite.space import STAGES, Stage
from autolite.store import Store


def write_front(
    problem: Problem,
    studies: dict[Stage, StageStudy],
    store: Store,
    clock: Clock,
    *,
    complete: bool,
    say: Callable[[str], None] = lambda message: None,
) -> None:
    """Choose each target's front among what was confirmed and write it; folders that none of them names go.

    Raises:
        DeviceError: if the finalists could not be timed on their device; the front is written then, with predictions.
    """
    limits, out = problem.settings.constraints, problem.settings.out
    candidates = [Candidate.from_json(t.user_attrs["candidate"]) for t in studies["confirm"].trials()]
    if not candidates and not complete:
        candidates = list(_early(problem, studies))
    away = None
    if complete and problem.times_finalists:
        try:
            candidates = measured_together(problem, candidates, store, say)
        except DeviceError as error:
            away = error
    front, misses = choose(candidates, limits, problem.settings.objectives)
    first = Front(
        model=describe_model(problem),
        task=problem.task.name,
        target={
            "name": problem.profile.name,
            "runtime": problem.runtime.name,
            "unit": problem.profile.default_unit,
            "basis": problem.prices[0].basis(front),
            "measured_on": problem.settings.measure_on if complete and away is None else None,
        },
        workload=asdict(problem.workload),
        baseline=_baseline(problem, candidates, store),
        teacher={"quality": asdict(problem.teacher_quality("selection")), "test": None},
        confidence={
            "level": 0.95,
            "quality": "paired bootstrap over examples",
            "scored_on": ", ".join(sorted({cpu_name(), *_processors(studies)})),
            "latency": "bootstrap over rounds if measured, the profile's uncertainties if predicted",
        },
        constraints=limits,
        objectives=problem.settings.objectives,
        candidates=tuple(front),
        nearest_misses=blocked(misses, limits),
        budget={
            "asked": str(problem.settings.budget),
            "trials": {stage: len(studies[stage].trials()) for stage in STAGES},
        },
        versions=versions(),
        complete=complete,
    )
    fronts = [first, *(front_on(first, candidates, prices, limits)[0] for prices in problem.others)]
    wanted = {c.id: c for found in fronts for c in listed(found)}
    for candidate in wanted.values():
        _make_folder(problem, candidate)
    seen = complete and any(found.candidates for found in fronts)
    for target, found in zip((None, *problem.settings.others), fronts, strict=True):
        scored = tested(problem, found, store) if seen else found
        spent = {**scored.budget, "spent_seconds": round(clock.spent, 1)}
        write_json(front_file(out, target), replace(scored, budget=spent).to_json())
    if complete:  # also what an interruption left, of plans that went no further
        for folder in {*out.glob("candidates/*")} - {out / c.path for c in wanted.values()}:
            shutil.rmtree(folder, ignore_errors=True)
    if away is not None:
        raise DeviceError(
            f"{front_file(out)} has predictions: the same command times the finalists when the device is there ({away})"
        )


def listed(front: Front) -> list[Candidate]:
    """All that a front names a folder of: its candidates and nearest misses."""
    return [*front, *map(Candidate.from_json, front.nearest_misses)]


def _processors(studies: dict[Stage, StageStudy]) -> set[str]:
    """The processors that trials were scored on, for there may have been several workers."""
    named = {t.user_attrs.get("scored_on") for study in studies.values() for t in study.trials()}
    return {name for name in named if name}


def _make_folder(problem: Problem, candidate: Candidate) -> None:
    """Make a confirmed candidate's folder anew if it is gone: dominated then, wanted under other constraints now."""
    if not (problem.settings.out / candidate.path / MANIFEST).is_file():
        confirm(problem, candidate.plan, lambda done, total: None, candidate.stage)


def _early(problem: Problem, studies: dict[Stage, StageStudy]) -> Iterator[Candidate]:
    """Candidates of an interrupted run that confirmed nothing yet: its best plans, with the training they had."""
    stages: tuple[Stage, ...] = ("recover", "screen")
    for stage in stages:
        trials = studies[stage].trials()
        if trials:
            for trial in promote(problem, trials, 3, keep_floor=stage == "recover"):
                plan = Plan.from_json(trial.user_attrs["plan"])
                yield confirm(problem, plan, lambda done, total: None, stage).candidate
            return


def _baseline(problem: Problem, candidates: list[Candidate], store: Store) -> dict[str, Any]:
    """What the candidates are compared with: the teacher's fp32 artifact; measured latency where it was measured."""
    found = price(problem, problem.teacher.shape)
    size = float(sum(f.stat().st_size for f in problem.baseline))
    size_bytes = replace(found["size_bytes"], value=size, low=size, high=size, source="measured")
    latency = found["latency_ms"]
    measured = [c for c in candidates if c.faster.source == "measured"]
    together = baseline_together(problem, store) if measured else None
    if together is not None:
        latency = together
    elif measured:
        # Each candidate was timed beside the baseline; their product is the baseline's own time in that run.
        times = sorted(c.latency_ms.value * c.faster.value for c in measured)
        middle = times[len(times) // 2]
        latency = replace(latency, value=middle, low=times[0], high=times[-1], source="measured")
    return {
        "runtime": problem.runtime_of(problem.baseline[0]).name,
        "latency_ms": latency.to_json(),
        "size_bytes": size_bytes.to_json(),
        "path": problem.baseline[0].relative_to(problem.settings.out).as_posix(),
    }
