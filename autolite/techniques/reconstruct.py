"""Second-order pruning with reconstruction: what is left of a model is fitted to what the whole one did.

A block's output projection is a linear map of its units' activations, and its input projections are one of the channels
of the residual stream, after the norm. What removing units or channels costs in these least squares
(`autolite.techniques.elimination`) says which go, and the solution is what is left.

Blocks are taken in the order they run. X comes from the model as it is pruned so far. Y is, for input projections, what
the original's gave; for output projections, what the original adds to the residual stream, plus by how much the stream
itself is off by then: later blocks make up for earlier ones. Before layers that were removed, the stream to reach is
the one after them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from autolite.architecture import LayerShape, shape_of
from autolite.parts import head_of
from autolite.surgery import keep_heads, keep_neurons
from autolite.techniques.base import Context
from autolite.techniques.elimination import eliminate, removal_scores
from autolite.techniques.imitate import Block, Pair, head_moments, write
from autolite.techniques.importance import Importance, best
from autolite.techniques.streams import Streams
from autolite.techniques.walk import Kind

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def removal_errors(model: PreTrainedModel, context: Context) -> Importance:
    """Score units by what removing each adds to its block's error, as a part of the energy of the block's output,
    when all units go one after the other: the later, the higher. The model is not changed between blocks."""
    layers = shape_of(model).stacks[0].layers
    scores: dict[tuple[Kind, int], Tensor] = {}
    for block, moments in Pair(model, model, None, context).moments(_blocks(layers), "output").items():
        score = removal_scores([moments], *_units(layers[block.layers[0]], block.kind))
        scores |= {(block.kind, index): score for index in block.layers}
    indices = range(len(layers))
    return Importance(tuple(scores["attention", i] for i in indices), tuple(scores["ffn", i] for i in indices))


@torch.no_grad()
def channel_errors(model: PreTrainedModel, context: Context) -> Tensor:
    """Score hidden channels [hidden] by what removing each adds to the errors of all matrices that read them, each as
    a part of the energy of what it gives, when all channels go one after the other: the later, the higher. That norms
    take other statistics without them is left out."""
    stack, pair = shape_of(model).stacks[0], Pair(model, model, None, context)
    problems = list(pair.moments(_blocks(stack.layers), "input").values())
    if head_of(model).dense:
        problems.append(head_moments(model, model, pair.ours.batches))
    return removal_scores(problems, 1, stack.hidden)


@torch.no_grad()
def cut_blocks(
    model: PreTrainedModel,
    original: PreTrainedModel,
    channels: Sequence[int] | None,
    layers: Sequence[LayerShape],
    scores: Importance | None,
    context: Context,
    outputs: Sequence[int] | None = None,
    streams: Streams | None = None,
) -> None:
    """Cut the blocks of `model` to the widths of `layers` and fit what is left of each, in place and in order.

    Where channels are missing, the matrices that read them are fitted too, the head's first one among them unless it is
    the embedding.

    Args:
        model: has layers of `original`, and of its hidden channels those at `channels` (None: all).
        original: what is imitated; it stays untouched.
        channels: see there.
        layers: the shapes to reach, one a layer.
        scores: what units are chosen by; None: by what their removal costs in the least-squares problem.
        context: the calibration examples.
        outputs: which outputs of the head's own first matrix are left, if it has one (None: those at `channels`).
        streams: the original's, if they are known (`streams_of`).
    """
    pair = Pair(model, original, channels, context, streams)
    pair.inherit_norms()
    for block in _blocks(layers):
        index = block.layers[0]
        size, units = _units(shape_of(model).stacks[0].layers[index], block.kind)
        count = _units(layers[index], block.kind)[1]
        if channels is not None:
            pair.fit(block, "input")
        cut = keep_heads if block.kind == "attention" else keep_neurons
        if scores is None and count < units:
            (moments,) = pair.moments([block], "output").values()
            gone = set(eliminate([moments], size, units, units - count)[0])
            kept = [unit for unit in range(units) if unit not in gone]
            rows = (torch.tensor(kept)[:, None] * size + torch.arange(size)).flatten()
            fitted = moments.fit(torch.cat((rows, torch.arange(units * size, len(moments.gram)))))
            cut(model, index, kept)
            write(pair.matrices(block, "output"), fitted)
            continue
        if scores is not None and count < units:  # before anything is run: what goes would cost most of the time
            each = scores.heads if block.kind == "attention" else scores.neurons
            cut(model, index, best(each[index], count))
        pair.fit(block, "output")
    head = head_of(model)
    if channels is not None and len(head.dense) > head.tied:
        outputs = (channels if outputs is None else outputs) if len(head.dense) > 1 else None
        write([head.dense[0][0]], head_moments(model, original, pair.ours.batches, outputs).solution())


@torch.no_grad()
def bridge_gaps(model: PreTrainedModel, original: PreTrainedModel, context: Context) -> None:
    """Fit only the output projections next to where layers of `original` were removed, in place: that of the layer
    before a gap or, if the first layers are gone, that of the first attention block left."""
    pair = Pair(model, original, None, context)
    pair.inherit_norms()
    gaps: set[tuple[Kind, int]] = {("ffn", index) for index in pair.changed}
    if pair.kept[0] > 0:
        gaps.add(("attention", 0))
    for block in _blocks(shape_of(model).stacks[0].layers):
        if any((block.kind, index) in gaps for index in block.layers):
            pair.fit(block, "output")


def _blocks(layers: Sequence[LayerShape]) -> list[Block]:
    """All blocks in the order they first run, those that layers share once."""
    found: dict[tuple[Kind, int], list[int]] = {}
    for index, layer in enumerate(layers):
        found.setdefault(("attention", layer.attention), []).append(index)
        found.setdefault(("ffn", layer.feed_forward), []).append(index)
    return [Block(kind, tuple(indices)) for (kind, _), indices in found.items()]


def _units(layer: LayerShape, kind: Kind) -> tuple[int, int]:
    """Channels of a unit at the input of the output projection, and the number of units."""
    return (1, layer.ffn) if kind == "ffn" else (layer.heads * layer.head_dim // layer.kv_heads, layer.kv_heads)
