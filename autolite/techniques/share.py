"""Cross-layer sharing: several layers use one set of weights, stored once (as in ALBERT, arXiv:1909.11942)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from autolite import plan
from autolite.architecture import LayerShape, ModelShape, numbered
from autolite.errors import PlanError
from autolite.families import family_of
from autolite.parts import attention_paths, ffn_paths, layer_modules
from autolite.surgery import clone, share_layers
from autolite.techniques.base import Context, Student, require_map


class ShareConfig(plan.Config):
    """What is shared, and by which layers.

    `groups` is the number of distinct sets of weights that are left of the shared part. Layers i of L are put in set
    floor(i * groups / L) ("sequence": neighbours share) or i mod groups ("cycle": the stack repeats), the patterns of
    arXiv:2104.06022. A set starts from the weights of its first layer or from their mean over its layers. Norms are
    never shared.
    """

    part: Literal["none", "attention", "ffn", "all"] = "none"
    pattern: Literal["sequence", "cycle"] = "sequence"
    groups: int = Field(default=1, ge=1)
    init: Literal["first", "mean"] = "first"


class Share:
    """Gives several layers one set of weights."""

    name: ClassVar[str] = "share"
    Config: ClassVar[type[plan.Config]] = ShareConfig
    numeric: ClassVar[bool] = False
    effort: ClassVar[str | None] = None
    needs_map: ClassVar[bool] = True

    def resolve(self, shape: ModelShape, config: plan.Config, context: Context) -> plan.Config:
        """Return `config` itself: nothing in it depends on the teacher."""
        return config

    def shape(self, shape: ModelShape, config: plan.Config) -> ModelShape:
        """Return the shape with the weight identities of each set made equal.

        Raises:
            PlanError: if layers of one set differ in width, or the model's architecture is not in the map.
        """
        assert isinstance(config, ShareConfig)
        if config.part != "none":
            require_map(self.name, shape)
        for index, stack in enumerate(shape.stacks):
            sets = _sets(len(stack.layers), config)
            attention, ffn = config.part in ("attention", "all"), config.part in ("ffn", "all")
            _check(stack.layers, sets, attention, ffn)
            # Sharing is transitive: a set takes along the layers that already shared with one of its own
            layers = stack.layers
            if attention:
                ids = _merge([x.attention for x in layers], sets)
                layers = tuple(replace(x, attention=i) for x, i in zip(layers, ids, strict=True))
            if ffn:
                ids = _merge([x.feed_forward for x in layers], sets)
                layers = tuple(replace(x, feed_forward=i) for x, i in zip(layers, ids, strict=True))
            shape = shape.with_layers(index, numbered(layers))
        return shape

    def apply(self, student: Student, config: plan.Config, context: Context) -> Student:
        """Return a copy of the student in which the layers of each set use the same projections.

        Raises:
            PlanError: if layers of one set differ in width.
        """
        assert isinstance(config, ShareConfig)
        shape = self.shape(student.shape, config)
        if shape == student.shape:
            return student
        model = clone(student.model)
        layers = shape.stacks[0].layers
        family = family_of(model.config)
        modules = layer_modules(model)
        attention, ffn = [x.attention for x in layers], [x.feed_forward for x in layers]
        if config.init == "mean":
            _average(modules, attention, attention_paths(family))
            _average(modules, ffn, ffn_paths(family))
        share_layers(model, attention, ffn)
        return replace(student, model=model, shape=shape)


def _sets(count: int, config: ShareConfig) -> list[int]:
    """Return for each of `count` layers the number of its set."""
    if config.groups >= count:
        return list(range(count))
    if config.pattern == "cycle":
        return [i % config.groups for i in range(count)]
    return [i * config.groups // count for i in range(count)]


def _merge(ids: Sequence[int], sets: Sequence[int]) -> list[int]:
    """Return identities such that layers of one set, and layers that had equal ones, have equal ones."""
    merged = list(ids)
    for index, group in enumerate(sets):
        ours, first = merged[index], merged[sets.index(group)]
        merged = [first if i == ours else i for i in merged]
    return merged


def _check(layers: Sequence[LayerShape], sets: Sequence[int], attention: bool, ffn: bool) -> None:
    for index, (layer, group) in enumerate(zip(layers, sets, strict=True)):
        first = sets.index(group)
        other = layers[first]
        widths, others = (layer.heads, layer.kv_heads, layer.head_dim), (other.heads, other.kv_heads, other.head_dim)
        if attention and widths != others:
            raise PlanError(
                f"share: layers {first} and {index} cannot share attention: they have {other.heads} and {layer.heads} "
                "heads. Prune by the same amount in all layers, share after grouping equal ones, or share 'ffn' only"
            )
        if ffn and layer.ffn != other.ffn:
            raise PlanError(
                f"share: layers {first} and {index} cannot share the feed-forward block: they are {other.ffn} and "
                f"{layer.ffn} wide. Prune by the same amount in all layers, or share 'attention' only"
            )


@torch.no_grad()
def _average(modules: Sequence[nn.Module], ids: Sequence[int], paths: Sequence[str]) -> None:
    """Set the parameters of the first layer with each identity to their mean over the layers with it."""
    for number in set(ids):
        members = [module for module, i in zip(modules, ids, strict=True) if i == number]
        for path in paths:
            parts = [member.get_submodule(path) for member in members]
            for name, parameter in parts[0].named_parameters():
                parameter.copy_(torch.stack([part.get_parameter(name) for part in parts]).mean(0))
