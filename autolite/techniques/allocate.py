"""How many heads and neurons each layer keeps when they are ranked over all layers instead of in each."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import torch

from autolite.architecture import LayerShape, ModelShape
from autolite.errors import PlanError
from autolite.families import FAMILIES
from autolite.techniques.base import Context
from autolite.techniques.importance import Importance, Kind, importance

Allocation = Literal["uniform", "global", "isomorphic"]
ADDITIVE = ("taylor", "fisher")  # in the loss's own unit, so that scores of different blocks compare


@dataclass(frozen=True)
class Budget:
    """The uniform counts that set how much is kept: attention groups and neurons of each layer."""

    heads: tuple[int, ...]
    ffn: tuple[int, ...]
    round_to: int


@dataclass(frozen=True)
class _Part:
    """What goes at once: attention groups or neurons of a block, with its weights and score for each weight."""

    block: tuple[str, int]
    units: int
    cost: int
    score: float


def allocate(
    shape: ModelShape, budget: Budget, allocation: Allocation, kind: Kind, context: Context
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the attention groups and the neurons that each layer of `shape` keeps.

    "global" ranks all units of all layers in one list, "isomorphic" attention groups in one and neurons in another
    (Fang et al. 2024, "Isomorphic Pruning for Vision Models"). The least important go until as many weights are left
    as `budget` would leave, those of shared blocks counted for each layer. Scores are the teacher's for each weight;
    where they do not compare between blocks (all but Taylor, Fisher and second-order, which is an error relative to
    the block's output), relative to their block's mean. Every layer keeps one group and one multiple of neurons.

    Raises:
        PlanError: if a block's width is not the teacher's any more, so that its scores do not fit.
    """
    (stack,) = shape.stacks
    scores = importance(context.teacher, kind, context)
    heads = {x.attention: x.kv_heads for x in stack.layers}
    ffn = {x.feed_forward: x.ffn for x in stack.layers}
    parts, wanted = list[_Part](), {"attention": 0, "ffn": 0}
    for index, layer in enumerate(stack.layers):
        for name, first, count in (
            ("attention", layer.attention, budget.heads[index]),
            ("ffn", layer.feed_forward, budget.ffn[index]),
        ):
            units, cost = _units(shape, layer, name)
            wanted[name] += (units - count) * cost
            if first == index:
                uses = sum((x.attention if name == "attention" else x.feed_forward) == index for x in stack.layers)
                found = _block_scores(shape, scores, name, index, kind, context)
                parts += _parts((name, index), found, cost * uses, uses, 1 if name == "attention" else budget.round_to)
    for group in [("attention", "ffn")] if allocation == "global" else [("attention",), ("ffn",)]:
        left = sum(wanted[name] for name in group)
        for part in sorted((p for p in parts if p.block[0] in group), key=lambda p: p.score):
            if part.cost > 2 * left:  # nearer to the budget without it
                break
            left -= part.cost
            (heads if part.block[0] == "attention" else ffn)[part.block[1]] -= part.units
    return tuple(heads[x.attention] for x in stack.layers), tuple(ffn[x.feed_forward] for x in stack.layers)


def _units(shape: ModelShape, layer: LayerShape, name: str) -> tuple[int, int]:
    """The units of a layer's block and the weights of one."""
    hidden, family = shape.stacks[0].hidden, FAMILIES[shape.family]
    if name == "attention":
        return layer.kv_heads, 2 * hidden * layer.head_dim * (layer.heads + layer.kv_heads) // layer.kv_heads
    return layer.ffn, (3 if family.ffn_gate else 2) * hidden


def _parts(block: tuple[str, int], scores: torch.Tensor, cost: int, uses: int, multiple: int) -> list[_Part]:
    """Cut a block's units, the least important first, into parts that can go: what is above a multiple, then
    multiples, of which the last stays. Scores are for each weight, of all `uses`."""
    ranked = scores.double().sort().values / cost * uses
    width = len(ranked)
    bounds = [0, width % multiple, *range(width % multiple + multiple, width, multiple)]
    pairs = itertools.pairwise(bounds)
    return [_Part(block, b - a, (b - a) * cost, float(ranked[a:b].mean()) / uses) for a, b in pairs if a < b < width]


def _block_scores(
    shape: ModelShape, scores: Importance, name: str, index: int, kind: Kind, context: Context
) -> torch.Tensor:
    """The teacher's scores of the block whose weights are those of the layer at `index`, summed over the teacher's
    blocks that its layers came from."""
    teacher = context.teacher.shape
    layers, origins = shape.stacks[0].layers, teacher.source_layers[0]

    def number(layer: LayerShape) -> int:
        return layer.attention if name == "attention" else layer.feed_forward

    members = [origins.index(s) for s, x in zip(shape.source_layers[0], layers, strict=True) if number(x) == index]
    blocks = sorted({number(teacher.stacks[0].layers[i]) for i in members})
    found = torch.stack([(scores.heads if name == "attention" else scores.neurons)[i].double() for i in blocks]).sum(0)
    units = _units(shape, layers[index], name)[0]
    if len(found) != units:
        raise PlanError(
            f"prune.allocation: layer {index} has {units} units left of the teacher's {len(found)}, whose scores it is "
            "allocated by; prune once, or give the counts themselves"
        )
    return found if kind in (*ADDITIVE, "second-order") else found / found.mean()
