"""Formats with evenly spaced levels: a value is (code - zero point) * scale."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from autolite import groups
from autolite.groups import by_column
from autolite.packing import pack, packed_width, unpack

# Parts of a group's largest magnitude that are tried as the end of its range: the fewer levels, the more clipping pays.
CLIPPING = {2: (1.0, 0.9, 0.8, 0.7, 0.6, 0.5), 3: (1.0, 0.9, 0.8, 0.7), 4: (1.0, 0.9), 6: (1.0,), 8: (1.0,)}


@dataclass(frozen=True)
class Linear:
    """A format with evenly spaced levels.

    Attributes:
        bits: of a code.
        group: inputs (columns) that share a scale, 0 for all of a row.
        whole: one scale for the whole matrix.
        symmetric: the zero point is the middle code; else each scale has its own, an integer of the same bits.
        largest: largest code of symmetric 8-bit formats, which have a sign.
        scale: type that scales are stored in. bfloat16 has float32's range; as codes are rounded with the rounded
            scale, its 8 bits of precision move levels by a part of a step only.
    """

    bits: int
    group: int = 0
    whole: bool = False
    symmetric: bool = True
    largest: int = 127
    scale: torch.dtype = torch.float32

    linear = True

    @property
    def shared(self) -> tuple[str, ...]:
        """Names of the stored tensors that are not by row."""
        return ("scales",) if self.whole else ()

    def by_row(self) -> Linear:
        """Return the same with a scale for each row."""
        return replace(self, whole=False)

    @property
    def signed(self) -> bool:
        """Whether codes are stored as int8."""
        return self.symmetric and self.bits == 8

    @property
    def middle(self) -> int:
        """The code of zero of symmetric formats."""
        return 0 if self.signed else 2 ** (self.bits - 1)

    def groups(self, k: int) -> int:
        """Return how many scales a row has."""
        return groups.count(k, self.group)

    def padded(self, k: int) -> int:
        """Return how many codes a row has: whole groups."""
        return groups.width(k, self.group)

    def nbytes(self, n: int, k: int) -> int:
        """Return the bytes of an [n, k] matrix."""
        scales = self.groups(k) * self.scale.itemsize
        zeros = 0 if self.symmetric else packed_width(self.groups(k), self.bits)
        return n * packed_width(self.padded(k), self.bits) + (1 if self.whole else n) * (scales + zeros)

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> LinearGrid:
        """Return the scales, and zero points, that round `weight` [n, k] with the least squared error of those tried.

        `importance`, broadcastable to [n, k], weighs the squared errors.
        """
        rows, k = weight.shape
        parts = [part.float() for part in _grouped(weight, self)]
        weights = parts[:0] if importance is None else [*_grouped(importance.expand(rows, k), self)]
        found = [self._search(part, weights[i] if weights else None) for i, part in enumerate(parts)]
        scales, zeros = (torch.cat(each).view(1 if self.whole else rows, -1) for each in zip(*found, strict=True))
        return LinearGrid(self, scales, zeros)

    def _search(self, values: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return a scale and a zero point for each row of groups `values` [m, g]."""
        low, high = (0, 2**self.bits - 1) if not self.signed else (-self.largest, self.largest)
        best, least = None, torch.empty(0)
        for scale, zero in self._candidates(values):
            codes = (values / scale).round_().clamp_(low - zero, high - zero)
            error = torch.addcmul(values, codes, scale, value=-1).square_()
            error = (error if weights is None else error.mul_(weights)).sum(dim=1, keepdim=True)
            if best is None:
                best, least = (scale, zero), error
                continue
            better = error < least
            best = torch.where(better, scale, best[0]), torch.where(better, zero, best[1])
            least = torch.minimum(error, least)
        assert best is not None
        return best

    def _candidates(self, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield scales and zero points [m, 1].

        With an even number of levels around zero, the value of largest magnitude sits on the lowest code, and the sign
        of the scale follows it; or on the next, and nothing is clipped; or is clipped. Each of these is found again
        when a decoded matrix is encoded.
        """
        if self.signed:
            scale = self._rounded(values.abs().amax(dim=1, keepdim=True) / self.largest)
            yield scale, torch.zeros_like(scale)
        elif self.symmetric:
            extreme = groups.extreme(values)
            first, *others = (-self.middle / part for part in CLIPPING[self.bits])
            for divisor in (first, 1.0 - self.middle, *others):
                scale = self._rounded(extreme / divisor)
                yield scale, torch.full_like(scale, self.middle)
        else:
            low, high = values.amin(dim=1, keepdim=True).clamp(max=0), values.amax(dim=1, keepdim=True).clamp(min=0)
            steps = 2**self.bits - 1
            first, *others = (steps / part for part in CLIPPING[self.bits])
            for divisor in (first, steps - 1.0, *others):  # rounding the zero point can leave one code unused
                scale = self._rounded(high / divisor - low / divisor)
                yield scale, (-low * min(1.0, steps / divisor) / scale).round_().clamp_(0, steps)

    def _rounded(self, scales: Tensor) -> Tensor:
        return groups.stored(scales, self.scale)

    def read(self, tensors: Mapping[str, Tensor], k: int) -> tuple[LinearGrid, Tensor]:
        """Return the grid of stored tensors, and the codes [n, k]."""
        stored, rows, count = tensors["codes"], len(tensors["codes"]), self.groups(k)
        codes = stored if self.signed else unpack(stored, self.bits, self.padded(k))[:, :k]
        scales = tensors["scales"].float().view(-1, count)
        if self.symmetric:
            zeros = torch.full_like(scales, self.middle)
        else:
            zeros = unpack(tensors["zeros"].view(rows, -1), self.bits, count).float()
        return LinearGrid(self, scales, zeros), codes


@dataclass(frozen=True)
class LinearGrid:
    """Scales and zero points of a matrix, float32 [n, groups] ([1, 1] for the whole); zero points are integers."""

    format: Linear
    scales: Tensor
    zeros: Tensor

    def quantize(self, values: Tensor, start: int = 0) -> Tensor:
        """Round values [n, j] of the columns from `start` on to codes [n, j], int8 or uint8."""
        scales, zeros = (by_column(each, self.format.group, start, values.shape[1]) for each in self._numbers)
        codes = (values / scales).round_()
        if self.format.signed:
            return codes.clamp_(-self.format.largest, self.format.largest).to(torch.int8)
        return codes.add_(zeros).clamp_(0, 2**self.format.bits - 1).to(torch.uint8)

    def dequantize(self, codes: Tensor, start: int = 0) -> Tensor:
        """Return the float32 values [n, j] of codes of the columns from `start` on."""
        scales, zeros = (by_column(each, self.format.group, start, codes.shape[1]) for each in self._numbers)
        return (codes.float() - zeros) * scales

    def tensors(self, codes: Tensor) -> dict[str, Tensor]:
        """Return what is stored for codes [n, k]: packed codes, scales and zero points."""
        scales = self.scales.to(self.format.scale)
        found = {"codes": codes, "scales": scales if self.format.group else scales.flatten()}
        if not self.format.signed:
            fill = int(self.format.middle)
            codes = pad(codes, (0, self.format.padded(codes.shape[1]) - codes.shape[1]), value=fill)
            found["codes"] = pack(codes, self.format.bits)
        if not self.format.symmetric:
            zeros = pack(self.zeros.to(torch.uint8), self.format.bits)
            found["zeros"] = zeros if self.format.group else zeros.flatten()
        return found

    def rows(self, chosen: Tensor) -> LinearGrid:
        """Return the grid of some rows, by their numbers, int64 [m]."""
        return self if self.format.whole else replace(self, scales=self.scales[chosen], zeros=self.zeros[chosen])

    @property
    def _numbers(self) -> tuple[Tensor, Tensor]:
        return self.scales, self.zeros


def _grouped(weight: Tensor, format: Linear) -> tuple[Tensor, ...]:
    """Return the values that share a scale as rows, some of them at a time."""
    if format.whole:
        return (weight.reshape(1, -1),)
    if format.group:
        weight = groups.split(weight, format.group)
    return torch.split(weight, max(1, groups.CHUNK // weight.shape[1]))
