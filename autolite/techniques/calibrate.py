"""Ranges of activations, for products whose inputs are quantized by a fixed scale instead of each call's own."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from autolite.techniques.base import Context
from autolite.techniques.teacher import forward, to_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXAMPLES, BATCH = 256, 16
SAMPLE = 2**14  # values a batch that a range is fitted to; the extremes are exact
SHRINK = tuple(1 - i / 20 for i in range(13))  # parts of the full range that are tried

Ranges = dict[str, tuple[float, float]]


def input_ranges(model: PreTrainedModel, keys: Collection[str], context: Context) -> Ranges:
    """Return the range (low, high) of the inputs of each product whose weight's parameter is in `keys`.

    It is the part of what training examples show that has the least squared error when quantized to 8 bits: rare
    extremes are clipped where that pays. It holds 0, which must be exact. A weight that several layers share has one
    range for all of them. Padding is not looked at.
    """
    context.teacher.model.train(False)
    rng = torch.Generator().manual_seed(context.seed)
    chosen = torch.randperm(len(context.train), generator=rng)[:EXAMPLES].numpy()
    batches = context.task.batches(context.train.take(chosen), BATCH, context.pad_id)
    samples: dict[str, list[torch.Tensor]] = {key: [] for key in keys}
    mask: list[torch.Tensor] = []

    def watch(key: str, values: torch.Tensor) -> None:
        real = values.detach()
        if mask and real.ndim == 3 and real.shape[:2] == mask[0].shape:
            real = real[mask[0]]
        flat = real.flatten().float().cpu()
        picked = flat[torch.randint(len(flat), (min(SAMPLE, len(flat)),), generator=rng)]
        samples[key].append(torch.cat((picked, flat.min()[None], flat.max()[None])))

    with ExitStack() as hooks, torch.no_grad():
        for key, module in _owners(model, keys):
            hooks.callback(
                module.register_forward_pre_hook(lambda _, args, key=key: watch(key, args[0])).remove,
            )
        device = model.device
        for batch in islice(batches, EXAMPLES // BATCH):
            inputs, _ = to_tensors(batch, str(device))
            mask[:] = [inputs["attention_mask"].bool()] if "attention_mask" in inputs else []
            forward(model, inputs, hidden=False)
    return {key: fitted(torch.cat(values)) for key, values in samples.items()}


def fitted(values: torch.Tensor) -> tuple[float, float]:
    """Return the range around zero whose 256 even steps have the least squared error on `values`, which must hold
    their extremes."""
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


def grid(low: float, high: float) -> tuple[float, int]:
    """Return the scale and the zero point of unsigned 8-bit codes for a range that holds 0."""
    scale = (high - low) / 255
    return scale, round(-low / scale)


def _owners(model: PreTrainedModel, keys: Collection[str]) -> Iterator[tuple[str, Any]]:
    parameters: Mapping[str, Any] = dict(model.named_parameters())
    wanted = {id(parameters[key]): key for key in keys}
    for module in model.modules():
        key = wanted.get(id(getattr(module, "weight", None)))
        if key is not None and not isinstance(module, torch.nn.Embedding):
            yield key, module
