"""Cross-layer sharing: several layers use one set of weights, stored once (as in ALBERT, arXiv:1909.11942)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from autolite import plan
from autolite.architecture import LayerShape, ModelShape, numbered
from autolite.errors import PlanError
from autolite.families import FAMILIES, family_of
from autolite.parts import attention_paths, ffn_paths, layer_modules
from autolite.surgery import add_deltas, clone, share_layers
from autolite.techniques import share_start
from autolite.techniques.base import Context, Student, require_float32, require_map
from autolite.techniques.share_start import Sets


class ShareConfig(plan.Config):
    """What is shared, and by which layers. Norms are never shared. ALBERT's layers are one already: nothing changes.

    The patterns are those of Takase & Kiyono 2021, arXiv:2104.06022. Of the N layers between the unshared ends, layer i
    (from 0) is put in one of M = `groups` sets:

        sequence        floor(i M / N): neighbours share
        cycle           i mod M: the stack repeats
        cycle-reversed  i mod M, but in the last cycle (i >= M (ceil(N / M) - 1)) M - 1 - i mod M

    Attributes:
        part: the blocks whose projections are shared; their biases with them, unless there is a `rank`.
        pattern: how layers are put in sets.
        groups: distinct sets of weights that are left of the layers that share; as many as there are layers, or more,
            change nothing.
        unshared_first: layers at the start of the stack that keep their own weights.
        unshared_last: layers at its end that do.
        init: what a set starts from: the weights of its "first" layer, the "mean" of all, or those of the "best", which
            used by the whole set change the logits least (`autolite.techniques.share_start.best_layers`).
        rank: each layer of a set computes with W + B A, where B A is its own and of this rank, as are the biases
            (relaxed recursion: Bae et al. 2024, arXiv:2410.20672, whose models have none). It starts from the truncated
            singular value decomposition of what sharing took from the layer. 0: without.
    """

    part: Literal["none", "attention", "ffn", "all"] = "none"
    pattern: Literal["sequence", "cycle", "cycle-reversed"] = "sequence"
    groups: int = Field(default=1, ge=1)
    unshared_first: int = Field(default=0, ge=0)
    unshared_last: int = Field(default=0, ge=0)
    init: Literal["first", "mean", "best"] = "first"
    rank: int = Field(default=0, ge=0)


class Share:
    """Gives several layers one set of weights."""

    name: ClassVar[str] = "share"
    Config: ClassVar[type[plan.Config]] = ShareConfig
    numeric: ClassVar[bool] = False
    effort: ClassVar[str | None] = None
    needs_map: ClassVar[bool] = True

    def resolve(self, shape: ModelShape, config: plan.Config, context: Context) -> plan.Config:
        """Return `config` itself: no shape depends on what a set starts from."""
        return config

    def shape(self, shape: ModelShape, config: plan.Config) -> ModelShape:
        """Return the shape with the weight identities of each set made equal.

        Raises:
            PlanError: if layers of one set differ in width or have low-rank differences already, the rank is no lower
                than that of a matrix, weights are in a number format, or the architecture map does not have the model.
        """
        assert isinstance(config, ShareConfig)
        if config.part == "none":
            return shape
        require_map(self.name, shape)
        require_float32(self.name, shape)
        for index, stack in enumerate(shape.stacks):
            sets = _sets(len(stack.layers), config)
            layers = stack.layers
            if config.part in ("attention", "all"):
                _check_attention(layers, sets)
                # Sharing is transitive: a set takes along the layers that already shared with one of its own
                before = [x.attention for x in layers]
                ids = _merge(before, sets)
                ranks = _ranks(before, ids, [x.attention_rank for x in layers], config.rank, "attention")
                layers = tuple(
                    replace(x, attention=i, attention_rank=r) for x, i, r in zip(layers, ids, ranks, strict=True)
                )
            if config.part in ("ffn", "all"):
                _check_ffn(layers, sets)
                before = [x.feed_forward for x in layers]
                ids = _merge(before, sets)
                ranks = _ranks(before, ids, [x.ffn_rank for x in layers], config.rank, "the feed-forward block")
                layers = tuple(
                    replace(x, feed_forward=i, ffn_rank=r) for x, i, r in zip(layers, ids, ranks, strict=True)
                )
            for layer in layers if config.rank else ():
                _check_rank(shape.family, stack.hidden, layer)
            shape = shape.with_layers(index, numbered(layers))
        return shape

    def apply(self, student: Student, config: plan.Config, context: Context) -> Student:
        """Return a copy of the student in which the layers of each set use the same projections.

        Raises:
            PlanError: as `shape`.
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
        before = student.shape.stacks[0].layers
        formed = {
            attention_paths(family): _formed([x.attention for x in before], attention),
            ffn_paths(family): _formed([x.feed_forward for x in before], ffn),
        }
        if len(set(formed.values())) == 1:  # both start from the same layer: its blocks suit each other
            formed = {sum(formed, ()): next(iter(formed.values()))}
        weights = share_start.weights_at(modules, formed) if config.rank else []
        for paths, sets in formed.items():
            if config.init == "mean":
                share_start.average(modules, sets, paths)
            if config.init == "best":
                share_start.adopt(modules, sets, paths, share_start.best_layers(student, sets, paths, context))
        share_layers(model, attention, ffn)
        if config.rank:
            add_deltas(model, layers)
            share_start.fit_deltas(modules, weights)
        return replace(student, model=model, shape=shape)


def _sets(count: int, config: ShareConfig) -> list[int]:
    """Return for each of `count` layers the number of its set."""
    first = min(config.unshared_first, count)
    last = min(config.unshared_last, count - first)
    inner = _pattern(count - first - last, config)
    return [*range(first), *(first + number for number in inner), *range(count - last, count)]


def _pattern(count: int, config: ShareConfig) -> list[int]:
    groups = config.groups
    if groups >= count:
        return list(range(count))
    if config.pattern == "sequence":
        return [i * groups // count for i in range(count)]
    cycle = [i % groups for i in range(count)]
    if config.pattern == "cycle-reversed":
        last = groups * (-(-count // groups) - 1)
        return cycle[:last] + [groups - 1 - number for number in cycle[last:]]
    return cycle


def _merge(ids: Sequence[int], sets: Sequence[int]) -> list[int]:
    """Return identities such that layers of one set, and layers that had equal ones, have equal ones."""
    merged = list(ids)
    for index, group in enumerate(sets):
        ours, first = merged[index], merged[sets.index(group)]
        merged = [first if i == ours else i for i in merged]
    return merged


def _formed(before: Sequence[int], after: Sequence[int]) -> Sets:
    """Return the sets that form when identities `before` become `after`: of each layer that comes to share with others
    the number of its set, else None."""
    olds: dict[int, set[int]] = {}
    for old, new in zip(before, after, strict=True):
        olds.setdefault(new, set()).add(old)
    return tuple(new if len(olds[new]) > 1 else None for new in after)


def _ranks(before: Sequence[int], after: Sequence[int], ranks: Sequence[int], rank: int, part: str) -> list[int]:
    """Return the ranks of the layers' differences when identities `before` become `after`: layers that come to share
    with others get `rank`."""
    found = []
    for index, (number, own) in enumerate(zip(_formed(before, after), ranks, strict=True)):
        if number is not None and own:
            raise PlanError(
                f"share: layer {index} has a low-rank difference of rank {own} in {part} already, which no longer fits "
                "once it shares with others; share it once"
            )
        found.append(own if number is None else rank)
    return found


def _check_attention(layers: Sequence[LayerShape], sets: Sequence[int]) -> None:
    for index, (layer, group) in enumerate(zip(layers, sets, strict=True)):
        first = sets.index(group)
        other = layers[first]
        widths, others = (layer.heads, layer.kv_heads, layer.head_dim), (other.heads, other.kv_heads, other.head_dim)
        if widths != others:
            raise PlanError(
                f"share: layers {first} and {index} cannot share attention: they have {other.heads} and {layer.heads} "
                "heads. Prune by the same amount in all layers, share after grouping equal ones, or share 'ffn' only"
            )


def _check_ffn(layers: Sequence[LayerShape], sets: Sequence[int]) -> None:
    for index, (layer, group) in enumerate(zip(layers, sets, strict=True)):
        first = sets.index(group)
        if layer.ffn != layers[first].ffn:
            raise PlanError(
                f"share: layers {first} and {index} cannot share the feed-forward block: they are {layers[first].ffn} "
                f"and {layer.ffn} wide. Prune by the same amount in all layers, or share 'attention' only"
            )


def _check_rank(family: str, hidden: int, layer: LayerShape) -> None:
    width = layer.heads * layer.head_dim
    keys = width if FAMILIES[family].fused_qkv else layer.kv_heads * layer.head_dim
    for rank, most in ((layer.attention_rank, min(hidden, width, keys)), (layer.ffn_rank, min(hidden, layer.ffn))):
        if rank >= most:
            raise PlanError(
                f"share.rank: {rank} is no less than {most}, the full rank of a matrix that is shared; a difference of "
                "low rank pays far below that"
            )
