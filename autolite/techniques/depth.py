"""Which layers stay: by place, by how much they change the hidden state, or by what their absence does to the loss,
with what is left as it is or fitted."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn import functional as F

from autolite.cache import remember, remembered
from autolite.parts import layer_modules
from autolite.surgery import clone, keep_layers
from autolite.techniques.base import Context, Student
from autolite.techniques.importance import scored_on
from autolite.techniques.observe import BATCH, hidden_input, hidden_output, real, sample
from autolite.techniques.reconstruct import bridge_gaps
from autolite.techniques.teacher import forward, to_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_REVISION = 1  # of what is computed here: what is kept of another one is not read

Choice = Literal["spaced", "similarity", "damage", "second-order"]


def nearest(value: float) -> int:
    """Return the nearest whole number, halves up."""
    return math.floor(value + 0.5)


def spaced_layers(layers: int, fraction: float) -> tuple[int, ...]:
    """Return which of `layers` layers stay: evenly spaced, the first and the last among them."""
    count = max(1, nearest(fraction * layers))
    step = (layers - 1) / max(1, count - 1)
    return tuple(nearest(index * step) for index in range(count))


def chosen_layers(student: Student, choice: Choice, count: int, context: Context) -> tuple[int, ...]:
    """Return the `count` layers that stay, ascending, from `context.memory` or the user's cache folder if these weights
    were looked at before.

    "similarity": those of the largest block influence. "damage": layers are skipped one after the other, each time the
    one without which the loss on the calibration examples is least. "second-order": the same with every gap bridged by
    the output projection before it (`autolite.techniques.reconstruct.bridge_gaps`), and the loss on other examples than
    those that it is fitted to, which it flatters, unless the training split has no others.
    """
    layers = len(student.shape.stacks[-1].layers)
    scored = scored_on(student, context)
    key = f"{scored}-layers-{choice}"
    if choice == "similarity":
        if key not in context.memory:
            context.memory[key] = block_influence(student.model, context)
        ranked = torch.argsort(context.memory[key], stable=True).tolist()
        return tuple(sorted(ranked[layers - count :]))
    gone: list[int] = context.memory.get(key, [])
    if len(gone) < layers - count:  # it takes a minute, which other processes and later runs need not spend again
        named = [scored, context.training_data(), choice, _REVISION]
        known = max(gone, remembered("layers", named) or [], key=len)
        gone = context.memory[key] = _removed(student, choice, layers - count, known, context)
        remember("layers", named, gone)
    return tuple(index for index in range(layers) if index not in gone[: layers - count])


def _removed(student: Student, choice: Choice, count: int, gone: list[int], context: Context) -> list[int]:
    """Return the `count` layers that go first, in order, of which some are known, `gone`."""
    layers, gone = range(len(student.shape.stacks[-1].layers)), list(gone)
    original: Any = clone(student.model) if choice == "second-order" and len(gone) < count else None
    if original is not None:
        original.to(context.device).train(False)
    while len(gone) < count:
        left = [index for index in layers if index not in gone]
        tried = {index: [i for i in left if i != index] for index in left}
        losses = {index: _loss(student.model, kept, original, context) for index, kept in tried.items()}
        gone.append(min(left, key=lambda index: losses[index]))
    return gone


@torch.no_grad()
def block_influence(model: PreTrainedModel, context: Context) -> torch.Tensor:
    """Return 1 - cos(input, output) of each layer's hidden states [layers], the mean over tokens that are no padding.

    Source: Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect".
    """
    twin: Any = clone(model)
    twin.to(context.device).train(False)
    changes: list[torch.Tensor] = []
    inputs: dict[str, torch.Tensor] = {}
    tokens = 0

    def compare(_: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        nonlocal tokens
        before, after = (real(x, inputs).float() for x in (hidden_input(arguments, keywords), hidden_output(output)))
        changes.append((1 - F.cosine_similarity(before, after, dim=-1)).sum())
        tokens += len(before)

    for layer in dict.fromkeys(layer_modules(twin)):
        layer.register_forward_hook(compare, with_kwargs=True)
    total = torch.zeros(())
    for batch in context.task.batches(sample(context), BATCH, context.pad_id):
        changes.clear()
        inputs, _ = to_tensors(batch, context.device)
        forward(twin, inputs, hidden=False)
        total = total + torch.stack(changes).cpu()
    return total / (tokens / len(total))


@torch.no_grad()
def _loss(model: PreTrainedModel, kept: list[int], original: Any | None, context: Context) -> float:
    """The task's loss on the calibration examples with only these layers; on others with gaps bridged, if there is an
    `original` to imitate."""
    twin: Any = clone(model)
    keep_layers(twin, kept)
    twin.to(context.device).train(False)
    if original is not None:
        bridge_gaps(twin, original, context)
    total, split = 0.0, sample(context, others=original is not None)
    for batch in context.task.batches(split, BATCH, context.pad_id):
        inputs, labels = to_tensors(batch, context.device)
        logits, _ = forward(twin, inputs, hidden=False)
        total += float(context.task.loss(logits, labels)) * len(batch.indices)
    return total / len(split)
