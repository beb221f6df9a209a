"""Ranges of activations, for products whose inputs are quantized by a fixed scale instead of each call's own."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch

from autolite.techniques.base import Context
from autolite.techniques.inputs import examples, owners, real
from autolite.techniques.teacher import forward, to_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXAMPLES = 256
SAMPLE = 2**14  # values a batch that a range is fitted to; the extremes are exact
SHRINK = tuple(1 - i / 20 for i in range(13))  # parts of the full range that are tried
PERCENTILE = 99.99  # of the values are inside, half of the others on each side
BINS, LEVELS = 2048, 256  # of the histogram over [-t, t], and of the codes it is compared with

Method = Literal["minmax", "percentile", "mse", "entropy"]
METHODS: tuple[Method, ...] = get_args(Method)
Ranges = dict[str, tuple[float, float]]


def input_ranges(model: PreTrainedModel, keys: Collection[str], context: Context, method: Method = "mse") -> Ranges:
    """Return the range (low, high) of the inputs of each product whose weight's parameter is in `keys`.

    It is what `method` (one of the functions below) makes of the inputs that training examples give. A weight that
    several layers share has one range for all of them. Padding is not looked at.
    """
    context.teacher.model.train(False)
    rng = torch.Generator().manual_seed(context.seed)
    samples: dict[str, list[torch.Tensor]] = {key: [] for key in keys}
    extremes: dict[str, list[torch.Tensor]] = {key: [] for key in keys}
    mask: torch.Tensor | None = None

    def watch(key: str, values: torch.Tensor) -> None:
        flat = real(values, mask).flatten().float().cpu()
        picked = torch.randint(len(flat), (min(SAMPLE, len(flat)),), generator=rng)
        samples[key].append(flat[picked])
        extremes[key] += [flat.min(), flat.max()]

    with ExitStack() as hooks, torch.no_grad():
        for key, module in owners(model, keys):
            hooks.callback(
                module.register_forward_pre_hook(lambda _, args, key=key: watch(key, args[0])).remove,
            )
        for batch in examples(context, EXAMPLES):
            inputs, _ = to_tensors(batch, str(model.device))
            mask = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
            forward(model, inputs, hidden=False)
    return {key: fitted(torch.cat(samples[key]), torch.stack(extremes[key]), method) for key in keys}


def fitted(sample: torch.Tensor, extremes: torch.Tensor, method: Method) -> tuple[float, float]:
    """Return the range that `method` makes of a sample of values and their extremes, widened to hold 0, which must be
    exact."""
    methods: dict[Method, Callable[[torch.Tensor, torch.Tensor], tuple[float, float]]] = {
        "minmax": minmax,
        "percentile": percentile,
        "mse": mse,
        "entropy": entropy,
    }
    low, high = methods[method](sample, extremes)
    low, high = min(low, 0.0), max(high, 0.0)
    return (low, high) if low < high else (0.0, 1.0)


def minmax(sample: torch.Tensor, extremes: torch.Tensor) -> tuple[float, float]:
    """Return the extremes: nothing is clipped."""
    return float(extremes.min()), float(extremes.max())


def percentile(sample: torch.Tensor, extremes: torch.Tensor) -> tuple[float, float]:
    """Return the range that holds 99.99 % of the sample, with half of the others on each side."""
    out = (100 - PERCENTILE) / 2
    low, high = np.percentile(sample.numpy(), [out, 100 - out])
    return float(low), float(high)


def mse(sample: torch.Tensor, extremes: torch.Tensor) -> tuple[float, float]:
    """Return the part of the full range whose 256 even steps have the least squared error on the sample with its
    extremes: rare extremes are clipped where that pays."""
    values = torch.cat((sample, extremes))
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    if low == high:
        return 0.0, 1.0
    best, least = (low, high), float("inf")
    for part in SHRINK:
        scale, zero = grid(low * part, high * part)
        codes = (values / scale + zero).round_().clamp_(0, 255)
        error = float(((codes - zero) * scale - values).square_().sum())
        if error < least:
            best, least = (low * part, high * part), error
    return best


def entropy(sample: torch.Tensor, extremes: torch.Tensor) -> tuple[float, float]:
    """Return the range [-t, t], cut to the extremes, that loses the least information: of the histogram of 2048 bins,
    the distribution clipped at t is compared, by Kullback-Leibler divergence, with the same in 256 levels.

    Source: Migacz 2017, "8-bit Inference with TensorRT"; details as in ONNX Runtime's calibrator.
    """
    values = torch.cat((sample, extremes)).numpy()
    widest = float(np.abs(values).max())
    if widest == 0:
        return 0.0, 1.0
    counts, edges = np.histogram(values, BINS, (-widest, widest))
    middle, before = BINS // 2, np.concatenate(([0], counts.cumsum()))
    best, least = (-widest, widest), np.inf
    for half in range(LEVELS // 2, middle + 1):
        start, end = middle - half, min(middle + half + 1, BINS)
        inside = counts[start:end]
        wanted = inside.astype(np.float64)
        wanted[0] += before[start]
        wanted[-1] += before[-1] - before[end]
        found = _merged(inside, (wanted > 0).astype(np.int64))
        divergence = _divergence(wanted, found)
        if divergence < least:
            best, least = (float(edges[start]), float(edges[end])), divergence
    return max(best[0], float(extremes.min())), min(best[1], float(extremes.max()))


def _merged(counts: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Return the histogram as 256 levels show it: each level's count over its bins in use, in every one of its bins.

    The last level counts the bins that are left over too, but is not spread over them.
    """
    width = len(counts) // LEVELS
    starts, whole = np.arange(LEVELS) * width, width * LEVELS
    totals, bins = np.add.reduceat(counts, starts), np.add.reduceat(used[:whole], starts)
    levels = np.floor(totals / np.maximum(bins, 1))
    return np.concatenate((levels.repeat(width), np.zeros(len(counts) - whole)))


def _divergence(wanted: np.ndarray, found: np.ndarray, small: float = 1e-4) -> float:
    """Return KL(wanted || found) in nats after giving empty bins `small`, taken from the others."""
    both = []
    for counts in (wanted, found):
        empty = counts == 0
        if empty.all():
            return float("inf")
        taken = small * empty.sum() / (~empty).sum()
        smooth = np.where(empty, small, counts - taken)
        if (smooth <= 0).any():
            return float("inf")
        both.append(smooth / smooth.sum())
    return float((both[0] * np.log(both[0] / both[1])).sum())


def grid(low: float, high: float) -> tuple[float, int]:
    """Return the scale and the zero point of unsigned 8-bit codes for a range that holds 0."""
    scale = (high - low) / 255
    return scale, round(-low / scale)
