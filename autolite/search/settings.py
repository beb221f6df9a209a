"""What the user asked for, checked and in one place before anything is loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autolite.errors import InputError, unknown
from autolite.limits import LIMITS, Constraints
from autolite.store import storage_url
from autolite.tasks.base import Augment, DataSpec
from autolite.tasks.custom import Loss, Metric

if TYPE_CHECKING:
    from autolite.search.samplers import MakeSampler

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_BYTES = {"": 1, "B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class Budget:
    """Wall-clock seconds from the command's start to the front, or a number of trials; one of the two."""

    seconds: float | None = None
    trials: int | None = None

    def __str__(self) -> str:
        if self.trials is not None:
            return f"{self.trials}trials"
        assert self.seconds is not None
        for unit, size in (("h", 3600), ("m", 60)):
            if self.seconds >= size and self.seconds % size == 0:
                return f"{self.seconds / size:.0f}{unit}"
        return f"{self.seconds:g}s"

    def exceeds(self, other: Budget) -> bool:
        """Whether this budget asks for more than `other`, which a run was finished with."""
        if (self.trials is None) != (other.trials is None):
            return True
        return (self.trials or 0, self.seconds or 0) > (other.trials or 0, other.seconds or 0)


def parse_budget(text: str) -> Budget:
    """Read "90s", "15m", "1.5h", "1h30m" or "40trials".

    Raises:
        InputError: naming the value and the forms that are understood.
    """
    clean = text.strip().lower().replace(" ", "")
    trials = re.fullmatch(r"(\d+)trials?", clean)
    if trials and int(trials[1]) > 0:
        return Budget(trials=int(trials[1]))
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", clean)
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if parts and "".join(n + u for n, u in parts) == clean and seconds >= 10:
        return Budget(seconds=seconds)
    raise InputError(f"budget '{text}' is not understood: write a time of at least 10 s (90s, 15m, 1h30m) or 40trials")


def parse_fraction(text: str | float, name: str) -> float:
    """Read "1%", "0.01" or 0.01 as a fraction in [0, 1).

    Raises:
        InputError: naming the option, the value and the range.
    """
    try:
        clean = str(text).strip()
        value = float(clean[:-1]) / 100 if clean.endswith("%") else float(clean)
    except ValueError:
        raise InputError(f"{name} '{text}' is not a number: write 1% or 0.01") from None
    if not 0 <= value < 1:
        raise InputError(f"{name} must be in [0%, 100%), but got '{text}': nothing can meet or violate that")
    return value


OBJECTIVES = ("quality", "latency", "size")


def parse_objectives(names: str | Sequence[str]) -> tuple[str, ...]:
    """Read "quality,size" or a list of names, in the order of `OBJECTIVES`.

    Raises:
        InputError: naming what is unknown, or that quality or what it is traded for is missing.
    """
    given = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    if strange := [name for name in given if name not in OBJECTIVES]:
        raise InputError(unknown("objective", strange[0], OBJECTIVES))
    if "quality" not in given or len(set(given)) < 2:
        raise InputError(f"--objectives '{','.join(given)}': name quality, and latency or size or both")
    return tuple(name for name in OBJECTIVES if name in given)


def parse_targets(names: str | Sequence[str]) -> tuple[str, ...]:
    """Read "pixel8,local" or a list of names.

    Raises:
        InputError: if there is none, one twice, or two profiles of one name.
    """
    given = tuple(name.strip() for name in (names.split(",") if isinstance(names, str) else names))
    if not given or not all(given) or len(set(given)) < len(given):
        raise InputError(f"target '{','.join(given)}' is not understood: name one, or several different ones by comma")
    called = [Path(name).stem for name in given]
    if twice := [name for name in called if called.count(name) > 1]:
        raise InputError(
            f"target '{','.join(given)}': two are called {twice[0]}, and each front is named by its target: rename the "
            "file of one"
        )
    return given


def parse_quantity(text: str | float, name: str, units: dict[str, float]) -> float:
    """Read a positive number with one of `units` behind it.

    Raises:
        InputError: naming the option, the value and the units.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?(?:e[+-]?\d+)?)\s*([a-z]*)", str(text).strip().lower())
    sizes = {unit.lower(): size for unit, size in units.items()}
    if match is None or match[2] not in sizes or float(match[1]) <= 0:
        known = ", ".join(unit for unit in units if unit)
        raise InputError(f"{name} '{text}' is not understood: write a positive number and one of {known}")
    return float(match[1]) * sizes[match[2]]


def parse_bytes(text: str | float, name: str) -> float:
    """Read "6MB", "500kB", "1GiB" or a number of bytes."""
    return parse_quantity(text, name, _BYTES)


def parse_milliseconds(text: str | float, name: str) -> float:
    """Read "5ms", "0.2s" or a number of milliseconds."""
    return parse_quantity(text, name, {"": 1, "ms": 1, "s": 1000, "us": 1e-3})


def parse_rate(text: str | float, name: str) -> float:
    """Read "20" or 20, tokens a second.

    Raises:
        InputError: naming the option and the value.
    """
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise InputError(f"{name} '{text}' is not understood: write a positive number of tokens a second, such as 20")
    return rate


def parse_limits(**given: str | float | None) -> Constraints:
    """Read limits as a user writes them, by the names of their options: max_drop="1%", max_latency="5ms".

    Raises:
        InputError: naming the option and the value that is not understood.
    """
    parsers = {"ms": parse_milliseconds, "bytes": parse_bytes, "tokens/s": parse_rate}
    known = {limit.name: (limit.field, parsers[limit.unit]) for limit in LIMITS} | {
        "max_drop": ("max_drop", parse_fraction)
    }
    found: dict[str, Any] = {}
    for name, text in given.items():
        if text is not None:
            field, parse = known[name]
            found[field] = parse(text, f"--{name.replace('_', '-')}")
    return Constraints(**found)


@dataclass(frozen=True)
class Settings:
    """One search, as asked for. `model` and `data.source` None mean the embedded demo; `loss`, `metric` and `augment`
    are functions of the user's own, `cache_bytes` limits the teacher's outputs kept on disk."""

    target: str
    out: Path
    model: str | None
    data: DataSpec
    task: str
    space: str
    budget: Budget
    constraints: Constraints
    workload: str | None
    runtime: str
    storage: str | None
    seed: int
    device: str
    cache_bytes: int | None = None
    loss: Loss | None = None
    metric: Metric | None = None
    augment: Augment | None = None
    sampler: str | MakeSampler = "additive"
    objectives: tuple[str, ...] = OBJECTIVES
    others: tuple[str, ...] = ()  # targets beside the first, for which plans are searched too
    workers: int = 0  # further processes that this one starts
    seeds: int = 1  # that each finalist is trained with
    measure_on: str | None = None  # address of the device that the finalists are timed on in the end

    @property
    def storage_url(self) -> str:
        """The database's URL; a SQLite file in the run's folder unless the user gave one."""
        return storage_url(self.out, self.storage)

    @property
    def own_functions(self) -> list[str]:
        """The names of the user's functions, which no other process can be given."""
        return [name for name in ("loss", "metric", "augment", "sampler") if callable(getattr(self, name))]

    def to_json(self) -> dict[str, Any]:
        """Return what another process needs to work on the same run, as plain JSON types: all but where the run's
        folder is and what the database is called there. Paths are absolute."""
        return {
            "target": _absolute_target(self.target),
            "model": _absolute(self.model),
            "data": asdict(self.data)
            | {name: _absolute(getattr(self.data, name)) for name in ("source", "unlabelled")},
            "task": self.task,
            "space": self.space,
            "budget": asdict(self.budget),
            "constraints": asdict(self.constraints),
            "workload": self.workload,
            "runtime": self.runtime,
            "seed": self.seed,
            "device": self.device,
            "cache_bytes": self.cache_bytes,
            "objectives": self.objectives,
            "others": [_absolute_target(each) for each in self.others],
            "sampler": self.sampler if isinstance(self.sampler, str) else "additive",
            "seeds": self.seeds,
            "own_functions": self.own_functions,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any], out: Path, storage: str | None) -> Settings:
        """Rebuild from `to_json`'s form, for the run's folder and database as they are called here.

        Raises:
            InputError: if a function of the user's own belongs to it, or a path of it does not exist here.
        """
        given = dict(data)
        if own := given.pop("own_functions"):
            raise InputError(
                f"the run in {out} uses a Python function for its {own[0]}, which another process cannot be given: "
                "only the process that began it can work on it"
            )
        spec = DataSpec(**given["data"])
        needed = [("model", given["model"]), ("data", spec.source), ("unlabelled data", spec.unlabelled)]
        needed += [("target", each) for each in (given["target"], *given["others"])]
        for name, value in needed:
            if value is not None and Path(value).is_absolute() and not Path(value).exists():
                raise InputError(f"the {name} of the run in {out}, {value}, does not exist here: make it available")
        return cls(
            **{
                **given,
                "data": spec,
                "budget": Budget(**given["budget"]),
                "constraints": Constraints(**given["constraints"]),
                "objectives": tuple(given["objectives"]),
                "others": tuple(given["others"]),
                "out": out,
                "storage": storage,
            }
        )


def is_file_of_a_profile(target: str) -> bool:
    """Whether a target is given by the path of its profile, not by its name."""
    return target.endswith((".yaml", ".yml"))


def _absolute_target(target: str) -> str:
    return str(Path(target).expanduser().resolve()) if is_file_of_a_profile(target) else target


def _absolute(source: str | None) -> str | None:
    """Return the absolute path of a file or folder that exists; anything else (a hub name) as it is."""
    path = None if source is None else Path(source).expanduser()
    return str(path.resolve()) if path is not None and path.exists() else source
