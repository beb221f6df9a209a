"""A profile as plain numbers for so many threads, and the times of passes as sums of what each of them governs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from autolite.errors import TargetError
from autolite.hardware.blocks import KINDS, Array, Block, Pass
from autolite.hardware.profile import KINDS as SURETY
from autolite.hardware.profile import Kind, Number, Profile

CALIBRATED = ("measured", "calibrated")
# Relative uncertainty of the times of models without an architecture map, beside what the profile's numbers have: of
# seven such models the slowest (DeBERTa, whose attention to relative positions nobody counts) took 1.7 times as long as
# was predicted, the others less than 1.4 times.
ESTIMATED = 0.3
_HALVES = ("rows", "columns", "depth")


@dataclass(frozen=True, eq=False)
class Speeds:
    """A profile reduced to plain numbers for so many threads; times are in microseconds.

    Attributes:
        keys: what the parts of a time are governed by: for each kernel class "<kernel>.peak", ".rows", ".columns" and
            ".depth", and then the rest.
        places: of the kernel classes.
        kernels: FLOPs per microsecond of each, and the half sizes of its efficiency: rows, columns, depth [kernels, 4].
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
        weak_power: whether `watts` rests on a number which was not measured or calibrated.
    """

    keys: tuple[str, ...]
    places: Mapping[str, int]
    kernels: Array
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
    weak_power: bool

    def spread(self, elasticities: Array, models: int, estimated: NDArray[np.bool_]) -> Array:
        """Return the relative uncertainty [times] of what changes with each key by these elasticities [times, keys];
        `models` is how many times enter whose own errors (the correction's) are independent, and `estimated` says of
        each whether they are of models without an architecture map [times]."""
        own = models * (self.own**2 + ESTIMATED**2 * estimated)
        found: Array = np.sqrt((elasticities @ self.groups) ** 2 @ self.variances + own)
        return found

    def is_weak(self, elasticities: Array) -> Array:
        """Return whether anything behind these is uncalibrated [times]."""
        weak = np.array([kind not in CALIBRATED for kind in self.kinds])
        found: Array = ((elasticities != 0) & weak).any(1)
        return found


def times(speeds: Speeds, passes: Sequence[Pass], weights: Array) -> Array:
    """Return the microseconds of passes by what governs them [passes, keys of `speeds`]; times `correction`, they add
    up to the time of a pass.

    Args:
        speeds: of the target.
        passes: what is computed.
        weights: bytes of all matrices that the kernels of each read [passes].
    """
    # Weights are used in the same order in every call, so that a cache too small for all of them keeps few.
    missing = np.clip(weights / speeds.cache_size - 1.0, 0.0, 1.0)
    index: dict[Block, int] = {}

    def places(blocks: Iterable[Block]) -> list[int]:
        return [index.setdefault(block, len(index)) for block in blocks]

    common = [places(each.blocks) for each in passes]
    either = [(row, places(each.either)) for row, each in enumerate(passes) if each.either]
    counts = np.array([len(each) for each in common])
    used = np.fromiter(chain(*common, *(each for _, each in either)), np.int64)
    owners = np.concatenate([np.repeat(np.arange(len(passes)), counts), *(np.full(len(e), row) for row, e in either)])
    table = _blocks(speeds, list(index), used, missing[owners])
    found: Array = np.add.reduceat(table[: counts.sum()], np.cumsum([0, *counts[:-1]]))
    begin, totals = int(counts.sum()), table.sum(1)
    for row, options in either:
        found[row] += table[begin + int(np.argmin(totals[begin : begin + len(options)]))]
        begin += len(options)
    return found


def _blocks(speeds: Speeds, blocks: Sequence[Block], used: NDArray[np.int64], missing: Array) -> Array:
    """Microseconds [uses, keys] of the blocks that are `used` [uses], if so much of the weights is not in the cache
    [uses]."""
    found: Array = (np.stack([block.counts for block in blocks]) @ speeds.units)[used]
    sizes = np.array([len(block.kernels) for block in blocks])
    starts, many = np.cumsum(sizes) - sizes, sizes[used]
    owners = np.repeat(np.arange(len(used)), many)
    # Of each use the products of its block, one after the other.
    rows = np.arange(len(owners)) - np.repeat(np.cumsum(many) - many, many) + starts[used][owners]
    kernels = np.array([speeds.places[kernel] for block in blocks for kernel in block.kernels], dtype=np.int64)
    m, k, n, nbytes, often = np.concatenate([block.products for block in blocks]).T
    compute = often * 2.0 * m * k * n / speeds.kernels[kernels, 0]
    halves = compute[:, None] * speeds.kernels[kernels, 1:] / np.stack([m, n, k], axis=1)
    work, bytes_read, several = compute + halves.sum(1), often * nbytes, m > 1
    kernels, compute, halves, work, bytes_read, several = (
        each[rows] for each in (kernels, compute, halves, work, bytes_read, several)
    )
    gone = missing[owners]
    cached = bytes_read * (1.0 - gone) / speeds.cache
    streamed = bytes_read * gone / speeds.memory
    stalled = np.where(several, speeds.stall * streamed, 0.0)
    bound = work + stalled >= cached + streamed  # by computing, not by reading

    width = len(speeds.keys)

    def add(columns: NDArray[np.int64] | int, values: Array) -> None:
        np.add.at(found.ravel(), owners * width + columns, values)

    add(4 * kernels, compute * bound)
    for part in range(3):
        add(4 * kernels + 1 + part, halves[:, part] * bound)
    add(speeds.keys.index("stall"), stalled * bound)
    add(speeds.keys.index("cache"), cached * ~bound)
    add(speeds.keys.index("memory"), streamed * ~bound)
    return found


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
    return Speeds(
        keys=tuple(keys),
        places={name: place for place, name in enumerate(kernels)},
        kernels=speeds,
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
        kinds=tuple(SURETY[place] for place in surety),
        weak_power=any(number.kind not in CALIBRATED for number in power),
    )
