"""Values of a matrix that share a scale: groups of neighbouring inputs (columns) of a row."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

CHUNK = 2**18  # values that are searched at a time: a megabyte stays in the cache


def count(k: int, group: int) -> int:
    """Return how many scales a row of `k` values has; `group` 0 is the whole row."""
    return -(-k // group) if group else 1


def width(k: int, group: int) -> int:
    """Return how many codes a row of `k` values has: whole groups."""
    return count(k, group) * group if group else k


def split(weight: Tensor, group: int) -> Tensor:
    """Return the values of a matrix [n, k] that share a scale, [n * groups, group]; rows end with zeros."""
    return pad(weight, (0, -weight.shape[1] % group)).reshape(-1, group)


def extreme(groups: Tensor) -> Tensor:
    """Return the value of largest magnitude, with its sign, of each group [m, 1]."""
    return groups.gather(1, groups.abs().argmax(dim=1, keepdim=True))


def stored(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Round scales to what is stored, in float32; of groups that are all zero to one."""
    scales = scales.to(dtype).float()
    return torch.where(scales == 0, torch.ones_like(scales), scales)


def by_column(numbers: Tensor, group: int, start: int, columns: int) -> Tensor:
    """Return the number [n, columns] of each column from `start` on, of numbers [n, groups] (what is not by group
    broadcasts)."""
    return numbers[:, torch.arange(start, start + columns) // group] if group else numbers
