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

from autolite import groups
from autolite.groups import by_column
from autolite.levels import (
    ABOVE_MINUS_ONE,
    best_scales,
    even,
    grouped,
    in_bins,
    in_order,
    in_turns,
    kmeans,
    middles,
    sample,
)
from autolite.linear_grids import Linear
from autolite.packing import pack, packed_width, unpack

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
        return groups.count(k, self.group)

    def padded(self, k: int) -> int:
        """Return how many codes a row has: whole groups."""
        return groups.width(k, self.group)

    def nbytes(self, n: int, k: int) -> int:
        """Return the bytes of an [n, k] matrix."""
        scales = self.scale.itemsize * self.groups(k)
        return n * (packed_width(self.padded(k), self.bits) + scales) + (1 if self.whole else n) * 2 * self.count

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> CodebookGrid:
        """Return levels of locally least squared error for `weight` [n, k]; `importance`, broadcastable to [n, k],
        weighs the errors (Kim et al. 2023, SqueezeLLM). Levels that are fitted without it are one of the starts then.
        For a codebook of which nothing is weighed all values count alike.

        A whole matrix's levels end at -1 and 1 where values do, so that a decoded row has the largest magnitude of the
        original. With groups, see `_fit_groups`.
        """
        if self.group:
            return self._fit_groups(weight, importance)
        if importance is not None:
            importance = importance.expand(weight.shape)
            total = importance.sum() if self.whole else importance.sum(dim=1, keepdim=True)
            importance = torch.where(total > 0, importance, torch.ones(1))
        scales = weight.abs().amax(dim=1, keepdim=True)
        scales = torch.where(scales == 0, torch.ones_like(scales), scales)
        rows = weight / scales
        blind = [] if importance is None else [self.fit(weight).levels]
        if self.whole:
            most = 2 ** (self.bits - 1) - 1
            linear = torch.cat((torch.arange(-most, most + 1), torch.tensor([0.5]))).sort().values / most
            weights = (scales / scales.max()).double().square() * (torch.ones(1) if importance is None else importance)
            binned = in_bins(rows, weights.expand(rows.shape))
            return CodebookGrid(self, kmeans(*binned, [linear[None], *blind], True), scales)
        grid = Linear(self.bits).fit(rows, importance)
        linear = grid.dequantize(torch.arange(self.count).expand(len(rows), -1)).sort(dim=1).values
        return CodebookGrid(self, kmeans(*in_order(rows, importance), [linear, *blind]), scales)

    def _fit_groups(self, weight: Tensor, importance: Tensor | None) -> CodebookGrid:
        """Return one codebook and a scale for each group, fitted in turns to a sample of the groups.

        A scale has the sign of its group's largest value, which so is always at the level 1: the other levels are left
        to the rest. Where evenly spaced levels have less error on the whole matrix, these are taken.
        """
        values, weights = grouped(weight, importance, self.group)
        levels = [self._levels(values, weights)]
        levels += [] if importance is None else [self._levels(*grouped(weight, None, self.group))]
        found = [(each, *best_scales(values, weights, each)) for each in levels]
        plain = Linear(self.bits, self.group, scale=self.scale).fit(weight, importance)
        off = (plain.dequantize(plain.quantize(weight)) - weight).square() * (1 if importance is None else importance)
        linear = -even(self.bits).flip(0), plain.scales.view(-1, 1) * plain.format.middle, off
        codebook, scales, _ = min((*found, linear), key=lambda each: float(each[2].double().sum()))
        scales = torch.where(groups.extreme(values) == 0, 0.0, scales)  # no level need be zero
        return CodebookGrid(self, codebook[None], scales.view(len(weight), -1))

    def _levels(self, values: Tensor, weights: Tensor) -> Tensor:
        """Return the levels that round a sample of groups [m, g] with the least weighted squared error."""
        some, mass = sample(values, weights)
        fitted = [in_turns(some, mass, start) for start in self._starts(some, mass)]
        return min(fitted, key=lambda each: float(best_scales(some, mass, each)[1].double().sum()))

    def _starts(self, some: Tensor, weights: Tensor) -> list[Tensor]:
        """Return levels to begin with: even, quantiles of a normal distribution, and the values if they are few."""
        quantiles = torch.special.ndtri(torch.linspace(0.5 / self.count, 1 - 0.5 / self.count, self.count))
        starts = [even(self.bits), quantiles / quantiles.max()]
        extreme = groups.extreme(some)
        values = (some / extreme)[(extreme != 0) & (weights > 0)]
        values = torch.from_numpy(np.unique(values.half().numpy())).float()
        if len(values) <= self.count:
            starts.append(pad(values, (self.count - len(values), 0), value=ABOVE_MINUS_ONE).sort().values)
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
        return groups.count(k, self.group)

    def padded(self, k: int) -> int:
        """Return how many codes a row has: whole groups."""
        return groups.width(k, self.group)

    def nbytes(self, n: int, k: int) -> int:
        """Return the bytes of an [n, k] matrix; the levels are the format's and not stored with each."""
        return n * (packed_width(self.padded(k), self.bits) + 2 * self.groups(k))

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> CodebookGrid:
        """Return the scales that round `weight` [n, k] with the least squared error of those tried, weighed by
        `importance`, which is broadcastable to [n, k]."""
        levels = torch.tensor(self.levels)
        scales, _ = best_scales(*grouped(weight, importance, self.group), levels, signed=False)
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
        borders = middles(self.levels)
        if len(borders) == 1:
            return torch.bucketize(values, borders[0]).to(torch.uint8)
        codes = torch.zeros(values.shape, dtype=torch.uint8)
        for border in borders.T:  # 15 vectorised comparisons beat a binary search per value
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

    def rows(self, chosen: Tensor) -> CodebookGrid:
        """Return the grid of some rows, by their numbers, int64 [m]."""
        levels = self.levels if len(self.levels) == 1 else self.levels[chosen]
        return replace(self, levels=levels, scales=self.scales[chosen])
