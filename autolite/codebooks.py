"""Formats whose levels are not evenly spaced: a value is levels[code] * scale.

Levels are either fitted to the weights by k-means and stored with them, or fixed by the format.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    """A format with levels that k-means finds, as fractions (float16) of the largest magnitude of a row.

    Attributes:
        bits: of a code.
        whole: one codebook for the whole matrix; else one for each row.
    """

    bits: int
    whole: bool = False

    linear = False
    group = 0

    @property
    def shared(self) -> tuple[str, ...]:
        """Names of the stored tensors that are not by row."""
        return ("codebook",) if self.whole else ()

    def by_row(self) -> KMeans:
        """Return the same with a codebook for each row."""
        return replace(self, whole=False)

    @property
    def count(self) -> int:
        """Return the number of levels."""
        return int(2**self.bits)

    def padded(self, k: int) -> int:
        """Return how many codes a row has."""
        return k

    def nbytes(self, n: int, k: int) -> int:
        """Return the bytes of an [n, k] matrix."""
        return n * (packed_width(k, self.bits) + 4) + (1 if self.whole else n) * 2 * self.count

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> CodebookGrid:
        """Return levels of locally least squared error for `weight` [n, k]; `importance`, broadcastable to [n, k],
        weighs the errors (Kim et al. 2023, SqueezeLLM).

        A whole matrix's levels end at -1 and 1 where values do, so that a decoded row has the largest magnitude of the
        original.
        """
        scales = weight.abs().amax(dim=1, keepdim=True)
        scales = torch.where(scales == 0, torch.ones_like(scales), scales)
        rows = weight / scales
        if self.whole:
            most = 2 ** (self.bits - 1) - 1
            linear = torch.cat((torch.arange(-most, most + 1), torch.tensor([0.5]))).sort().values / most
            weights = (scales / scales.max()).double().square() * (torch.ones(1) if importance is None else importance)
            return CodebookGrid(self, kmeans(*_binned(rows, weights.expand(rows.shape)), linear[None], True), scales)
        grid = Linear(self.bits).fit(rows, importance)
        linear = grid.dequantize(torch.arange(self.count).expand(len(rows), -1)).sort(dim=1).values
        mass = None if importance is None else importance.expand(rows.shape)
        return CodebookGrid(self, kmeans(*_sorted(rows, mass), linear), scales)

    def read(self, tensors: Mapping[str, Tensor], k: int) -> tuple[CodebookGrid, Tensor]:
        """Return the grid of stored tensors, and the codes [n, k]."""
        grid = CodebookGrid(self, tensors["codebook"].float(), tensors["scales"][:, None])
        return grid, unpack(tensors["codes"], self.bits, k)


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
        n, k = weight.shape
        groups = pad(weight, (0, -k % self.group)).view(n, self.groups(k), self.group)
        weights = torch.ones(1)
        if importance is not None:
            weights = pad(importance.expand(n, k), (0, -k % self.group)).view(groups.shape)
        levels = torch.tensor(self.levels)
        extreme = groups.abs().amax(dim=2, keepdim=True)
        best, least = torch.empty(0), torch.empty(0)
        for part in _CLIPPING:
            scale = (extreme * part).bfloat16().float()
            scale = torch.where(scale == 0, torch.ones_like(scale), scale)
            rounded = levels[torch.bucketize(groups / scale, _middles(levels))]
            error = (rounded.mul_(scale).sub_(groups).square_() * weights).sum(dim=2, keepdim=True)
            better = error < least if len(best) else torch.ones_like(error, dtype=torch.bool)
            best = torch.where(better, scale, best) if len(best) else scale
            least = torch.where(better, error, least) if len(least) else error
        return CodebookGrid(self, levels[None], best.squeeze(2))

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
        if isinstance(self.format, KMeans):
            packed = pack(codes, self.format.bits)
            return {"codes": packed, "codebook": self.levels.half(), "scales": self.scales.flatten()}
        zero = self.format.levels.index(0.0)
        codes = pad(codes, (0, self.format.padded(codes.shape[1]) - codes.shape[1]), value=zero)
        return {"codes": pack(codes, self.format.bits), "scales": self.scales.bfloat16()}


def kmeans(ordered: Tensor, mass: Tensor, sums: Tensor, linear: Tensor, pinned: bool = False) -> Tensor:
    """Find levels by one-dimensional k-means (Lloyd 1982), from the best of three starts.

    On sorted values a cluster is an interval: its borders are found with searchsorted, and its mean and error from
    cumulative sums, so a round costs O(n * levels * log k). Two starts are even grids, of the row's range and that
    of a linear format, so the result is never worse than these; the other spaces the levels as the cube root of the
    density, which is optimal for many levels (Panter & Dite 1951) and needs few rounds.

    Args:
        ordered: ascending values [n, k].
        mass: cumulative weights of their squared errors, float64 [n, k + 1], from 0 on.
        sums: cumulative sums of the values times their weights, float64 [n, k + 1].
        linear: levels [n, count] of the linear format.
        pinned: keep the first level at -1 and the last at 1 where values are there.

    Returns:
        Ascending levels [n, count], float32 numbers that float16 holds.
    """
    count = linear.shape[1]
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
    for levels in (dense, even, linear):
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


def _middles(levels: Tensor) -> Tensor:
    """Return the borders between the intervals of ascending `levels` [..., count]."""
    return ((levels[..., 1:] + levels[..., :-1]) / 2).contiguous()


def _clusters(ordered: Tensor, mass: Tensor, sums: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weight of the values that are nearest to each level [n, count], and their weighted sums, float64."""
    borders = pad(torch.searchsorted(ordered, _middles(levels), right=True), (1, 0))
    borders = torch.cat((borders, torch.full_like(borders[:, :1], ordered.shape[1])), dim=1)
    return mass.gather(1, borders).diff(dim=1), sums.gather(1, borders).diff(dim=1)
