"""A profile as plain numbers for so many threads, and the time of a pass as a sum of what each of them governs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from functools import lru_cache

from autolite.errors import TargetError
from autolite.hardware.profile import Number, Profile

CALIBRATED = ("measured", "calibrated")
# Relative uncertainty of the times of models without an architecture map, beside what the profile's numbers have: of
# seven such models the slowest (DeBERTa, whose attention to relative positions nobody counts) took 1.7 times as long as
# was predicted, the others less than 1.4 times.
ESTIMATED = 0.3


@dataclass(frozen=True, slots=True)
class Kernel:
    """Speed of one kernel class on so many threads: FLOPs per microsecond, and its efficiency's half sizes."""

    speed: float
    rows: float
    columns: float
    depth: float


@dataclass(frozen=True)
class Speeds:
    """A profile reduced to plain floats for so many threads; times are in microseconds."""

    kernels: dict[str, Kernel]
    formats: dict[str, tuple[str, ...]]
    sparsity: dict[str, float]  # the time of a product with such zeros, as a part of the dense one's
    elementwise: dict[str, float]  # elements (softmax: rows) per microsecond
    memory: float  # bytes per microsecond
    stall: float
    cache: float
    cache_size: float  # bytes
    dispatch: float
    fixed: float
    correction: float
    watts: float
    sigmas: dict[str, float]  # relative uncertainty of what governs each key of a `Time`
    weak: frozenset[str]  # the keys that rest on a number which was not measured or calibrated


class Time:
    """Microseconds of one pass, by the number of the profile that governs them.

    `kernels` names the kernel class that computes with each format, and `weights` the bytes of each matrix as it
    reads them.
    """

    def __init__(self, speeds: Speeds, kernels: Mapping[str, str], weights: Mapping[str, int]) -> None:
        self.speeds, self.kernels, self.weights = speeds, kernels, weights
        self.parts: dict[str, float] = {}
        # Weights are used in the same order in every call, so that a cache too small for all of them keeps few.
        self.missing = min(1.0, max(0.0, sum(weights.values()) / speeds.cache_size - 1.0))

    def add(self, key: str, microseconds: float) -> None:
        """Add what the number called `key` governs."""
        self.parts[key] = self.parts.get(key, 0.0) + microseconds

    def product(self, kernel: str, m: float, k: int, n: int, weights: float, times: float = 1) -> None:
        """A product [m, k] x [k, n], `times` over, with a second factor of `weights` bytes."""
        speeds = self.speeds
        roof = speeds.kernels[kernel]
        rows, columns, depth = roof.rows / m, roof.columns / n, roof.depth / k
        compute = times * 2.0 * m * k * n / roof.speed
        cached = times * weights * (1.0 - self.missing) / speeds.cache
        streamed = times * weights * self.missing / speeds.memory
        stalled = speeds.stall * streamed if m > 1 else 0.0
        if compute * (1.0 + rows + columns + depth) + stalled >= cached + streamed:
            self.add(f"{kernel}.peak", compute)
            self.add(f"{kernel}.rows", compute * rows)
            self.add(f"{kernel}.columns", compute * columns)
            self.add(f"{kernel}.depth", compute * depth)
            self.add("stall", stalled)
        else:
            self.add("cache", cached)
            self.add("memory", streamed)

    def elements(self, kind: str, count: float) -> None:
        """An elementwise operator on so many elements (softmax: rows)."""
        self.add(kind, count / self.speeds.elementwise[kind])

    def copy(self, nbytes: float) -> None:
        """Reading and writing so many bytes of activations."""
        self.add("cache", nbytes / self.speeds.cache)

    def operators(self, count: float) -> None:
        """Dispatching so many operators."""
        self.add("dispatch", count * self.speeds.dispatch)

    def take_fastest(self, *options: Callable[[Time], None]) -> None:
        """Add what one of these adds, the one that takes the least time."""
        times = [self.empty() for _ in options]
        for add, time in zip(options, times, strict=True):
            add(time)
        self.include(min(times, key=lambda time: time.total))

    def empty(self) -> Time:
        """Return a time of nothing in the same pass."""
        other = copy(self)
        other.parts = {}
        return other

    def include(self, other: Time) -> None:
        """Add all of another time."""
        for key, microseconds in other.parts.items():
            self.add(key, microseconds)

    @property
    def total(self) -> float:
        """Microseconds of the whole pass."""
        return sum(self.parts.values()) * self.speeds.correction


@lru_cache(maxsize=64)
def speeds_of(profile: Profile, threads: int) -> Speeds:
    """Return the speeds of a profile's default unit on so many threads.

    Raises:
        TargetError: if the unit has fewer threads, or lacks a number.
    """
    unit = profile.unit
    if threads > unit.threads:
        raise TargetError(
            f"threads={threads}, but {unit.name} of {profile.name} has {unit.threads}: ask for at most so many"
        )
    if unit.scaling is None or unit.power is None or unit.softmax is None:
        raise TargetError(f"{profile.name}: unit {unit.name} lacks scaling, power or softmax")
    further = (threads - 1) * unit.scaling.value
    used = (1 + further) / unit.threads
    shared = further / (1 + further) * unit.scaling.sigma
    sigmas: dict[str, float] = {}
    weak: set[str] = set()

    def behind(key: str, *numbers: Number, extra: float = 0.0) -> None:
        sigmas[key] = math.hypot(extra, *(number.sigma for number in numbers))
        if any(number.kind not in CALIBRATED for number in numbers):
            weak.add(key)

    kernels = {}
    for name, efficiency in profile.efficiency.items():
        if name in unit.peak:
            speed = unit.peak[name].value * efficiency.fraction.value * used * 1e3
            halves = {part: getattr(efficiency, part) for part in ("rows", "columns", "depth")}
            kernels[name] = Kernel(speed, **{part: number.value for part, number in halves.items()})
            behind(f"{name}.peak", unit.peak[name], efficiency.fraction, extra=shared)
            for part, number in halves.items():
                behind(f"{name}.{part}", number)
    elementwise = {"approximation": unit.elementwise["activation"], **unit.elementwise}
    for kind, number in elementwise.items():
        behind(kind, number, extra=shared)
    behind("softmax", unit.softmax, extra=shared)
    behind("memory", profile.memory.bandwidth)
    behind("stall", profile.memory.bandwidth, profile.memory.stall)
    behind("cache", profile.cache.bandwidth)
    behind("dispatch", profile.dispatch)
    behind("fixed", profile.fixed)
    behind("correction", profile.correction)
    behind("estimated", extra=ESTIMATED)
    behind("watts", profile.idle, unit.power)
    return Speeds(
        kernels=kernels,
        formats=profile.formats,
        sparsity={pattern: number.value for pattern, number in profile.sparsity.items()},
        elementwise={
            "softmax": unit.softmax.value * used,
            **{kind: number.value * used * 1e3 for kind, number in elementwise.items()},
        },
        memory=profile.memory.bandwidth.value * 1e3,
        stall=profile.memory.stall.value,
        cache=profile.cache.bandwidth.value * 1e3,
        cache_size=profile.cache.size.value * 1e6,
        dispatch=profile.dispatch.value,
        fixed=profile.fixed.value,
        correction=profile.correction.value,
        watts=profile.idle.value + (unit.power.value - profile.idle.value) * threads / unit.threads,
        sigmas=sigmas,
        weak=frozenset(weak),
    )
