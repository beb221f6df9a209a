"""A profile as plain numbers for so many threads, and the times of blocks as sums of what each of them governs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from autolite.errors import TargetError
from autolite.hardware.blocks import KINDS, Block
from autolite.hardware.profile import KINDS as SURETY
from autolite.hardware.profile import Kind, Number, Profile
from autolite.hardware.segments import Array, Bools, Ints, segments, starts_of, sums_by

CALIBRATED = ("measured", "calibrated")
# Relative uncertainty of the times of models without an architecture map, beside what the profile's numbers have: of
# seven such models the slowest (DeBERTa, whose attention to relative positions nobody counts) took 1.7 times as long as
# was predicted, the others less than 1.4 times.
ESTIMATED = 0.3
_HALVES = ("rows", "columns", "depth")
# The terms of a product's times: its kernel's peak and half sizes, and keys of all kernels.
TERMS = ("peak", *_HALVES, "stall", "cache", "memory")
_STALL, _CACHE, _MEMORY = (TERMS.index(key) for key in ("stall", "cache", "memory"))


@dataclass(frozen=True, eq=False)
class Speeds:
    """A profile reduced to plain numbers for so many threads; times are in microseconds.

    Attributes:
        keys: what the parts of a time are governed by: for each kernel class "<kernel>.peak", ".rows", ".columns" and
            ".depth", and then the rest.
        places: of the kernel classes.
        kernels: FLOPs per microsecond of each, and the half sizes of its efficiency: rows, columns, depth [kernels, 4].
        terms: the places in `keys` of what governs a product, in the order of `TERMS` [kernels, terms].
        units: microseconds that each of `KINDS` adds to each key [kinds, keys].
        formats: the kernel classes that can run each number format.
        sparsity: the time of a product with such zeros, as a part of the dense one's.
        memory: bytes per microsecond.
        stall: as a multiple of that time.
        cache: bytes per microsecond.
        cache_size: bytes.
        correction: of all times.
        watts: under load.
        groups: which keys one number governs together [keys, groups].
        variances: of these numbers, relative [groups].
        own: the same of the correction.
        power: relative uncertainty of `watts`.
        kinds: the least sure kind of the numbers behind each key.
        weak: whether one of these is not measured or calibrated [keys].
        weak_power: whether `watts` rests on a number which was not measured or calibrated.
    """

    keys: tuple[str, ...]
    places: Mapping[str, int]
    kernels: Array
    terms: Ints
    units: Array
    formats: Mapping[str, tuple[str, ...]]
    sparsity: Mapping[str, float]
    memory: float
    stall: float
    cache: float
    cache_size: float
    correction: float
    watts: float
    groups: Array
    variances: Array
    own: float
    power: float
    kinds: tuple[Kind, ...]
    weak: Bools
    weak_power: bool

    def spread(self, elasticities: Array, models: int, estimated: Bools) -> Array:
        """Return the relative uncertainty [..., times] of what changes with each key by these elasticities
        [..., times, keys]; `models` is how many times enter whose own errors (the correction's) are independent, and
        `estimated` says of each whether they are of models without an architecture map [times]."""
        own = models * (self.own**2 + ESTIMATED**2 * estimated)
        found: Array = np.sqrt((elasticities @ self.groups) ** 2 @ self.variances + own)
        return found

    def is_weak(self, elasticities: Array) -> Bools:
        """Return whether anything behind these is uncalibrated [..., times]."""
        found: Bools = ((elasticities != 0) & self.weak).any(-1)
        return found


@dataclass(frozen=True, eq=False, slots=True)
class Table:
    """Blocks on a target, and their products one block after the other; times are in microseconds.

    A product takes the longer one of two times, by reading [0] and by computing [1], each of which changes linearly
    with the part of the weights that is missing in the cache.

    Attributes:
        speeds: of the target.
        counts: how much of each of `KINDS` the blocks have [blocks, kinds].
        starts: the first product of each [blocks].
        sizes: how many it has [blocks].
        keys: the places of what governs the terms of a product's times [products, terms].
        terms: these terms if nothing is missing [0], and what is added to them if all is [1] [2, 2, products, terms].
        times: their sums [2, 2, products].
    """

    speeds: Speeds
    counts: Array
    starts: Ints
    sizes: Ints
    keys: Ints
    terms: Array
    times: Array

    @classmethod
    def of(cls, speeds: Speeds, blocks: Sequence[Block]) -> Table:
        """Look up what blocks need on a target."""
        kernels = np.array([speeds.places[kernel] for block in blocks for kernel in block.kernels], np.int64)
        m, k, n, nbytes, often = np.concatenate([block.products for block in blocks]).T
        rates = speeds.kernels[kernels]
        nbytes = often * nbytes
        streamed = nbytes / speeds.memory
        terms = np.zeros((2, 2, len(kernels), len(TERMS)))
        (reading, computing), (reading_more, computing_more) = terms
        computing[:, :4] = (often * 2.0 * m * k * n / rates[:, 0])[:, None]
        computing[:, 1:4] *= rates[:, 1:] / np.array([m, n, k]).T
        computing_more[:, _STALL] = (m > 1) * speeds.stall * streamed
        reading[:, _CACHE] = nbytes / speeds.cache
        reading_more[:, _CACHE] = -reading[:, _CACHE]
        reading_more[:, _MEMORY] = streamed
        sizes = np.array([len(block.kernels) for block in blocks], np.int64)
        counts = np.array([block.counts for block in blocks])
        return cls(speeds, counts, starts_of(sizes), sizes, speeds.terms[kernels], terms, terms.sum(3))

    def totals(self, used: Ints, missing: Array) -> Array:
        """Return the times of blocks [uses].

        Args:
            used: which ones [uses].
            missing: the part of the weights that is not in the cache [uses].
        """
        owners, _, _, reading, computing = self._times(used, missing)
        beside = self.counts @ self.speeds.units.sum(1)
        found: Array = beside[used] + sums_by(owners, np.maximum(reading, computing), len(used))
        return found

    def parts(self, used: Ints, missing: Array, sums: Ints, count: int) -> Array:
        """Return `count` sums of the times of blocks, by what governs them [sums, keys of `speeds`].

        Args:
            used: which ones [uses].
            missing: the part of the weights that is not in the cache [uses].
            sums: which of the sums each belongs to [uses].
            count: of the sums.
        """
        owners, products, gone, reading, computing = self._times(used, missing)
        longer = (computing >= reading).astype(np.int64), products
        cached, missing_all = self.terms
        terms = cached[longer] + gone[:, None] * missing_all[longer]
        found = _summed(sums[owners], self.keys[products], terms, (count, len(self.speeds.keys)))
        counts = self.counts[used]
        kinds = np.broadcast_to(np.arange(len(KINDS)), counts.shape)
        return found + _summed(sums, kinds, counts, (count, len(KINDS))) @ self.speeds.units

    def _times(self, used: Ints, missing: Array) -> tuple[Ints, Ints, Array, Array, Array]:
        """Of the products of the blocks that are used: the use, the place, the part of the weights that is missing, and
        the time by reading and by computing [products] each."""
        owners, products = segments(self.starts[used], self.sizes[used])
        gone = missing[owners]
        (reading, computing), (reading_more, computing_more) = self.times
        reading = reading[products] + gone * reading_more[products]
        computing = computing[products] + gone * computing_more[products]
        return owners, products, gone, reading, computing


def _summed(rows: Ints, columns: Ints, values: Array, shape: tuple[int, int]) -> Array:
    """The sums [shape] of values [n, m], each n in a row [n] and each of its m in a column [n, m]."""
    places = rows[:, None] * shape[1] + columns
    return sums_by(places.ravel(), values.ravel(), shape[0] * shape[1]).reshape(shape)


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
    kernels = [name for name in profile.efficiency if name in unit.peak]
    keys = [f"{name}.{part}" for name in kernels for part in ("peak", *_HALVES)]
    keys += [
        "stall",
        "cache",
        "memory",
        "activation",
        "approximation",
        "normalization",
        "softmax",
        "dispatch",
        "around",
        "fixed",
    ]
    speeds = np.array(
        [
            (
                unit.peak[name].value * profile.efficiency[name].fraction.value * used * 1e3,
                *(getattr(profile.efficiency[name], part).value for part in _HALVES),
            )
            for name in kernels
        ]
    )
    elementwise = {"approximation": unit.elementwise["activation"], **unit.elementwise}
    costs: dict[str, tuple[str, float]] = {
        **{str(kind): (kind, 1 / (number.value * used * 1e3)) for kind, number in elementwise.items()},
        "softmax": ("softmax", 1 / (unit.softmax.value * used)),
        "copy": ("cache", 1 / (profile.cache.bandwidth.value * 1e3)),
        "operators": ("dispatch", profile.dispatch.value),
        "around": ("around", (profile.around or profile.dispatch).value),
        "calls": ("fixed", profile.fixed.value),
    }
    units = np.zeros((len(KINDS), len(keys)))
    for row, kind in enumerate(KINDS):
        key, cost = costs[kind]
        units[row, keys.index(key)] = cost

    # One kernel's peak governs all its parts together; its half sizes govern their own.
    behind: list[tuple[Sequence[str], tuple[Number, ...], float]] = []
    for name in kernels:
        efficiency, parts = profile.efficiency[name], [f"{name}.{part}" for part in ("peak", *_HALVES)]
        behind.append((parts, (unit.peak[name], efficiency.fraction), shared))
        behind += [([f"{name}.{part}"], (getattr(efficiency, part),), 0.0) for part in _HALVES]
    behind += [([kind], (number,), shared) for kind, number in elementwise.items()]
    behind += [
        (["softmax"], (unit.softmax,), shared),
        (["memory"], (profile.memory.bandwidth,), 0.0),
        (["stall"], (profile.memory.bandwidth, profile.memory.stall), 0.0),
        (["cache"], (profile.cache.bandwidth,), 0.0),
        (["fixed"], (profile.fixed,), 0.0),
    ]
    if profile.around is None:
        behind.append((["dispatch", "around"], (profile.dispatch,), 0.0))
    else:
        behind += [(["dispatch"], (profile.dispatch,), 0.0), (["around"], (profile.around,), 0.0)]
    groups, surety = np.zeros((len(keys), len(behind))), np.zeros(len(keys), np.int64)
    variances = np.array([extra**2 + sum(number.sigma**2 for number in numbers) for _, numbers, extra in behind])
    for column, (governed, numbers, _) in enumerate(behind):
        for key in governed:
            groups[keys.index(key), column] = 1.0
            place = keys.index(key)
            surety[place] = max(surety[place], *(SURETY.index(number.kind) for number in numbers))
    power = (profile.idle, unit.power)
    kinds = tuple(SURETY[place] for place in surety)
    shared_terms = [keys.index(key) for key in TERMS[4:]]
    return Speeds(
        keys=tuple(keys),
        places={name: place for place, name in enumerate(kernels)},
        kernels=speeds,
        terms=np.array([[4 * place + part for part in range(4)] + shared_terms for place in range(len(kernels))]),
        units=units,
        formats=profile.formats,
        sparsity={pattern: number.value for pattern, number in profile.sparsity.items()},
        memory=profile.memory.bandwidth.value * 1e3,
        stall=profile.memory.stall.value,
        cache=profile.cache.bandwidth.value * 1e3,
        cache_size=profile.cache.size.value * 1e6,
        correction=profile.correction.value,
        watts=profile.idle.value + (unit.power.value - profile.idle.value) * threads / unit.threads,
        groups=groups,
        variances=variances,
        own=profile.correction.sigma,
        power=math.hypot(*(number.sigma for number in power)),
        kinds=kinds,
        weak=np.array([kind not in CALIBRATED for kind in kinds]),
        weak_power=any(number.kind not in CALIBRATED for number in power),
    )
