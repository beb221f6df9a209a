"""Front: the candidates nothing beats, as data. Reads and writes `front.json`; needs no torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from autolite.errors import InputError, NoCandidateError, RunError
from autolite.files import write_atomically
from autolite.limits import Constraints
from autolite.measure import Measurement, Workload
from autolite.plan import Plan
from autolite.store import storage_errors

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1
MEASURED = ("latency_ms", "p90_ms", "faster", "size_bytes", "memory_bytes", "energy_mj", "ttft_ms", "tokens_per_second")
_LISTS = ("artifacts", "seeds", "kept_of_seeds", "ties")


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


def intervals(known: Mapping[str, Any]) -> dict[str, Interval]:
    """Rebuild intervals by name from plain JSON types."""
    return {name: Interval(**number) for name, number in known.items()}


@dataclass(frozen=True, slots=True)
class Quality:
    """A task's primary metric on one split, with its 95 % bootstrap interval."""

    metric: str
    direction: Literal["maximize", "minimize"]
    value: float
    low: float
    high: float
    split: str


@dataclass(frozen=True)
class Candidate:
    """One compressed model, confirmed: its folder, what was done to it, and what it is worth.

    `ties` are the candidates of the front whose intervals of quality kept overlap with this one's: between them the
    data cannot tell which is better. `seeds` are those that its plan was trained with; if they are several, the plan
    has that of the best student by the *search* split, and `kept_of_seeds` says what each keeps on *selection*.
    `further` is what else its task says of it on *test*, by name.
    """

    id: str
    path: str
    plan: Plan
    quality: Quality
    test: Quality | None
    kept: Interval
    latency_ms: Measurement
    faster: Measurement
    size_bytes: Measurement
    memory_bytes: Measurement
    energy_mj: Measurement
    p90_ms: Measurement | None = None
    ttft_ms: Measurement | None = None
    tokens_per_second: Measurement | None = None
    ties: tuple[str, ...] = ()
    artifacts: tuple[dict[str, Any], ...] = ()
    seeds: tuple[int, ...] = (0,)
    kept_of_seeds: tuple[float, ...] = ()
    stage: str = "confirm"
    further: dict[str, Interval] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the candidate as it stands in `front.json`."""
        data: dict[str, Any] = {"id": self.id, "path": self.path}
        data |= {"plan": self.plan.to_json(), "plan_digest": self.plan.digest}
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name not in ("id", "path", "plan"):
                data[each.name] = asdict(value) if hasattr(value, "__dataclass_fields__") else value
        data["further"] = {name: asdict(number) for name, number in self.further.items()}
        return {**data, **{name: list(getattr(self, name)) for name in _LISTS}}

    def measurements(self) -> list[Measurement]:
        """Return every number that it has."""
        found = (getattr(self, name) for name in MEASURED)
        return [number for number in found if number is not None]

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Candidate:
        """Rebuild a candidate from `to_json`'s form."""
        measured: dict[str, Any] = {name: Measurement(**data[name]) if data[name] else None for name in MEASURED}
        return cls(
            id=data["id"],
            path=data["path"],
            plan=Plan.from_json(data["plan"]),
            quality=Quality(**data["quality"]),
            test=Quality(**data["test"]) if data["test"] else None,
            kept=Interval(**data["kept"]),
            artifacts=tuple(data["artifacts"]),
            seeds=tuple(data["seeds"]),
            kept_of_seeds=tuple(data.get("kept_of_seeds", ())),  # fronts of before have none
            ties=tuple(data["ties"]),
            stage=data["stage"],
            further=intervals(data.get("further", {})),
            **measured,
        )


@dataclass(frozen=True)
class Front:
    """A whole search result: the front, the nearest misses, the teacher and what it was all compared with."""

    model: dict[str, Any]
    task: str
    target: dict[str, Any]
    workload: dict[str, Any]
    baseline: dict[str, Any]
    teacher: dict[str, Any]
    confidence: dict[str, Any]
    constraints: Constraints
    objectives: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    nearest_misses: tuple[dict[str, Any], ...]
    budget: dict[str, Any]
    versions: dict[str, str]
    complete: bool

    def __iter__(self) -> Iterator[Candidate]:
        return iter(self.candidates)

    def __len__(self) -> int:
        return len(self.candidates)

    @property
    def generates(self) -> bool:
        """Whether the candidates are language models."""
        return any(c.ttft_ms is not None for c in self.candidates)

    def to_json(self) -> dict[str, Any]:
        """Return the front in the form of `front.json` (docs/front.schema.json)."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data["objectives"] = list(self.objectives)
        data["constraints"] = asdict(self.constraints)
        data["candidates"] = [c.to_json() for c in self.candidates]
        data["nearest_misses"] = list(self.nearest_misses)
        return {"schema": SCHEMA, **data}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Front:
        """Rebuild a front from `to_json`'s form."""
        if data.get("schema") != SCHEMA:
            raise RunError(f"front.json has schema {data.get('schema')!r}, but this version reads {SCHEMA}")
        plain = {f.name: data[f.name] for f in fields(cls)}
        plain["constraints"] = Constraints(**data["constraints"])
        plain["objectives"] = tuple(data["objectives"])
        plain["candidates"] = tuple(Candidate.from_json(c) for c in data["candidates"])
        plain["nearest_misses"] = tuple(data["nearest_misses"])
        return cls(**plain)

    def to_frame(self) -> pd.DataFrame:
        """Return one row a candidate."""
        import pandas as pd

        rows = [
            {
                "id": c.id,
                "plan": c.plan.describe(),
                c.quality.metric: c.quality.value,
                "test": c.test.value if c.test else None,
                "kept": c.kept.value,
                "latency_ms": c.latency_ms.value,
                "faster": c.faster.value,
                "size_bytes": int(c.size_bytes.value),
                "smaller": self.baseline["size_bytes"]["value"] / c.size_bytes.value,
                "source": c.latency_ms.source,
                **{name: number.value for name, number in c.further.items()},
            }
            for c in self.candidates
        ]
        return pd.DataFrame(rows)


@dataclass(frozen=True)
class Result:
    """What `autolite.search` returns: a run's folder and its front."""

    path: Path

    @cached_property
    def front(self) -> Front:
        """The front, read from `front.json`.

        Raises:
            RunError: if the run has none yet, or it cannot be read.
        """
        return read_front(self.path)

    def pick(
        self,
        max_drop: float | None = None,
        *,
        max_latency_ms: float | None = None,
        max_ttft_ms: float | None = None,
        min_tokens_per_second: float | None = None,
        max_size_bytes: float | None = None,
        by: Literal["latency", "size"] = "latency",
        target: str | None = None,
    ) -> PickedCandidate:
        """Return the fastest (or smallest) candidate that meets the limits.

        Args:
            max_drop: fraction of the teacher's quality that may be lost; the run's own constraints if no limit is
                given at all.
            max_latency_ms: limit in milliseconds.
            max_ttft_ms: limit of the time to a language model's first token, in milliseconds.
            min_tokens_per_second: limit of how fast a language model generates.
            max_size_bytes: limit in bytes.
            by: what to minimise among those that are left.
            target: which of the targets that were searched for; the first by default.

        Raises:
            NoCandidateError: if none meets them; the message names the nearest.
            InputError: for a limit on generation where the run's workload generates nothing.
            RunError: if there is no front for that target.
        """
        front = self.front if target is None else read_front(self.path, target)
        limits = Constraints(
            max_drop=max_drop,
            max_latency_ms=max_latency_ms,
            max_ttft_ms=max_ttft_ms,
            min_tokens_per_second=min_tokens_per_second,
            max_size_bytes=max_size_bytes,
        )
        if limits == Constraints():
            limits = front.constraints
        if not front.candidates:
            raise NoCandidateError(f"the front of {self.path} is empty: see its nearest_misses")
        limits.check_generation(front.generates, Workload(**front.workload))
        good = [c for c in front if not limits.violations(c)]
        if not good:
            nearest = min(front, key=lambda c: sum(limits.violations(c).values()))
            missed = ", ".join(limits.violations(nearest))
            raise NoCandidateError(
                f"no candidate of {self.path} meets {missed}: the nearest, {nearest.id}, keeps "
                f"{nearest.kept.value:.1%} at {nearest.latency_ms.value:.3g} ms{_generation(nearest)} and "
                f"{int(nearest.size_bytes.value):,} bytes; relax the limit or search with a larger --budget"
            )
        if by == "size":
            best = min(good, key=lambda c: (c.size_bytes.value, c.latency_ms.value))
        else:
            best = min(good, key=lambda c: (c.latency_ms.value, c.size_bytes.value))
        return PickedCandidate(best, self.path / best.path)


def _generation(candidate: Candidate) -> str:
    """Say how fast a language model's candidate is; nothing of others."""
    first, rate = candidate.ttft_ms, candidate.tokens_per_second
    if first is None or rate is None:
        return ""
    return f" (first token {first.value:.3g} ms, {rate.value:.3g} tokens/s)"


@dataclass(frozen=True)
class PickedCandidate:
    """A candidate and where its folder is."""

    candidate: Candidate
    folder: Path

    def export(self, out: str | Path, format: Literal["onnx", "ort"] = "onnx") -> Path:
        """Copy the candidate's folder to `out` and return it.

        Args:
            out: where to.
            format: "ort" for ONNX Runtime's own format instead of ONNX, which reduced builds of it load.

        Raises:
            InputError: if `out` exists and is not an empty folder.
            ModelError: if the model cannot be converted.
            RunError: if the candidate's folder is not there any more.
        """
        target = Path(out).expanduser().absolute()
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise InputError(f"{out} exists and is not an empty folder: choose another, or remove it first")
        if not self.folder.is_dir():
            raise RunError(f"the candidate's folder {self.folder} is gone: run the search again to make it anew")
        part = target.with_name(f".{target.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        try:
            with storage_errors(str(out)):
                shutil.copytree(self.folder, part)
                if format == "ort":
                    from autolite.runtime.ortformat import convert_folder

                    convert_folder(part)
                if target.exists():  # it may be where the user's shell is, and is filled then
                    for entry in part.iterdir():
                        entry.replace(target / entry.name)
                else:
                    part.replace(target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return target


def front_file(run: Path, target: str | None = None) -> Path:
    """Return where the front of a run stands, or of one of its further targets (a name, or the path of a profile)."""
    return run / ("front.json" if target is None else f"front-{Path(target).stem}.json")


def read_front(run: Path, target: str | None = None) -> Front:
    """Read the front of a run folder, or that of one of the targets that it was searched for.

    Raises:
        RunError: if there is no such run, it has no front yet or none for `target`, or the file cannot be read.
    """
    file = front_file(run, target)
    if not run.is_dir():
        raise RunError(f"no such run: {run} (a run is the folder that 'autolite search' names when it ends)")
    if target is not None and not file.is_file():
        first = read_front(run)
        if first.target["name"] == Path(target).stem:
            return first
        others = sorted(path.stem.removeprefix("front-") for path in run.glob("front-*.json"))
        raise RunError(
            f"{run} has no front for {target}, only for {', '.join([first.target['name'], *others])}: 'autolite front "
            f"{run} --target {target}' prices for it what was found"
        )
    if not file.is_file():
        raise RunError(f"{run} has no {file.name}: the search has not ended; type the same search command to go on")
    try:
        return Front.from_json(json.loads(file.read_text(encoding="utf-8")))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{file} cannot be read ({error!r}): type the same search command to write it anew") from error


def write_json(path: Path, data: Any) -> None:
    """Write JSON so that `path` is either the old file or the whole new one, even after `kill -9`."""
    write_atomically(path, json.dumps(data, indent=1, allow_nan=False).encode())
