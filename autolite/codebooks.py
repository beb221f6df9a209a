"""Formats whose levels are not evenly spaced: a value is levels[code] * scale.

Levels are either fitted to the weights by k-means and stored with them, or fixed by the format.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from autolite.linear_grids import Linear, by_column
from autolite.packing import pack, packed_width, unpack

LLOYD_ROUNDS = 6  # later rounds gain less than 0.02 dB on normally distributed weights
_BINS = 2**16  # of a whole matrix's values: 256 for each step of the finest codebook
_NEAR_END = -0.9999  # values below are at the end: bins are a third as wide
_SAMPLED = 1024  # groups that a codebook of a whole matrix is fitted to
_TURNS = 10  # of fitting levels and scales
_ABOVE_MINUS_ONE = -1 + 2**-11  # in float16; only one end of the levels is the largest value's
_CHUNK = 2**18  # values that are searched at a time: a megabyte stays in the cache
_CLIPPING = (1.0, 0.95, 0.9, 0.85, 0.8)  # ends of a group's range that are tried, as parts of its largest magnitude

# 4-bit NormalFloat, the quantiles of a normal distribution with an exact zero (Dettmers et al. 2023, appendix E)
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def powers_of_two(bits: int) -> tuple[float, ...]:
    """Return the levels 0 and +-2^-e, with one more small positive one to fill the codes (after Zhou et al. 2017)."""
    count = 2 ** (bits - 1) - 1
    positive = [2.0**-e for e in range(count + 1)]
    return tuple(sorted([0.0, *positive, *(-each for each in positive[:count])]))


@dataclass(frozen=True)
class KMeans:
    """A format with levels that k-means finds, as fractions (float16) of the largest magnitude of a row or group.

    Attributes:
        bits: of a code.
        whole: one codebook for the whole matrix; else one for each row.
        group: inputs (columns) that share a scale (bfloat16), 0 for all of a row (float32).
    """

    bits: int
    whole: bool = False
    group: int = 0

    linear = False

    @property
    def shared(self) -> tuple[str, ...]:
        """Names of the stored tensors that are not by row."""
        return ("codebook",) if self.whole else ()

    @property
    def scale(self) -> torch.dtype:
        """Type that scales are stored in."""
        return torch.bfloat16 if self.group else torch.float32

    def by_row(self) -> KMeans:
        """Return the same with a codebook for each row."""
        return replace(self, whole=False)

    @property
    def count(self) -> int:
        """Return the number of levels."""
        return int(2**self.bits)

    def groups(self, k: int) -> int:
        """Return how many scales a row has."""
        return -(-k // self.group) if self.group else 1

    def padded(self, k: int) -> int:
        """Return how many codes a row has: whole groups."""
        return self.groups(k) * self.group if self.group else k

    def nbytes(self, n: int, k: int) -> int:
        """Return the bytes of an [n, k] matrix."""
        scales = self.scale.itemsize * self.groups(k)
        return n * (packed_width(self.padded(k), self.bits) + scales) + (1 if self.whole else n) * 2 * self.count

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> CodebookGrid:
        """Return levels of locally least squared error for `weight` [n, k]; `importance`, broadcastable to [n, k],
        weighs the errors (Kim et al. 2023, SqueezeLLM). Levels that are fitted without it are one of the starts then.

        A whole matrix's levels end at -1 and 1 where values do, so that a decoded row has the largest magnitude of the
        original. With groups, see `_fit_groups`.
        """
        if self.group:
            return self._fit_groups(weight, importance)
        scales = weight.abs().amax(dim=1, keepdim=True)
        scales = torch.where(scales == 0, torch.ones_like(scales), scales)
        rows = weight / scales
        blind = [] if importance is None else [self.fit(weight).levels]
        if self.whole:
            most = 2 ** (self.bits - 1) - 1
            linear = torch.cat((torch.arange(-most, most + 1), torch.tensor([0.5]))).sort().values / most
            weights = (scales / scales.max()).double().square() * (torch.ones(1) if importance is None else importance)
            binned = _binned(rows, weights.expand(rows.shape))
            return CodebookGrid(self, kmeans(*binned, [linear[None], *blind], True), scales)
        grid = Linear(self.bits).fit(rows, importance)
        linear = grid.dequantize(torch.arange(self.count).expand(len(rows), -1)).sort(dim=1).values
        mass = None if importance is None else importance.expand(rows.shape)
        return CodebookGrid(self, kmeans(*_sorted(rows, mass), [linear, *blind]), scales)

    def _fit_groups(self, weight: Tensor, importance: Tensor | None) -> CodebookGrid:
        """Return one codebook and a scale for each group, fitted in turns to a sample of the groups.

        A scale has the sign of its group's largest value, which so is always at the level 1: the other levels are left
        to the rest. Where evenly spaced levels have less error on the whole matrix, these are taken.
        """
        groups, weights = _grouped(weight, importance, self.group)
        some, mass = _sample(groups, weights)
        fitted = [_in_turns(some, mass, levels) for levels in self._starts(some, mass)]
        fitted += [] if importance is None else [self._fit_groups(weight, None).levels[0]]
        levels = min(fitted, key=lambda each: float(_best_scales(some, mass, each)[1].double().sum()))
        scales, errors = _best_scales(groups, weights, levels)
        plain = Linear(self.bits, self.group, scale=torch.bfloat16).fit(weight, importance)
        off = (plain.dequantize(plain.quantize(weight)) - weight).square() * (1 if importance is None else importance)
        if float(off.double().sum()) < float(errors.double().sum()):
            levels, scales = -_even(self.bits).flip(0), plain.scales.view(-1, 1) * plain.format.middle
        scales = torch.where(_extreme(groups) == 0, 0.0, scales)  # no level need be zero
        return CodebookGrid(self, levels[None], scales.view(len(weight), -1))

    def _starts(self, groups: Tensor, weights: Tensor) -> list[Tensor]:
        """Return levels to begin with: even, quantiles of a normal distribution, and the values if they are few."""
        quantiles = torch.special.ndtri(torch.linspace(0.5 / self.count, 1 - 0.5 / self.count, self.count))
        starts = [_even(self.bits), quantiles / quantiles.max()]
        extreme = _extreme(groups)
        values = (groups / extreme)[(extreme != 0) & (weights > 0)]
        values = torch.from_numpy(np.unique(values.half().numpy())).float()
        if len(values) <= self.count:
            starts.append(pad(values, (self.count - len(values), 0), value=_ABOVE_MINUS_ONE).sort().values)
        return starts

    def read(self, tensors: Mapping[str, Tensor], k: int) -> tuple[CodebookGrid, Tensor]:
        """Return the grid of stored tensors, and the codes [n, k]."""
        scales = tensors["scales"].float().view(-1, self.groups(k))
        grid = CodebookGrid(self, tensors["codebook"].float(), scales)
        return grid, unpack(tensors["codes"], self.bits, self.padded(k))[:, :k]


@dataclass(frozen=True)
class Fixed:
    """A format with the same levels, from -1 to 1, for all matrices, and a scale (bfloat16) for each group of inputs.

    Attributes:
        levels: ascending, as many as there are codes.
        group: inputs (columns) that share a scale.
    """

    levels: tuple[float, ...]
    group: int = 64

    linear = False
    shared = ()
    scale = torch.bfloat16

    def by_row(self) -> Fixed:
        """Return itself: scales are by row."""
        return self

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return (len(self.levels) - 1).bit_length()

    def groups(self, k: int) -> int:
        """Return how many scales a row has."""
        return -(-k // self.group)

    def padded(self, k: int) -> int:
        """Return how many codes a row has: whole groups."""
        return self.groups(k) * self.group

    def nbytes(self, n: int, k: int) -> int:
        """Return the bytes of an [n, k] matrix; the levels are the format's and not stored with each."""
        return n * (packed_width(self.padded(k), self.bits) + 2 * self.groups(k))

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> CodebookGrid:
        """Return the scales that round `weight` [n, k] with the least squared error of those tried, weighed by
        `importance`, which is broadcastable to [n, k]."""
        levels = torch.tensor(self.levels)
        scales, _ = _best_scales(*_grouped(weight, importance, self.group), levels, signed=False)
        return CodebookGrid(self, levels[None], scales.view(len(weight), -1))

    def read(self, tensors: Mapping[str, Tensor], k: int) -> tuple[CodebookGrid, Tensor]:
        """Return the grid of stored tensors, and the codes [n, k]."""
        grid = CodebookGrid(self, torch.tensor(self.levels)[None], tensors["scales"].float())
        return grid, unpack(tensors["codes"], self.bits, self.padded(k))[:, :k]


@dataclass(frozen=True)
class CodebookGrid:
    """Ascending levels, float32 [n, levels] ([1, levels] for all rows), and scales, float32 [n, groups]."""

    format: KMeans | Fixed
    levels: Tensor
    scales: Tensor

    def quantize(self, values: Tensor, start: int = 0) -> Tensor:
        """Return the codes of the levels that are nearest to values [n, j] of the columns from `start` on, uint8."""
        values = values / by_column(self.scales, self.format.group, start, values.shape[1])
        middles = _middles(self.levels)
        if len(middles) == 1:
            return torch.bucketize(values, middles[0]).to(torch.uint8)
        codes = torch.zeros(values.shape, dtype=torch.uint8)
        for border in middles.T:  # 15 vectorised comparisons beat a binary search per value
            codes += values > border[:, None]
        return codes

    def dequantize(self, codes: Tensor, start: int = 0) -> Tensor:
        """Return the float32 values [n, j] of codes of the columns from `start` on."""
        scales = by_column(self.scales, self.format.group, start, codes.shape[1])
        index = codes.long()
        return (self.levels[0][index] if len(self.levels) == 1 else self.levels.gather(1, index)) * scales

    def tensors(self, codes: Tensor) -> dict[str, Tensor]:
        """Return what is stored for codes [n, k]: packed codes, scales, and levels that were fitted."""
        fill = 0 if isinstance(self.format, KMeans) else self.format.levels.index(0.0)
        codes = pad(codes, (0, self.format.padded(codes.shape[1]) - codes.shape[1]), value=fill)
        scales = self.scales.to(self.format.scale)
        scales = scales if self.format.group else scales.flatten()
        found = {"codes": pack(codes, self.format.bits), "scales": scales}
        return {**found, "codebook": self.levels.half()} if isinstance(self.format, KMeans) else found


def kmeans(ordered: Tensor, mass: Tensor, sums: Tensor, given: Sequence[Tensor], pinned: bool = False) -> Tensor:
    """Find levels by one-dimensional k-means (Lloyd 1982), from the best of several starts.

    On sorted values a cluster is an interval: its borders are found with searchsorted, and its mean and error from
    cumulative sums, so a round costs O(n * levels * log k). Starts are an even grid of the row's range and those
    `given`, so the result is never worse than these; and levels spaced as the cube root of the density, which is
    optimal for many levels (Panter & Dite 1951) and needs few rounds.

    Args:
        ordered: ascending values [n, k].
        mass: cumulative weights of their squared errors, float64 [n, k + 1], from 0 on.
        sums: cumulative sums of the values times their weights, float64 [n, k + 1].
        given: levels to start from, each [n, count]; the first are those of the linear format.
        pinned: keep the first level at -1 and the last at 1 where values are there.

    Returns:
        Ascending levels [n, count], float32 numbers that float16 holds.
    """
    count = given[0].shape[1]
    low, high = ordered[:, :1], ordered[:, -1:]
    even = low + (high - low) * torch.linspace(0, 1, count)
    # A gap between neighbours is about 1 / density: the integral of its cube root is the sum of gap^(2/3).
    gaps = ordered.diff(dim=1, prepend=low).pow_(2 / 3)
    spread = gaps.mul_(mass.diff(dim=1).float().pow_(1 / 3)).cumsum_(dim=1)
    wanted = spread[:, -1:] * ((torch.arange(count) + 0.5) / count)
    dense = ordered.gather(1, torch.searchsorted(spread, wanted).clamp_(max=ordered.shape[1] - 1))
    new = ordered.diff(dim=1, prepend=low - 1) > 0
    few = new.sum(dim=1, keepdim=True) <= count
    if few.any():  # the values themselves are the levels, and encoding what was decoded changes nothing
        first = torch.searchsorted(new.cumsum(dim=1), torch.arange(1, count + 1).expand(len(new), -1).contiguous())
        dense = torch.where(few, ordered.gather(1, first.clamp_(max=ordered.shape[1] - 1)), dense)
    best, least = even, torch.full_like(low, torch.inf, dtype=torch.float64)
    for levels in (dense, even, *given):
        for _ in range(LLOYD_ROUNDS):
            weights, totals = _clusters(ordered, mass, sums, levels)
            means = (totals / torch.where(weights > 0, weights, torch.ones_like(weights))).float()
            levels = torch.where(weights > 0, means, levels)
            if pinned:
                levels[:, :1] = torch.where(low < _NEAR_END, -1.0, levels[:, :1])
                levels[:, -1:] = torch.where(high > -_NEAR_END, 1.0, levels[:, -1:])
        levels = levels.half().float()
        weights, totals = _clusters(ordered, mass, sums, levels)
        error = (weights * levels.double().square() - 2 * levels * totals).sum(dim=1, keepdim=True)  # - sum of squares
        best, least = torch.where(error < least, levels, best), torch.minimum(error, least)
    return best


def _sorted(rows: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows' values in order and their cumulative weights and weighted sums, as `kmeans` wants them."""
    if importance is None:
        ordered = torch.from_numpy(np.sort(rows.numpy(), axis=1))  # vectorised: ten times as fast as torch.sort
        mass = torch.arange(rows.shape[1] + 1, dtype=torch.float64).expand(len(rows), -1)
        return ordered, mass, pad(ordered.double().cumsum_(dim=1), (1, 0))
    order = torch.from_numpy(np.argsort(rows.numpy(), axis=1))
    ordered, weights = rows.gather(1, order), importance.gather(1, order).double()
    return ordered, pad(weights.cumsum(dim=1), (1, 0)), pad((weights * ordered).cumsum_(dim=1), (1, 0))


def _binned(rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the means of bins of all values, from -1 to 1, and cumulative weights and sums, as `kmeans` wants them."""
    values = rows.flatten().numpy()
    bins = np.rint((values + 1) * ((_BINS - 1) / 2)).astype(np.int32)
    mass = weights.flatten().numpy()
    found = np.stack([np.bincount(bins, weight, _BINS) for weight in (None, values, mass, mass * values)])
    count, total, *both = found[:, found[0] > 0]
    ordered = torch.from_numpy((total / count).astype(np.float32))[None]
    weight, sums = (torch.from_numpy(np.concatenate(([0.0], each.cumsum())))[None] for each in both)
    return ordered, weight, sums


def _grouped(weight: Tensor, importance: Tensor | None, group: int) -> tuple[Tensor, Tensor]:
    """Return the values [n * groups, group] of a matrix [n, k] that share a scale, zeros at the end of a row, and the
    weights of their squared errors, which broadcast to that."""
    padding = (0, -weight.shape[1] % group)
    groups = pad(weight, padding).view(-1, group)
    if importance is None and not padding[1]:
        return groups, torch.ones(1, 1)
    importance = torch.ones(1, 1) if importance is None else importance
    return groups, pad(importance.expand(weight.shape), padding).reshape(groups.shape)


def _extreme(groups: Tensor) -> Tensor:
    """Return the value of largest magnitude, with its sign, of each group [m, 1]."""
    return groups.gather(1, groups.abs().argmax(dim=1, keepdim=True))


def _stored(scales: Tensor) -> Tensor:
    """Round scales to what is stored; of groups that are all zero to one."""
    scales = scales.bfloat16().float()
    return torch.where(scales == 0, torch.ones_like(scales), scales)


def _best_scales(groups: Tensor, weights: Tensor, levels: Tensor, signed: bool = True) -> tuple[Tensor, Tensor]:
    """Return the scales [m, 1] that round groups [m, g] to ascending levels with the least weighted squared error of
    those tried, and that error [m, 1]; `signed` ones have the sign of the largest value."""
    found = [_search_scales(part, mass, levels, signed) for part, mass in _parts(groups, weights)]
    scales, errors = (torch.cat(each) for each in zip(*found, strict=True))
    return scales, errors


def _parts(groups: Tensor, weights: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield some groups at a time, with their weights: what is searched stays in the cache."""
    count = max(1, _CHUNK // groups.shape[1])
    masses = [weights] if len(weights) == 1 else list(torch.split(weights, count))
    for i, part in enumerate(torch.split(groups, count)):
        yield part, masses[min(i, len(masses) - 1)]


def _search_scales(groups: Tensor, weights: Tensor, levels: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    extreme = _extreme(groups) if signed else groups.abs().amax(dim=1, keepdim=True)
    middles, best, least = _middles(levels), torch.empty(0), torch.empty(0)
    for part in _CLIPPING:
        scale = _stored(extreme * part)
        rounded = levels[torch.bucketize(groups / scale, middles)]
        error = (rounded.mul_(scale).sub_(groups).square_() * weights).sum(dim=1, keepdim=True)
        better = error < least if len(best) else torch.ones_like(error, dtype=torch.bool)
        best = torch.where(better, scale, best) if len(best) else scale
        least = torch.where(better, error, least) if len(least) else error
    return best, least


def _sample(groups: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return at most `_SAMPLED` groups and their weights: those of the largest values, where errors are largest, and
    every so many of the rest, each of which stands for several."""
    weights = weights.expand(groups.shape)
    if len(groups) <= _SAMPLED:
        return groups, weights
    half = _SAMPLED // 2
    order = torch.argsort((weights * groups.square()).sum(dim=1), descending=True, stable=True)
    rest = order[torch.linspace(half, len(groups) - 1, half).long()]
    stands_for = (len(groups) - half) / half
    return torch.cat((groups[order[:half]], groups[rest])), torch.cat(
        (weights[order[:half]], weights[rest] * stands_for)
    )


def _in_turns(groups: Tensor, weights: Tensor, start: Tensor) -> Tensor:
    """Improve ascending levels, the last of which stays 1, and the scales of groups [m, g] in turns (Lloyd 1982)."""
    levels, count = start, len(start)
    for _ in range(_TURNS):
        scales, _ = _best_scales(groups, weights, levels)
        values = groups / scales
        codes = torch.bucketize(values, _middles(levels)).flatten()
        mass = (weights * (scales / scales.abs().max()).square()).double()
        counts = torch.bincount(codes, mass.flatten(), count)
        means = torch.bincount(codes, (mass * values).flatten(), count) / counts.clamp(min=1e-300)
        levels = torch.where(counts > 0, means.float(), levels).clamp(_ABOVE_MINUS_ONE, 1)
        levels[-1] = 1
        levels = levels.half().float().sort().values
    return levels


def _even(bits: int) -> Tensor:
    """Return the levels of a linear format, as fractions of its lowest code."""
    middle: int = 2 ** (bits - 1)
    return (torch.arange(2 * middle) - (middle - 1)) / middle


def _middles(levels: Tensor) -> Tensor:
    """Return the borders between the intervals of ascending `levels` [..., count]."""
    return ((levels[..., 1:] + levels[..., :-1]) / 2).contiguous()


def _clusters(ordered: Tensor, mass: Tensor, sums: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weight of the values that are nearest to each level [n, count], and their weighted sums, float64."""
    borders = pad(torch.searchsorted(ordered, _middles(levels), right=True), (1, 0))
    borders = torch.cat((borders, torch.full_like(borders[:, :1], ordered.shape[1])), dim=1)
    return mass.gather(1, borders).diff(dim=1), sums.gather(1, borders).diff(dim=1)
