"""Levels that are fitted to weights: k-means of the values of a row or matrix, and codebooks with a scale a group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from autolite import groups as grouping

LLOYD_ROUNDS = 6  # later rounds gain less than 0.02 dB on normally distributed weights
ABOVE_MINUS_ONE = -1 + 2**-11  # in float16; only one end of the levels is the largest value's
_BINS = 2**16  # of a whole matrix's values: 256 for each step of the finest codebook
_NEAR_END = -0.9999  # values below are at the end: bins are a third as wide
_SAMPLED = 1024  # groups that a codebook of a whole matrix is fitted to
_TURNS = 10  # of fitting levels and scales
_CLIPPING = (1.0, 0.95, 0.9, 0.85, 0.8)  # ends of a group's range that are tried, as parts of its largest magnitude


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


def in_order(rows: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows' values in order and their cumulative weights and weighted sums, as `kmeans` wants them."""
    if importance is None:
        ordered = torch.from_numpy(np.sort(rows.numpy(), axis=1))  # vectorised: ten times as fast as torch.sort
        mass = torch.arange(rows.shape[1] + 1, dtype=torch.float64).expand(len(rows), -1)
        return ordered, mass, pad(ordered.double().cumsum_(dim=1), (1, 0))
    order = torch.from_numpy(np.argsort(rows.numpy(), axis=1))
    ordered, weights = rows.gather(1, order), importance.gather(1, order).double()
    return ordered, pad(weights.cumsum(dim=1), (1, 0)), pad((weights * ordered).cumsum_(dim=1), (1, 0))


def in_bins(rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the means of bins of all values, from -1 to 1, and cumulative weights and sums, as `kmeans` wants them."""
    values = rows.flatten().numpy()
    bins = np.rint((values + 1) * ((_BINS - 1) / 2)).astype(np.int32)
    mass = weights.flatten().numpy()
    found = np.stack([np.bincount(bins, weight, _BINS) for weight in (None, values, mass, mass * values)])
    count, total, *both = found[:, found[0] > 0]
    ordered = torch.from_numpy((total / count).astype(np.float32))[None]
    weight, sums = (torch.from_numpy(np.concatenate(([0.0], each.cumsum())))[None] for each in both)
    return ordered, weight, sums


def grouped(weight: Tensor, importance: Tensor | None, group: int) -> tuple[Tensor, Tensor]:
    """Return the values [n * groups, group] of a matrix [n, k] that share a scale, zeros at the end of a row, and the
    weights of their squared errors, which broadcast to that: none where all are zero, which a scale of zero is for."""
    groups, weights = grouping.split(weight, group), torch.ones(1, 1)
    if importance is not None or weight.shape[1] % group:
        importance = weights if importance is None else importance
        weights = grouping.split(importance.expand(weight.shape), group)
    used = (groups != 0).any(dim=1, keepdim=True)
    return groups, weights if used.all() else weights * used


def best_scales(groups: Tensor, weights: Tensor, levels: Tensor, signed: bool = True) -> tuple[Tensor, Tensor]:
    """Return the scales [m, 1] that round groups [m, g] to ascending levels with the least weighted squared error of
    those tried, and that error [m, 1]; `signed` ones have the sign of the largest value."""
    found = [_search_scales(part, mass, levels, signed) for part, mass in _parts(groups, weights)]
    scales, errors = (torch.cat(each) for each in zip(*found, strict=True))
    return scales, errors


def _parts(groups: Tensor, weights: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield some groups at a time, with their weights: what is searched stays in the cache."""
    count = max(1, grouping.CHUNK // groups.shape[1])
    masses = [weights] if len(weights) == 1 else list(torch.split(weights, count))
    for i, part in enumerate(torch.split(groups, count)):
        yield part, masses[min(i, len(masses) - 1)]


def _search_scales(groups: Tensor, weights: Tensor, levels: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    extreme = grouping.extreme(groups) if signed else groups.abs().amax(dim=1, keepdim=True)
    borders, best, least = middles(levels), torch.empty(0), torch.empty(0)
    for part in _CLIPPING:
        scale = grouping.stored(extreme * part, torch.bfloat16)
        rounded = levels[torch.bucketize(groups / scale, borders)]
        error = (rounded.mul_(scale).sub_(groups).square_() * weights).sum(dim=1, keepdim=True)
        better = error < least if len(best) else torch.ones_like(error, dtype=torch.bool)
        best = torch.where(better, scale, best) if len(best) else scale
        least = torch.where(better, error, least) if len(least) else error
    return best, least


def sample(groups: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
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


def in_turns(groups: Tensor, weights: Tensor, start: Tensor) -> Tensor:
    """Improve ascending levels, the last of which stays 1, and the scales of groups [m, g] in turns (Lloyd 1982)."""
    levels, count = start, len(start)
    for _ in range(_TURNS):
        scales, _ = best_scales(groups, weights, levels)
        values = groups / scales
        codes = torch.bucketize(values, middles(levels)).flatten()
        mass = (weights * (scales / scales.abs().max()).square()).double()
        counts = torch.bincount(codes, mass.flatten(), count)
        means = torch.bincount(codes, (mass * values).flatten(), count) / counts.clamp(min=1e-300)
        levels = torch.where(counts > 0, means.float(), levels).clamp(ABOVE_MINUS_ONE, 1)
        levels[-1] = 1
        levels = levels.half().float().sort().values
    return levels


def even(bits: int) -> Tensor:
    """Return the levels of a linear format, as fractions of its lowest code."""
    middle: int = 2 ** (bits - 1)
    return (torch.arange(2 * middle) - (middle - 1)) / middle


def middles(levels: Tensor) -> Tensor:
    """Return the borders between the intervals of ascending `levels` [..., count]."""
    return ((levels[..., 1:] + levels[..., :-1]) / 2).contiguous()


def _clusters(ordered: Tensor, mass: Tensor, sums: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weight of the values that are nearest to each level [n, count], and their weighted sums, float64."""
    borders = pad(torch.searchsorted(ordered, middles(levels), right=True), (1, 0))
    borders = torch.cat((borders, torch.full_like(borders[:, :1], ordered.shape[1])), dim=1)
    return mass.gather(1, borders).diff(dim=1), sums.gather(1, borders).diff(dim=1)
