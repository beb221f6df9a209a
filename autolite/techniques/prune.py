"""Structured pruning: whole attention heads, feed-forward neurons and layers are cut out."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field

from autolite import plan
from autolite.architecture import ModelShape, numbered
from autolite.surgery import clone, keep_heads, keep_layers, keep_neurons
from autolite.techniques.base import Context, Student, require_float32, require_map
from autolite.techniques.importance import importance


class PruneConfig(plan.Config):
    """Settings of structured pruning; the fractions are those kept, the same in every layer.

    Attributes:
        heads: fraction of each layer's heads; with grouped-query attention, of its key/value heads, each with the
            query heads that read it. Rounded to the nearest number (halves up), at least one.
        ffn: fraction of each layer's feed-forward neurons, rounded to the nearest multiple of `round_to` (halves up),
            at least one multiple and never above the original width: a layer no wider than `round_to` is not cut.
        round_to: what feed-forward widths are multiples of; targets have widths they like.
        depth: fraction of the layers, rounded to the nearest number (halves up), at least one. Those kept are evenly
            spaced and include the first and the last; if one is kept, it is the first.
        importance: what decides which heads and neurons go: "taylor" or "magnitude" (`autolite.techniques.importance`).
    """

    heads: float = Field(1.0, gt=0, le=1)
    ffn: float = Field(1.0, gt=0, le=1)
    round_to: int = Field(32, ge=1)
    depth: float = Field(1.0, gt=0, le=1)
    importance: Literal["taylor", "magnitude"] = "taylor"


def kept_heads(groups: int, fraction: float) -> int:
    """Return how many of `groups` attention groups stay."""
    return max(1, _nearest(fraction * groups))


def kept_neurons(width: int, fraction: float, multiple: int) -> int:
    """Return how many of `width` feed-forward neurons stay."""
    return width if fraction == 1 else min(width, multiple * max(1, _nearest(fraction * width / multiple)))


def kept_layers(layers: int, fraction: float) -> tuple[int, ...]:
    """Return which of `layers` layers stay."""
    count = max(1, _nearest(fraction * layers))
    step = (layers - 1) / max(1, count - 1)
    return tuple(_nearest(index * step) for index in range(count))


def _nearest(value: float) -> int:
    return math.floor(value + 0.5)


class Prune:
    """Layers go first; then heads and neurons go by their importance in what is left."""

    name: ClassVar[str] = "prune"
    Config: ClassVar[type[plan.Config]] = PruneConfig
    numeric: ClassVar[bool] = False
    effort: ClassVar[str | None] = None
    needs_map: ClassVar[bool] = True

    def resolve(self, shape: ModelShape, config: plan.Config, context: Context) -> plan.Config:
        """Return `config` itself: nothing in it depends on the teacher."""
        return config

    def shape(self, shape: ModelShape, config: plan.Config) -> ModelShape:
        """Return the shape after pruning.

        Raises:
            PlanError: if matrices are already in a number format, or the model's architecture is not in the map.
        """
        assert isinstance(config, PruneConfig)
        require_float32(self.name, shape)
        if (config.heads, config.ffn, config.depth) == (1, 1, 1):
            return shape
        require_map(self.name, shape)
        for number, stack in enumerate(shape.stacks):
            kept = kept_layers(len(stack.layers), config.depth)
            if len(kept) < len(stack.layers):
                shape = shape.keep_layers(number, kept)
            layers = []
            for layer in shape.stacks[number].layers:
                groups = kept_heads(layer.kv_heads, config.heads)
                heads = groups * layer.heads // layer.kv_heads
                ffn = kept_neurons(layer.ffn, config.ffn, config.round_to)
                layers.append(replace(layer, heads=heads, kv_heads=groups, ffn=ffn))
            shape = shape.with_layers(number, numbered(layers))
        return shape

    def apply(self, student: Student, config: plan.Config, context: Context) -> Student:
        """Return the pruned student; its output equals that of the student with the removed units masked to zero."""
        assert isinstance(config, PruneConfig)
        shape = self.shape(student.shape, config)
        if shape == student.shape:
            return student
        context = context.read_by(student)
        model = clone(student.model)
        (before,), (after,) = student.shape.stacks, shape.stacks
        kept = kept_layers(len(before.layers), config.depth)
        if len(kept) < len(before.layers):
            keep_layers(model, kept)
        if (config.heads, config.ffn) == (1, 1):
            return replace(student, model=model, shape=shape)
        shallow = Student(model, student.shape.keep_layers(0, kept))
        scores = importance(shallow, config.importance, context)
        for index, (old, new) in enumerate(zip(shallow.shape.stacks[0].layers, after.layers, strict=True)):
            # Layers with another layer's number share its block, which is cut once, there.
            if new.kv_heads < old.kv_heads and new.attention == index:
                keep_heads(model, index, _best(scores.heads[index], new.kv_heads))
            if new.ffn < old.ffn and new.feed_forward == index:
                keep_neurons(model, index, _best(scores.neurons[index], new.ffn))
        return replace(student, model=model, shape=shape)


def _best(scores: torch.Tensor, count: int) -> list[int]:
    """The indices of the `count` highest scores, ascending; of equal ones the first."""
    return sorted(torch.argsort(scores, descending=True, stable=True)[:count].tolist())
