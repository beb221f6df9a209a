"""The schema of a hardware profile: what a device can do, in numbers that each say where they come from."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from autolite.errors import unknown

Kind = Literal["measured", "calibrated", "derived", "datasheet", "assumed"]
KINDS: tuple[Kind, ...] = get_args(Kind)  # the surest first
# The parts of a number in short form, in order.
SHORT = ("value", "unit", "kind", "source", "date", "sigma")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Number(_Strict):
    """A value with its unit, its provenance and how far it may be off.

    Args:
        value: zero or more, in `unit`.
        unit: as the field of the profile demands it.
        kind: measured (on the device), calibrated (fitted to measurements), derived (computed from other numbers),
            datasheet (the maker's claim) or assumed.
        source: where it can be read again, or how it was obtained.
        date: when it was read or measured.
        sigma: relative standard uncertainty; 0.1 means that the truth is within about +-10 % two times out of three.

    In YAML a list in this order serves too: `[151, GFLOPS, measured, "who, where", 2024-07-06, 0.05]`.
    """

    value: float = Field(ge=0, allow_inf_nan=False)
    unit: str
    kind: Kind
    source: str = Field(min_length=1)
    date: datetime.date
    sigma: float = Field(ge=0, le=3, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _short(cls, data: Any) -> Any:
        if not isinstance(data, list | tuple):
            return data
        if len(data) != len(SHORT):
            raise ValueError(f"a number in short form is [{', '.join(SHORT)}], but this has {len(data)} of the 6 parts")
        return dict(zip(SHORT, data, strict=True))

    def __str__(self) -> str:
        unit = "" if self.unit == "1" else f" {self.unit}"
        return f"{self.value:g}{unit} ({self.kind}, +-{100 * self.sigma:.0f} %)"


def _in(unit: str, positive: bool = True) -> AfterValidator:
    def check(number: Number) -> Number:
        if number.unit != unit:
            raise ValueError(f"the unit here is {unit}, not {number.unit}: convert the value")
        if positive and number.value == 0:
            raise ValueError("must be above 0")
        return number

    return AfterValidator(check)


Gflops = Annotated[Number, _in("GFLOPS")]
GelementsPerSecond = Annotated[Number, _in("Gelem/s")]
GigabytesPerSecond = Annotated[Number, _in("GB/s")]
Gigabytes = Annotated[Number, _in("GB")]
Megabytes = Annotated[Number, _in("MB")]
Microseconds = Annotated[Number, _in("us", positive=False)]
MegarowsPerSecond = Annotated[Number, _in("Mrow/s")]
Watts = Annotated[Number, _in("W", positive=False)]
Ratio = Annotated[Number, _in("1")]
Count = Annotated[Number, _in("1", positive=False)]


def _listed(data: Any) -> Any:
    return (data,) if isinstance(data, str) else data


Kernels = Annotated[tuple[str, ...], BeforeValidator(_listed), Field(min_length=1)]


class ComputeUnit(_Strict):
    """A processor, or a cluster of equal cores, that a model runs on.

    Args:
        name: "big", "cpu", ...
        threads: number of its cores, and of the threads that a workload has unless it says otherwise.
        peak: dense GFLOPS (for integers, GOPS) of all cores together, for each kernel class; one multiply-add is two.
        elementwise: elements a second of all cores, for "activation" (Gelu), "approximation" (Gelu by tanh, which
            8-bit products take; as "activation" if not given) and "normalization".
        softmax: rows a second of all cores, a row being one query of one head.
        scaling: what each thread after the first adds, as a fraction of one core; t threads reach
            peak / cores * (1 + (t - 1) * scaling).
        power: watts under load, all cores, memory included.
        unavailable: why no model can run here; empty if one can.
    """

    name: str
    threads: int = Field(ge=1)
    peak: dict[str, Gflops] = {}
    elementwise: dict[Literal["activation", "approximation", "normalization"], GelementsPerSecond] = {}
    softmax: MegarowsPerSecond | None = None
    scaling: Ratio | None = None
    power: Watts | None = None
    unavailable: str = ""

    @model_validator(mode="after")
    def _complete(self) -> ComputeUnit:
        if not self.unavailable:
            missing = [f for f in ("peak", "elementwise", "softmax", "scaling", "power") if not getattr(self, f)]
            missing += [f"elementwise.{n}" for n in ("activation", "normalization") if n not in self.elementwise]
            if missing:
                raise ValueError(f"unit {self.name} lacks {missing[0]}: give it, or say why the unit is `unavailable`")
        return self


class Efficiency(_Strict):
    """The part of the peak that a product [m, k] x [k, n] reaches: e = fraction / (1 + rows/m + columns/n + depth/k).

    Each of the three is the size at which that dimension alone halves the rate: few rows do not pay for reading the
    weights, few columns not for reading (or quantizing) the inputs, a short inner dimension not for writing the
    outputs. The kernel class "attention" is the scores and the mixing of one head as one product: m queries, n keys,
    and k twice the width of the head.
    """

    fraction: Ratio
    rows: Count
    columns: Count
    depth: Count


class Memory(_Strict):
    """Main memory.

    Args:
        size: all of it.
        usable: what one program may have of it, if that is known to be less.
        bandwidth: at which a product with one row reads weights that are not in the cache.
        stall: what such weights add to the time of a product with several rows, as a multiple of bytes / bandwidth: 0
            where reading hides behind computing, above 1 where it is even slower than with one row.
    """

    size: Gigabytes
    usable: Gigabytes | None = None
    bandwidth: GigabytesPerSecond
    stall: Count

    @property
    def limit(self) -> float:
        """How many bytes one program may have."""
        return min(number.value for number in (self.usable, self.size) if number is not None) * 1e9


class Cache(_Strict):
    """The last level of cache.

    Args:
        size: the share of it in which a model finds its weights again from call to call.
        bandwidth: at which activations are read and written.
    """

    size: Megabytes
    bandwidth: GigabytesPerSecond


class Profile(_Strict):
    """A device and its runtime in numbers.

    Args:
        name: what `--target` takes.
        description: one line for people.
        runtime: registered name of the runtime that these numbers describe.
        known_as: what the model's name begins with that such a device gives itself; several, if it has several.
        sources: texts that the numbers refer to by YAML anchors; not used otherwise.
        default_unit: name of the unit that models run on.
        units: all processors, the ones that cannot be used included.
        efficiency: for each kernel class.
        formats: number format (`autolite.formats`) -> the kernel classes that can run it, of which the fastest is
            taken; in YAML one name will do for one.
        sparsity: patterns of zeros ("2:4", "90%") that its kernels multiply faster with -> the time of a product with
            such a matrix as a part of the dense one's; empty where zeros take as long as other numbers.
        memory: main memory.
        cache: last-level cache.
        dispatch: cost of one operator whatever its size.
        around: the same of the operators around the layers; as `dispatch` if not given.
        fixed: cost of one call whatever the model.
        idle: watts with nothing to do.
        thermal: what becomes of its speed when it is warm, in words; predictions are for a cool device.
        packing: bytes that the runtime keeps in memory for a byte of matrix weights, beyond the file's own.
        correction: factor on every predicted time; its sigma is what the model of `predict` misses by itself.
    """

    name: str = Field(min_length=1)
    description: str
    runtime: str = "onnxruntime"
    known_as: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    sources: dict[str, str] = {}
    default_unit: str
    units: tuple[ComputeUnit, ...] = Field(min_length=1)
    efficiency: dict[str, Efficiency]
    formats: dict[str, Kernels]
    sparsity: dict[str, Ratio] = {}
    memory: Memory
    cache: Cache
    dispatch: Microseconds
    around: Microseconds | None = None
    fixed: Microseconds
    idle: Watts
    packing: Count
    correction: Ratio
    thermal: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> Profile:
        names = [unit.name for unit in self.units]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two units are called '{twice[0]}': give each a name of its own")
        if self.default_unit not in names:
            raise ValueError(unknown("default_unit", self.default_unit, names))
        if self.unit.unavailable:
            raise ValueError(f"default_unit '{self.default_unit}' is unavailable: {self.unit.unavailable}")
        wanted = [(form, kernel) for form, kernels in self.formats.items() for kernel in kernels]
        for form, kernel in [("fp32", "fp32"), ("attention", "attention"), *wanted]:
            for where, known in ((f"units.{self.default_unit}.peak", self.unit.peak), ("efficiency", self.efficiency)):
                if kernel not in known:
                    raise ValueError(
                        f"formats.{form} is priced as '{kernel}', which {where} does not have: add it there"
                    )
        if "fp32" not in self.formats:
            raise ValueError("formats lacks fp32, which every model needs: add fp32: fp32")
        return self

    @property
    def unit(self) -> ComputeUnit:
        """The default compute unit."""
        return next(unit for unit in self.units if unit.name == self.default_unit)

    @property
    def threads(self) -> int:
        """Threads of the default compute unit: the default of a workload on this target."""
        return self.unit.threads

    @cached_property
    def digest(self) -> str:
        """First 12 hexadecimal digits of the SHA-256 of the profile's JSON."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:12]

    def __hash__(self) -> int:
        return hash(self.digest)

    def numbers(self) -> dict[str, Number]:
        """Return every number of the profile by its path, such as "units.big.peak.fp32"."""
        return dict(_numbers(self, ""))


def _numbers(node: Any, path: str) -> list[tuple[str, Number]]:
    if isinstance(node, Number):
        return [(path, node)]
    if isinstance(node, BaseModel):
        parts: list[tuple[str, Any]] = [(name, getattr(node, name)) for name in type(node).model_fields]
    elif isinstance(node, Mapping):
        parts = list(node.items())
    elif isinstance(node, tuple):
        parts = [(getattr(item, "name", str(i)), item) for i, item in enumerate(node)]
    else:
        return []
    return [found for name, part in parts for found in _numbers(part, f"{path}.{name}".lstrip("."))]


def growth(sigmas: NDArray[np.float64]) -> NDArray[np.float64]:
    """Factors of the 95 % intervals of log-normal quantities of relative uncertainties `sigmas`: value / f to
    value * f."""
    found: NDArray[np.float64] = np.exp(1.96 * np.sqrt(np.log1p(sigmas * sigmas)))
    return found
