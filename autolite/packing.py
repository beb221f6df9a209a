"""Codes of 1, 2, 3, 4, 6 or 8 bits in bytes.

Widths that do not divide a byte are split into planes that do: 3 bits are their two low bits, four a byte, and after
them their high bits, eight a byte; 6 bits are four low ones and two high ones. A reader needs only shifts and masks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 6: (4, 2), 8: (8,)}  # widths, the lowest bits first


def packed_width(k: int, bits: int) -> int:
    """Return how many bytes k codes take."""
    return sum(-(-k * width // 8) for width in PLANES[bits])


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes below 2^bits, uint8 [n, k], the first in the low bits of the first byte: uint8 [n, packed_width]."""
    found, shift = [], 0
    for width in PLANES[bits]:
        each = 8 // width
        plane = (codes >> shift) & (2**width - 1)
        plane = pad(plane, (0, -plane.shape[1] % each))
        plane = plane.view(len(plane), plane.shape[1] // each, each)
        packed = plane[:, :, 0].clone()
        for i in range(1, each):
            packed |= plane[:, :, i] << (width * i)
        found.append(packed)
        shift += width
    return torch.cat(found, dim=1)


def unpack(packed: Tensor, bits: int, k: int) -> Tensor:
    """Undo `pack`: uint8 [n, packed_width] -> uint8 [n, k]."""
    codes, shift, start = torch.zeros(len(packed), k, dtype=torch.uint8), 0, 0
    for width in PLANES[bits]:
        stop = start + -(-k * width // 8)
        shifts = torch.arange(0, 8, width, dtype=torch.uint8)
        plane = (packed[:, start:stop, None] >> shifts) & (2**width - 1)
        codes |= plane.flatten(1)[:, :k] << shift
        shift, start = shift + width, stop
    return codes
