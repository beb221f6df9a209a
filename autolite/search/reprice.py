"""One search, many targets: the candidates of a run with the prices of another target; no model is loaded.

Quality stays what it was scored to be. What depends on the target (latency, memory, energy, what runs at all) follows
from each plan's shape, and that from the teacher's, which the run remembers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autolite import registry
from autolite.architecture import ModelShape
from autolite.errors import InputError, RunError, TargetError
from autolite.front import Candidate, Front, Interval, Quality, Result, intervals, read_front
from autolite.hardware import LOCAL, load_target
from autolite.inference import MANIFEST
from autolite.limits import Constraints
from autolite.measure import Workload
from autolite.plan import Plan
from autolite.search.choose import point
from autolite.search.prices import Prices, front_on
from autolite.search.settings import parse_limits
from autolite.search.studies import read_trials
from autolite.space import Stage
from autolite.store import FURTHER, TEACHER_SHAPE, TEST, Store, database_of

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial


@dataclass(frozen=True)
class Repriced:
    """A run's candidates on another target.

    Attributes:
        front: with that target's prices, all predicted, among everything that the run confirmed.
        before: the run's own front.
        refused: id of each candidate that cannot run there -> why.
        removed: ids on `front` whose folders the run removed, because they were dominated on its own target.
        promising: plans that were never confirmed, yet dominate a candidate of `front` by the score of an earlier
            stage; with the quality of that stage and without a folder.
    """

    front: Front
    before: Front
    refused: dict[str, str]
    removed: tuple[str, ...]
    promising: tuple[Candidate, ...]


def reprice(
    run: str | Path | Result,
    target: str,
    *,
    workload: str | None = None,
    max_drop: str | float | None = None,
    max_latency: str | float | None = None,
    max_ttft: str | float | None = None,
    min_tokens_per_second: str | float | None = None,
    max_size: str | float | None = None,
    max_memory: str | float | None = None,
    storage: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Repriced:
    """Price and rank everything that a run confirmed for another target, without training or scoring anything.

    Args:
        run: the folder of a run that ended or was interrupted, or what `autolite.search` returned.
        target: a name from `autolite targets`, or the path of a profile.
        workload: what differs from the run's own, "tokens=64,threads=1"; threads are those that the run was asked
            for, else the target's.
        max_drop: in the place of the run's own limit, as in `autolite.search`; so are the other limits.
        max_latency: milliseconds, or text with a unit.
        max_ttft: milliseconds, or text with a unit.
        min_tokens_per_second: a number.
        max_size: bytes, or text with a unit.
        max_memory: bytes, or text with a unit.
        storage: the URL that the run was given; by default the SQLite file in its folder.
        progress: told in words what is done while "local" is measured.

    Raises:
        TargetError: if the target is unknown, has fewer threads than asked for, or can run none of the candidates.
        InputError: for a workload or a limit that cannot be understood, or that do not go together.
        RunError: if there is no such run, it has no study, or nothing in it has been evaluated.
    """
    given = parse_limits(
        max_drop=max_drop,
        max_latency=max_latency,
        max_ttft=max_ttft,
        min_tokens_per_second=min_tokens_per_second,
        max_size=max_size,
        max_memory=max_memory,
    )
    folder = run.path if isinstance(run, Result) else Path(run)
    before = read_front(folder)
    if target != LOCAL:  # a wrong name or file is told first; "local" may have to be measured
        load_target(target)
    record = _read(folder, before, storage)
    begun = record.workload
    asked = Workload.parse(workload, begun) if workload else begun
    if asked.tokens + asked.generated > record.teacher.positions:
        raise InputError(
            f"workload {workload} needs {asked.tokens + asked.generated} positions, but the model has "
            f"{record.teacher.positions}: give fewer with --workload tokens=..."
        )
    profile = load_target(target, asked.threads or None, progress)
    prices = Prices(record.teacher, profile, replace(asked, threads=asked.threads or profile.threads))
    limits = before.constraints.replaced_by(given)
    prices.check(limits)
    return _repriced(folder, before, record, prices, limits)


def _repriced(folder: Path, before: Front, record: _Record, prices: Prices, limits: Constraints) -> Repriced:
    front, refused = front_on(before, record.candidates, prices, limits)
    if len(refused) == len(record.candidates):
        (reason, *_) = sorted(set(refused.values()))
        raise TargetError(
            f"none of the {len(refused)} candidates of {folder} can run on {prices.profile.name}: {reason}. "
            "Search for that target in a folder of its own (--out)"
        )
    chosen = front.candidates
    removed = tuple(c.id for c in chosen if not (folder / c.path / MANIFEST).is_file())
    confirmed = {_untrained(candidate.plan) for candidate in record.candidates}
    promising = tuple(
        one
        for one in _early(record.trials, before, prices, confirmed)
        if not limits.violations(one)
        and (not chosen or any(_dominates(one, other, before.objectives) for other in chosen))
    )
    return Repriced(front, before, refused, removed, promising)


def _early(
    trials: Mapping[Stage, Iterable[FrozenTrial]], before: Front, prices: Prices, known: set[str]
) -> Iterator[Candidate]:
    """Yield the plans of the stages before confirm that are not `known`, each once with its latest score."""
    stages: tuple[Stage, ...] = ("recover", "screen")
    metric, direction = (before.teacher["quality"][key] for key in ("metric", "direction"))
    seen = set(known)
    for stage in stages:
        for trial in trials[stage]:
            plan = Plan.from_json(trial.user_attrs["plan"])
            value, kept = trial.values[0], trial.user_attrs["kept"]
            if (key := _untrained(plan)) in seen:
                continue
            seen.add(key)
            with suppress(TargetError):  # cannot run there: no promise
                yield Candidate(
                    id=plan.digest[:8],
                    path="",
                    plan=plan,
                    quality=Quality(metric, direction, value, value, value, "search"),
                    test=None,
                    kept=Interval(kept, kept, kept),
                    stage=stage,
                    seeds=(plan.seed,),
                    **prices.of(plan, trial.values[2]),
                )


def _untrained(plan: Plan) -> str:
    """Name a plan by what is left without its training, which is another one in each stage."""
    return plan.only(lambda name: not registry.get("technique", name).effort).digest


def _dominates(one: Candidate, other: Candidate, objectives: Sequence[str]) -> bool:
    ours, theirs = point(one, objectives), point(other, objectives)
    return ours != theirs and all(a <= b for a, b in zip(ours, theirs, strict=True))


@dataclass(frozen=True)
class _Record:
    """What a run remembers: its teacher's shape, its workload (threads 0 unless asked for), what it confirmed (and
    what stands in its front), and the trials of each stage."""

    teacher: ModelShape
    workload: Workload
    candidates: tuple[Candidate, ...]
    trials: dict[Stage, list[FrozenTrial]]


def _read(folder: Path, before: Front, storage: str | None) -> _Record:
    url, run = database_of(folder, storage)
    trials = read_trials(url, run)
    store = Store(url, run)
    try:
        tests, further = store.facts(TEST), store.facts(FURTHER)
        shape = store.get(TEACHER_SHAPE)
        begun = store.get("identity", {}).get("workload", "default")
    finally:
        store.close()
    own = replace(Workload(**before.workload), threads=0)
    known = [Candidate.from_json(t.user_attrs["candidate"]) for t in trials["confirm"]]
    shown = [*before, *map(Candidate.from_json, before.nearest_misses)]  # of an interrupted run: of an earlier stage
    candidates = list({c.id: c for c in [*known, *shown]}.values())
    if not candidates:
        raise RunError(f"{folder} has no candidate yet: type its search command again to go on")
    for i, candidate in enumerate(candidates):
        if test := tests.get(TEST + candidate.plan.digest):
            compared = intervals(further.get(FURTHER + candidate.plan.digest, {}))
            candidates[i] = replace(candidate, test=Quality(**test), further=compared)
    return _Record(
        _teacher(folder, candidates) if shape is None else ModelShape.from_json(shape),
        own if begun == "default" else Workload.parse(begun, own),
        tuple(candidates),
        trials,
    )


def _teacher(folder: Path, candidates: Iterable[Candidate]) -> ModelShape:
    """Read the teacher's shape off a candidate that only has other number formats, for a run that did not keep it."""
    for candidate in candidates:
        techniques = [registry.get("technique", step.technique) for step in candidate.plan.steps]
        manifest = folder / candidate.path / MANIFEST
        if all(technique.numeric for technique in techniques) and manifest.is_file():
            found: dict[str, Any] = json.loads(manifest.read_text(encoding="utf-8"))
            return ModelShape.from_json(found["shape"]).without_formats()
    raise RunError(
        f"{folder} was made by an earlier version, which did not keep the shape of the model: type its search command "
        "again with a larger --budget, which adds it"
    )
