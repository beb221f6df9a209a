"""Number formats: encode, decode and exact bytes. The reference that every kernel is tested against.

A weight matrix is [n, k]: n output features (rows), k input features. `Encoded` keeps exactly the tensors that the
ONNX artifact stores, so `nbytes` is a promise about files and not an estimate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from autolite.errors import PlanError, unknown

GROUP = 32  # inputs that share one int4 scale: the block of ONNX Runtime's MatMulNBits
INT7 = 63  # 2 * 63 * 255 fits in 16 bits: such codes multiply 8-bit activations exactly in pairs
LEVELS = 16  # entries of a kmeans4 codebook
LLOYD_ROUNDS = 6  # later rounds gain less than 0.02 dB on normally distributed weights


@dataclass(frozen=True)
class Encoded:
    """A matrix in a number format: its [n, k] shape and the tensors stored for it."""

    format: str
    shape: tuple[int, int]
    tensors: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


@dataclass(frozen=True)
class Format:
    """A number format: `bits` of one code (scales and codebooks come on top), and whether its levels are evenly
    spaced. `embedding` says that a runtime can look single rows up in it. `activations` says what a product makes of
    its input: 8-bit integers by the range of each call ("dynamic") or by a calibrated one ("static"), or nothing
    ("float"); where it is "any", the format is about stored bytes, and the kernel may do what costs less than the
    rounding of the weights."""

    name: str
    bits: int
    linear: bool
    embedding: bool
    activations: Literal["float", "dynamic", "static", "any"]
    description: str
    encode: Callable[[Tensor], dict[str, Tensor]]
    decode: Callable[[Mapping[str, Tensor], int], Tensor]
    nbytes: Callable[[int, int], int]


def encode(weight: Tensor, format: str) -> Encoded:
    """Encode a float32 matrix [n, k].

    Raises:
        PlanError: if no format has that name.
    """
    weight = weight.detach().float().contiguous()
    rows, columns = weight.shape
    return Encoded(format, (rows, columns), get(format).encode(weight))


def decode(encoded: Encoded) -> Tensor:
    """Return the float32 matrix [n, k] that a kernel must compute with."""
    return get(encoded.format).decode(encoded.tensors, encoded.shape[1])


def nbytes(format: str, n: int, k: int) -> int:
    """Return the exact bytes that an [n, k] matrix takes in the artifact.

    Raises:
        PlanError: if no format has that name.
    """
    return get(format).nbytes(n, k)


def get(format: str) -> Format:
    """Return the format of that name.

    Raises:
        PlanError: if no format has that name.
    """
    if format not in FORMATS:
        raise PlanError(unknown("number format", format, FORMATS))
    return FORMATS[format]


def pack(codes: Tensor) -> Tensor:
    """Pack 4-bit codes, uint8 [n, k] with k even, two a byte, the first in the low half: uint8 [n, k / 2]."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """Undo `pack`: uint8 [n, m] -> uint8 [n, 2 m]."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)


def _nonzero(scales: Tensor) -> Tensor:
    """Replace zero scales (of rows that are all zero, whose codes are zero too) by one."""
    return torch.where(scales == 0, torch.ones_like(scales), scales)


def _encode_int8(weight: Tensor, largest: int = 127) -> dict[str, Tensor]:
    scales = _nonzero(weight.abs().amax(dim=1) / largest)
    codes = (weight / scales[:, None]).round_().clamp_(-largest, largest).to(torch.int8)
    return {"codes": codes, "scales": scales}


def _encode_bf16(weight: Tensor) -> dict[str, Tensor]:
    return {"values": weight.bfloat16()}


def _decode_float(tensors: Mapping[str, Tensor], k: int) -> Tensor:
    return tensors["values"].float()


def _decode_int8(tensors: Mapping[str, Tensor], k: int) -> Tensor:
    return tensors["codes"].float() * tensors["scales"][:, None]


def _encode_int4(weight: Tensor) -> dict[str, Tensor]:
    """Codes 0..15 mean (code - 8) * scale. Every group takes, of three scales, the one of least squared error.

    The value of largest magnitude sits on -8 (the sign of the scale follows it), on -7 (nothing is clipped then), or
    is clipped by a tenth; each of them is found again when a decoded matrix is encoded.
    """
    rows, columns = weight.shape
    groups = torch.nn.functional.pad(weight, (0, -columns % GROUP)).view(-1, GROUP)
    parts = [_round_groups(part) for part in torch.split(groups, 8192)]  # a megabyte at a time stays in the cache
    codes, scales = (torch.cat(part) for part in zip(*parts, strict=True))
    return {"codes": pack(codes).view(rows, -1), "scales": scales.view(rows, -1)}


def _round_groups(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes, uint8 [groups, 32], and scales [groups, 1]."""
    extreme = groups.gather(1, groups.abs().argmax(dim=1, keepdim=True))
    scales, codes, least = extreme, groups, torch.full_like(extreme, torch.inf)
    for divisor in (-8.0, -7.0, -8.0 / 0.9):
        scale = _nonzero(extreme / divisor)
        code = (groups / scale).round_().clamp_(-8, 7)
        error = torch.addcmul(groups, code, scale, value=-1).square_().sum(dim=1, keepdim=True)
        better = error < least
        scales, codes = torch.where(better, scale, scales), torch.where(better, code, codes)
        least = torch.minimum(error, least)
    return (codes + 8).to(torch.uint8), scales


def _decode_int4(tensors: Mapping[str, Tensor], k: int) -> Tensor:
    codes, scales = unpack(tensors["codes"]), tensors["scales"]
    groups = (codes.view(*scales.shape, GROUP).float() - 8) * scales[:, :, None]
    return groups.flatten(1)[:, :k].contiguous()


def _encode_kmeans4(weight: Tensor) -> dict[str, Tensor]:
    """16 levels per row by one-dimensional k-means (Lloyd 1982), from the better of two starts.

    On sorted rows a cluster is an interval: its borders are found with searchsorted, and its mean and error from
    cumulative sums, so a round costs O(n * 16 * log k). Levels are fractions of the row's largest magnitude, in
    float16. One start is an even grid, so the result is never worse than one; the other spaces the levels as the cube
    root of the density, which is optimal for many levels (Panter & Dite 1951) and needs few rounds.
    """
    scales = _nonzero(weight.abs().amax(dim=1, keepdim=True))
    rows = weight / scales
    ordered = torch.from_numpy(np.sort(rows.numpy(), axis=1))  # vectorised: ten times as fast as torch.sort
    low, high = ordered[:, :1], ordered[:, -1:]
    even = low + (high - low) * torch.linspace(0, 1, LEVELS)
    # A gap between neighbours is about 1 / density: the integral of its cube root is the sum of gap^(2/3).
    mass = ordered.diff(dim=1, prepend=low).pow_(2 / 3).cumsum_(dim=1)
    wanted = mass[:, -1:] * ((torch.arange(LEVELS) + 0.5) / LEVELS)
    dense = ordered.gather(1, torch.searchsorted(mass, wanted).clamp_(max=ordered.shape[1] - 1))
    new = ordered.diff(dim=1, prepend=low - 1) > 0
    few = new.sum(dim=1, keepdim=True) <= LEVELS
    if few.any():  # the values themselves are the levels, and encoding what was decoded changes nothing
        first = torch.searchsorted(new.cumsum(dim=1), torch.arange(1, LEVELS + 1).expand(len(new), -1).contiguous())
        dense = torch.where(few, ordered.gather(1, first.clamp_(max=ordered.shape[1] - 1)), dense)
    sums = torch.nn.functional.pad(ordered.double().cumsum_(dim=1), (1, 0))
    best, least = even, torch.full_like(low, torch.inf, dtype=torch.float64)
    for levels in (dense, even):
        for _ in range(LLOYD_ROUNDS):
            counts, totals = _clusters(ordered, sums, levels)
            levels = torch.where(counts > 0, (totals / counts.clamp(min=1)).float(), levels)
        levels = levels.half().float()
        counts, totals = _clusters(ordered, sums, levels)
        error = (counts * levels.double().square() - 2 * levels * totals).sum(dim=1, keepdim=True)  # - sum of squares
        best, least = torch.where(error < least, levels, best), torch.minimum(error, least)
    codes = torch.zeros(rows.shape, dtype=torch.uint8)
    for border in _middles(best).T:  # 15 vectorised comparisons beat a binary search per value
        codes += rows > border[:, None]
    packed = pack(torch.nn.functional.pad(codes, (0, codes.shape[1] % 2)))
    return {"codes": packed, "codebook": best.half(), "scales": scales.flatten()}


def _middles(levels: Tensor) -> Tensor:
    """Return the 15 borders between the intervals of ascending `levels` [n, 16]."""
    return ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous()


def _clusters(ordered: Tensor, sums: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many values are nearest to each level, int64 [n, 16], and their sums, float64 [n, 16]."""
    borders = torch.nn.functional.pad(torch.searchsorted(ordered, _middles(levels), right=True), (1, 0))
    borders = torch.cat((borders, torch.full_like(borders[:, :1], ordered.shape[1])), dim=1)
    return borders.diff(dim=1), sums.gather(1, borders).diff(dim=1)


def _decode_kmeans4(tensors: Mapping[str, Tensor], k: int) -> Tensor:
    codes = unpack(tensors["codes"])[:, :k].long()
    return tensors["codebook"].float().gather(1, codes) * tensors["scales"][:, None]


def _bytes_int8(n: int, k: int) -> int:
    return n * k + 4 * n


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format(
            "fp32",
            32,
            True,
            True,
            "float",
            "32-bit floating point",
            lambda weight: {"values": weight},
            _decode_float,
            lambda n, k: 4 * n * k,
        ),
        Format(
            "bf16",
            16,
            True,
            True,
            "float",
            "bfloat16; faster than fp32 where the processor multiplies it and the runtime uses that, else only smaller",
            _encode_bf16,
            _decode_float,
            lambda n, k: 2 * n * k,
        ),
        Format(
            "int8",
            8,
            True,
            True,
            "dynamic",
            "8-bit integers, one scale per output channel; activations are quantized to 8 bits by each call's range",
            _encode_int8,
            _decode_int8,
            _bytes_int8,
        ),
        Format(
            "int8-static",
            8,
            True,
            False,
            "static",
            "as int8, but activations are quantized by ranges that were calibrated on training examples",
            _encode_int8,
            _decode_int8,
            _bytes_int8,
        ),
        Format(
            "int8-weight",
            8,
            True,
            False,
            "float",
            "as int8, but activations stay in floating point",
            _encode_int8,
            _decode_int8,
            _bytes_int8,
        ),
        Format(
            "int7",
            8,
            True,
            True,
            "dynamic",
            "as int8 with codes of 7 bits, whose products do not overflow on x86 processors without VNNI",
            partial(_encode_int8, largest=INT7),
            _decode_int8,
            _bytes_int8,
        ),
        Format(
            "int4",
            4,
            True,
            True,
            "any",
            f"4-bit integers, one scale per group of {GROUP} inputs",
            _encode_int4,
            _decode_int4,
            lambda n, k: n * -(-k // GROUP) * (GROUP // 2 + 4),
        ),
        Format(
            "kmeans4",
            4,
            False,
            False,
            "any",
            f"4-bit indices into a codebook of {LEVELS} levels per output channel, fitted by k-means",
            _encode_kmeans4,
            _decode_kmeans4,
            lambda n, k: n * (-(-k // 2) + 2 * LEVELS + 4),
        ),
    )
}
