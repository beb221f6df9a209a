"""The least squares by which the matrices of a cut model imitate those of the original."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autolite.architecture import shape_of
from autolite.families import family_of, head_for
from autolite.parts import Matrix, head_of, layer_of, part
from autolite.techniques.base import Context
from autolite.techniques.elimination import Moments
from autolite.techniques.observe import real, recorded
from autolite.techniques.streams import Streams, stream_behind
from autolite.techniques.walk import Kind, Side, Use, Walk

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Block:
    """A block's kind and the layers that use its weights."""

    kind: Kind
    layers: tuple[int, ...]


class Pair:
    """A model as it is cut so far, and the original that it imitates, on the same examples.

    The model has some of the layers of the original, those numbered `kept`, and of its hidden channels those at
    `channels` (None: all). Each of its layers is followed by what followed the original's layer in `ends`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        original: PreTrainedModel,
        channels: Sequence[int] | None,
        context: Context,
        streams: Streams | None = None,
    ):
        self.model, self.original, self.channels, self.streams = model, original, channels, streams
        self.ours = Walk(model, context)
        self.theirs = self.ours if model is original else Walk(original, context)
        sources = shape_of(original).source_layers[0]
        self.kept = [sources.index(layer) for layer in shape_of(model).source_layers[0]]
        self.ends = [layer - 1 for layer in (*self.kept[1:], len(sources))]
        self.changed = [i for i, (own, end) in enumerate(zip(self.kept, self.ends, strict=True)) if own != end]

    def moments(self, blocks: Sequence[Block], side: Side) -> dict[Block, Moments]:
        """Return the moments of the projections at one side of these blocks, with the ridge; of a block that several
        layers use, summed over its uses."""
        wanted = {(block.kind, index): block for block in blocks for index in block.layers}
        theirs = [self._imitated(kind, index, side) for kind, index in wanted]
        own = {block: stacked(self.matrices(block, side)) for block in blocks}
        weights = {key: stacked(_inputs(self.original, *key)) for key in theirs} if side == "input" else {}
        sums: dict[Block, Moments] = {}
        for number, inputs in enumerate(self.ours.batches):
            uses = self.ours.observe(number, wanted, side)
            for use, target in zip(uses, self._targets(number, uses, theirs, side), strict=True):
                block = wanted[use.kind, use.layer]
                if isinstance(target, Use):
                    y = _times(real(target.input, inputs).float(), weights[target.kind, target.layer])
                else:
                    states = target if self.channels is None else target[..., self.channels]
                    y = states - real(use.stream, inputs).float()
                found = Moments.of(_with_ones(real(use.input, inputs).float(), own[block]), y)
                sums[block] = sums[block] + found if block in sums else found
        return {block: moments.damped(own[block].cpu()) for block, moments in sums.items()}

    def _targets(
        self, number: int, uses: Sequence[Use], theirs: Sequence[tuple[Kind, int]], side: Side
    ) -> Sequence[Use | Tensor]:
        """What is to be imitated in a batch: uses of the original's input projections, or its stream [tokens, width]
        behind its output projections."""
        if side == "output" and self.streams is not None:
            return [self.streams[block][number].to(self.model.device) for block in theirs]
        found = uses if self.theirs is self.ours else self.theirs.observe(number, theirs, side)
        return found if side == "input" else [stream_behind(use, self.ours.batches[number]) for use in found]

    def fit(self, block: Block, side: Side) -> None:
        """Set the projections at one side of a block to their best."""
        (moments,) = self.moments([block], side).values()
        write(self.matrices(block, side), moments.solution())

    def matrices(self, block: Block, side: Side) -> list[Matrix]:
        """The model's projections at one side of a block."""
        if side == "input":
            return _inputs(self.model, block.kind, block.layers[0])
        layer = layer_of(self.model, block.layers[0])
        return [layer.out if block.kind == "attention" else layer.ffn_out]

    def inherit_norms(self) -> None:
        """Give layers whose output is normalised the norms of those that they stand for now: after a layer, the stream
        comes out of the norm of the last one removed behind it."""
        family = family_of(self.model.config)
        if family.pre_norm or family.repeated:
            return
        channels = slice(None) if self.channels is None else list(self.channels)
        for index in self.changed:
            ours, theirs = layer_of(self.model, index).ffn_norm, layer_of(self.original, self.ends[index]).ffn_norm
            ours.weight.copy_(theirs.weight[channels])
            if ours.bias is not None and theirs.bias is not None:
                ours.bias.copy_(theirs.bias[channels])

    def _imitated(self, kind: Kind, index: int, side: Side) -> tuple[Kind, int]:
        return kind, (self.ends if (kind, side) == ("ffn", "output") else self.kept)[index]


def head_moments(
    model: PreTrainedModel,
    original: PreTrainedModel,
    batches: Sequence[dict[str, Tensor]],
    outputs: Sequence[int] | None = None,
) -> Moments:
    """Return the moments of the head's first matrix, with the ridge, at the positions that the head reads; of what the
    original's gives, only `outputs` (None: all) count."""
    own, target = _head_weight(model), _head_weight(original)
    target = target if outputs is None else target[:, list(outputs)]
    # Of what the head gives only sums are made: a language model's logits of all tokens would not fit.
    sums: Moments | None = None
    gram = torch.zeros(len(target), len(target), dtype=torch.float64)
    for inputs in batches:
        ours = _with_ones(_head_input(model, inputs), own)
        theirs = ours if model is original else _with_ones(_head_input(original, inputs), target)
        found = Moments.of(ours, theirs)
        sums = found if sums is None else sums + found
        gram += (theirs.T @ theirs).double().cpu()
    assert sums is not None
    weight = target.double().cpu()
    energy = float((weight * (gram @ weight)).sum())
    return Moments(sums.gram, sums.cross @ weight, energy).damped(own.cpu())


def stacked(matrices: Sequence[Matrix]) -> Tensor:
    """Return matrices that read the same inputs as one [k, n], the biases as its last row if they have such."""
    weight = torch.cat([m.weight.T for m in matrices], 1)
    biases = [m.bias for m in matrices if m.bias is not None]
    return torch.cat((weight, torch.cat(biases)[None])) if biases else weight


def write(matrices: Sequence[Matrix], weight: Tensor) -> None:
    """Set matrices to what `stacked` would return of them."""
    each = torch.split(weight, [len(m.weight) for m in matrices], 1)
    for matrix, columns in zip(matrices, each, strict=True):
        matrix.weight.copy_(columns[: matrix.weight.shape[1]].T)
        if matrix.bias is not None:
            matrix.bias.copy_(columns[-1])


def _inputs(model: PreTrainedModel, kind: Kind, index: int) -> list[Matrix]:
    layer = layer_of(model, index)
    return list(layer.attention_readers if kind == "attention" else layer.ffn_readers)


def _with_ones(inputs: Tensor, weight: Tensor) -> Tensor:
    """Add a column of ones to `inputs` [tokens, k] if `weight` has a row for biases."""
    return inputs if inputs.shape[1] == len(weight) else torch.cat((inputs, inputs.new_ones(len(inputs), 1)), 1)


def _times(inputs: Tensor, weight: Tensor) -> Tensor:
    return _with_ones(inputs, weight) @ weight


def _head_weight(model: PreTrainedModel) -> Tensor:
    head = head_of(model)
    weight = stacked([head.dense[0][0]])
    return weight if head.factor is None else head.factor.weight @ weight


def _head_input(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Return what the head's first matrix reads [positions, width], at the positions that count."""
    head: Any = head_for(family_of(model.config), type(model).__name__)
    with recorded([part(model, head.dense[0][0])]) as uses:
        model(**inputs)
    state = uses[0][1].float()
    if state.ndim == 2:
        return state
    if head.pooling == "last":
        mask = inputs["attention_mask"]
        last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
        return state[torch.arange(len(state), device=mask.device), last]
    return real(state, inputs)
