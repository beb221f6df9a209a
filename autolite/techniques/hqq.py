"""Half-quadratic quantization: scales and zero points that serve the many small weights, not the few large ones."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from autolite import formats
from autolite.formats import Encoded
from autolite.linear_grids import LinearGrid

POWER = 0.7  # p of the norm of the errors
PENALTY, GROWTH = 10.0, 1.01  # of what is split off, and its growth in each round
ROUNDS = 20


@torch.no_grad()
def half_quadratic(weight: Tensor, format: str) -> Encoded:
    """Encode a matrix [n, k] in a linear format with scales (and zero points) of small sum |error|^0.7.

    The norm is split: which part of the errors counts as outliers has a closed form (a generalised soft threshold),
    and so have the scale and the zero point of least squares for what is left, the codes held; these take turns. Each
    group keeps the best it has seen, from the fit to nearest on. Source: Badri & Shaji 2023, "Half-Quadratic
    Quantization"; they move real zero points alone, while ours are integers, so that scales move too.
    """
    grid = formats.get(format).fit(weight, None)
    assert isinstance(grid, LinearGrid)
    best, least = grid, torch.full_like(grid.scales, torch.inf)
    size = weight.abs().mean()  # the threshold is for weights around 1
    penalty = PENALTY
    for _ in range(ROUNDS):
        codes = grid.quantize(weight)
        errors = weight - grid.dequantize(codes)
        norm = _grouped(errors.abs() ** POWER, grid).sum(-1)
        better = norm < least
        least = torch.minimum(norm, least)
        scales, zeros = (torch.where(better, *pair) for pair in ((grid.scales, best.scales), (grid.zeros, best.zeros)))
        best = replace(best, scales=scales, zeros=zeros)
        large = errors.abs() / size
        outliers = errors.sign() * size * (large - large ** (POWER - 1) / penalty).clamp_min(0)
        grid = _refitted(grid, codes, weight - outliers)
        penalty *= GROWTH
    return Encoded(format, (weight.shape[0], weight.shape[1]), best.tensors(best.quantize(weight)))


def _refitted(grid: LinearGrid, codes: Tensor, wanted: Tensor) -> LinearGrid:
    """Return the grid whose values of `codes` have the least squared distance from `wanted`, first by the zero points,
    rounded to integers, then by the scales, rounded to what is stored."""
    kind = grid.format
    codes, wanted, real = (_grouped(each, grid) for each in (codes.float(), wanted, torch.ones_like(wanted)))
    zeros = grid.zeros
    if not kind.symmetric:
        zeros = ((codes - wanted / grid.scales[..., None]) * real).sum(-1) / real.sum(-1)
        zeros = zeros.round().clamp(0, 2**kind.bits - 1)
    steps = (codes - zeros[..., None]) * real
    scales = (steps * wanted).sum(-1) / steps.square().sum(-1)
    scales = torch.nan_to_num(scales, 0.0, 0.0, 0.0).to(kind.scale).float()
    return replace(grid, scales=torch.where(scales == 0, grid.scales, scales), zeros=zeros)


def _grouped(values: Tensor, grid: LinearGrid) -> Tensor:
    """Return [n, groups, values that share a scale] ([1, 1, all] if all do); columns that fill a group up are 0."""
    columns = values.shape[1]
    return pad(values, (0, grid.format.padded(columns) - columns)).reshape(*grid.scales.shape, -1)
