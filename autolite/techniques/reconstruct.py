"""Second-order pruning with reconstruction: what is left of a block is fitted to what the whole block did.

A block's output projection is a linear map Y = X W + b of its units' activations X [tokens, k]. With G = X'X and the
ridge d, the error ||Y - X W||^2 + d ||W - W0||^2 has its least at W = (G + dI)^-1 (X'Y + d W0), and forcing the rows S
of W to zero raises it by tr(W_S' (H_SS)^-1 W_S), H = (G + dI)^-1, if all others move to their new best. Units are
removed one at a time by that loss, exactly, and H is updated by a block elimination. Sources: Hassibi & Stork 1992,
"Optimal Brain Surgeon"; Frantar & Alistarh 2022, "Optimal Brain Compression"; for heads and neurons as units, Kurtic
et al. 2023, "ZipLM".

Blocks are taken in the order they run. X comes from the model as it is pruned so far, and Y is what the original adds
to the residual stream, plus by how much the stream itself is off by then: later blocks make up for earlier ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from autolite.architecture import LayerShape, shape_of
from autolite.parts import Matrix, layer_of
from autolite.surgery import keep_heads, keep_neurons
from autolite.techniques.base import Context
from autolite.techniques.importance import Importance, best
from autolite.techniques.observe import real
from autolite.techniques.walk import Kind, Walk

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DAMPING = 0.01  # the ridge, as a part of the mean of G's diagonal
FLUSH = 64  # eliminations that are collected before H is updated by one product


@dataclass(frozen=True)
class Block:
    """A block's kind and the layers that use its weights."""

    kind: Kind
    layers: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Moments:
    """What the least squares of one block need, in float64: `gram` = X'X + dI [k, k], `cross` = X'Y + d W0 [k, n] and
    `energy` = ||Y||^2 + d ||W0||^2. A bias is the last row of W, whose column of X is all ones."""

    gram: Tensor
    cross: Tensor
    energy: float

    @classmethod
    def of(cls, inputs: Tensor, outputs: Tensor, weight: Tensor, damping: float = DAMPING) -> Moments:
        """Return the moments of inputs X [tokens, k] and outputs Y [tokens, n] for weights W0 [k, n]."""
        x, y = inputs.double(), outputs.double()
        return cls(x.T @ x, x.T @ y, float(y.square().sum())).damped(weight, damping)

    def damped(self, weight: Tensor, damping: float = DAMPING) -> Moments:
        """Add the ridge towards `weight` [k, n]."""
        weight = weight.double()
        ridge = max(damping * float(self.gram.diagonal().mean()), 1e-12)
        gram = self.gram + ridge * torch.eye(len(self.gram), dtype=torch.float64)
        return Moments(gram, self.cross + ridge * weight, self.energy + ridge * float(weight.square().sum()))

    def error(self, weight: Tensor) -> float:
        """Return the error of weights [k, n]."""
        weight = weight.double()
        fit = (weight * (self.gram @ weight)).sum() - 2 * (weight * self.cross).sum()
        return self.energy + float(fit)

    def fit(self, rows: Tensor) -> Tensor:
        """Return the weights [len(rows), n] of least error if all other rows are zero."""
        factor = torch.linalg.cholesky(self.gram[rows][:, rows])
        return torch.cholesky_solve(self.cross[rows], factor)


def eliminate(moments: Moments, size: int, units: int, count: int) -> tuple[list[int], list[float]]:
    """Remove `count` of `units` units, each `size` neighbouring rows of W, greedily by what each removal costs.

    Returns the units in the order they go, and the error that each adds. Rows after the units' (a bias) always stay.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments.gram))
    weight = inverse @ moments.cross
    blocks = torch.stack([inverse[u * size : (u + 1) * size, u * size : (u + 1) * size] for u in range(units)])
    alive = torch.ones(units, dtype=torch.bool)
    left, right = inverse.new_zeros(len(inverse), 0), inverse.new_zeros(0, len(inverse))
    order: list[int] = []
    losses: list[float] = []
    for _ in range(count):
        rows = weight[: units * size].view(units, size, -1)
        if size == 1:
            costs = rows.square().sum((1, 2)) / blocks[:, 0, 0]
        else:
            costs = (rows * torch.linalg.solve(blocks, rows)).sum((1, 2))
        unit = int(costs.masked_fill(~alive, torch.inf).argmin())
        order.append(unit)
        losses.append(float(costs[unit]))
        alive[unit] = False
        span = slice(unit * size, (unit + 1) * size)
        column = inverse[:, span] - left @ right[:, span]  # [k, size] of H as it is now
        update = torch.linalg.solve(column[span], column.T)  # (H_SS)^-1 H_S: what H loses is column @ update
        weight.addmm_(column, torch.linalg.solve(column[span], weight[span]), alpha=-1)
        weight[span] = 0
        ours = column[: units * size].view(units, size, size)
        blocks -= ours @ update[:, : units * size].view(size, units, size).permute(1, 0, 2)
        blocks[unit] = torch.eye(size, dtype=torch.float64)
        left, right = torch.cat((left, column), 1), torch.cat((right, update), 0)
        if left.shape[1] >= FLUSH:
            inverse -= left @ right
            left, right = left[:, :0], right[:0]
    return order, losses


@torch.no_grad()
def removal_errors(model: PreTrainedModel, context: Context) -> Importance:
    """Score units by what removing each adds to its block's error, as a part of the energy of the block's output,
    when all units go one after the other: the later, the higher. The model is not changed between blocks."""
    stack = shape_of(model).stacks[0]
    blocks = [block for index in range(len(stack.layers)) for block in _blocks_of(stack.layers, index)]
    scores: dict[tuple[Kind, int], Tensor] = {}
    walk = Walk(model, context)
    for block, moments in _moments(walk, walk, None, blocks).items():
        size, units = _units(stack.layers[block.layers[0]], block.kind)
        order, losses = eliminate(moments, size, units, units - 1)
        order += [unit for unit in range(units) if unit not in set(order)]
        # Strictly rising, so that ranking by score gives the order back.
        rising = torch.tensor([0.0, *losses], dtype=torch.float64).cummax(0).values.roll(-1)
        rising[-1] = 2 * rising[-2] if losses else 1.0
        score = torch.empty(units, dtype=torch.float64)
        score[order] = rising / moments.energy * (1 + 1e-9 * torch.arange(units, dtype=torch.float64))
        for index in block.layers:
            scores[block.kind, index] = score
    layers = range(len(stack.layers))
    return Importance(tuple(scores["attention", i] for i in layers), tuple(scores["ffn", i] for i in layers))


@torch.no_grad()
def cut_blocks(
    model: PreTrainedModel,
    original: PreTrainedModel,
    channels: Sequence[int] | None,
    layers: Sequence[LayerShape],
    scores: Importance | None,
    context: Context,
) -> None:
    """Cut the blocks of `model` to the widths of `layers` and fit what is left of each, in place and in order.

    Args:
        model: has the layers of `original`, and of its hidden channels those at `channels` (None: all).
        original: what is imitated; it stays untouched.
        channels: see there.
        layers: the shapes to reach, one a layer.
        scores: what units are chosen by; None: by what their removal costs in the least-squares problem.
        context: the calibration examples.
    """
    ours, theirs = Walk(model, context), Walk(original, context)
    for index in range(len(layers)):
        for block in _blocks_of(layers, index):
            before, after = shape_of(model).stacks[0].layers[index], layers[index]
            size, units = _units(before, block.kind)
            count = _units(after, block.kind)[1]
            (moments,) = _moments(ours, theirs, channels, [block]).values()
            if scores is None:
                gone = set(eliminate(moments, size, units, units - count)[0])
                kept = [unit for unit in range(units) if unit not in gone]
            else:
                kept = best((scores.heads if block.kind == "attention" else scores.neurons)[index], count)
            rows = (torch.tensor(kept)[:, None] * size + torch.arange(size)).flatten()
            fitted = moments.fit(torch.cat((rows, torch.arange(units * size, len(moments.gram)))))
            if count < units:
                (keep_heads if block.kind == "attention" else keep_neurons)(model, index, kept)
            matrix = _output(model, index, block.kind)
            matrix.weight.copy_(fitted[: len(rows)].T)
            if matrix.bias is not None:
                matrix.bias.copy_(fitted[-1])


def _blocks_of(layers: Sequence[LayerShape], index: int) -> list[Block]:
    """The blocks whose weights are those of the layer at `index`, not of an earlier one."""
    attention = tuple(i for i, x in enumerate(layers) if x.attention == index)
    ffn = tuple(i for i, x in enumerate(layers) if x.feed_forward == index)
    found = [Block("attention", attention)] if attention else []
    return [*found, Block("ffn", ffn)] if ffn else found


def _units(layer: LayerShape, kind: Kind) -> tuple[int, int]:
    """Channels of a unit at the input of the output projection, and the number of units."""
    return (1, layer.ffn) if kind == "ffn" else (layer.heads * layer.head_dim // layer.kv_heads, layer.kv_heads)


def _output(model: PreTrainedModel, index: int, kind: Kind) -> Matrix:
    layer = layer_of(model, index)
    return layer.out if kind == "attention" else layer.ffn_out


def _moments(ours: Walk, theirs: Walk, channels: Sequence[int] | None, blocks: Sequence[Block]) -> dict[Block, Moments]:
    """Return the moments of these blocks of our model for the outputs of theirs; of a block that several layers use,
    summed over its uses."""
    wanted = {(block.kind, index): block for block in blocks for index in block.layers}
    sums: dict[Block, Moments] = {}
    for number, inputs in enumerate(ours.batches):
        uses = ours.observe(number, wanted)
        targets = uses if ours is theirs else theirs.observe(number, wanted)
        for use, target in zip(uses, targets, strict=True):
            states = target.stream + target.output
            output = (states if channels is None else states[..., channels]) - use.stream
            x, y = real(use.input, inputs).float(), real(output, inputs).float()
            if _output(ours.model, use.layer, use.kind).bias is not None:
                x = torch.cat((x, x.new_ones(len(x), 1)), 1)
            gram, cross, energy = (x.T @ x).double().cpu(), (x.T @ y).double().cpu(), float(y.square().sum())
            block = wanted[use.kind, use.layer]
            if (known := sums.get(block)) is not None:
                gram, cross, energy = gram + known.gram, cross + known.cross, energy + known.energy
            sums[block] = Moments(gram, cross, energy)
    found = {}
    for block, moments in sums.items():
        matrix = _output(ours.model, block.layers[0], block.kind)
        rows = [matrix.weight.T] if matrix.bias is None else [matrix.weight.T, matrix.bias[None]]
        found[block] = moments.damped(torch.cat(rows).cpu())
    return found
