"""Pruning: attention heads, feed-forward neurons, hidden channels and layers are cut out, or weights set to zero.

The cuts follow the architecture map. torch-pruning's dependency graph serves for heads and neurons of BERT and ViT, but
it hangs on grouped-query attention, removes nothing from Conv1D and does not know shared layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator, Field, field_validator

from autolite import plan
from autolite.architecture import LayerShape, ModelShape, Stack, numbered
from autolite.errors import PlanError
from autolite.residual import keep_hidden
from autolite.surgery import clone, keep_heads, keep_layers, keep_neurons, moved
from autolite.techniques.allocate import Budget, allocate
from autolite.techniques.base import Context, Part, Student, require_float32, require_map
from autolite.techniques.channels import channel_importance, head_outputs
from autolite.techniques.depth import chosen_layers, nearest, spaced_layers
from autolite.techniques.importance import best, importance
from autolite.techniques.reconstruct import cut_blocks
from autolite.techniques.sparsity import Criterion, parse, unfit, zero
from autolite.techniques.streams import streams_of


def _amounts(value: float | tuple[int | float, ...]) -> float | tuple[int | float, ...]:
    each = value if isinstance(value, tuple) else (float(value),)
    counts = [isinstance(x, int) for x in each]
    if not each or any(counts) != all(counts):
        raise ValueError("give one fraction, or for each layer a fraction (0.5) or for each a count (4)")
    if any(x < 1 if isinstance(x, int) else not 0 < x <= 1 for x in each):
        raise ValueError("fractions are above 0 and at most 1, counts at least 1")
    return value


Amounts = Annotated[float | tuple[int | float, ...], AfterValidator(_amounts)]


class PruneConfig(plan.Config):
    """Settings of pruning; the fractions are those kept.

    Attributes:
        heads: fraction of each layer's heads; with grouped-query attention, of its key/value heads, each with the
            query heads that read it. Rounded to the nearest number (halves up), at least one. Or one value for each
            layer that stays: fractions if they have a decimal point (0.5), counts if they are whole (4).
        ffn: fraction of each layer's feed-forward neurons, rounded to the nearest multiple of `round_to` (halves up),
            at least one multiple and never above the original width: a layer no wider than `round_to` is not cut. Or
            one value for each layer, as `heads`.
        hidden: fraction of the residual stream's channels, rounded as `ffn`.
        round_to: what widths are multiples of; targets have widths they like. Counts are taken as they are.
        depth: fraction of the layers, rounded to the nearest number (halves up), at least one; or the indices of those
            that stay.
        layers: which layers stay. "spaced": evenly spaced, the first and the last among them; if one is kept, it is
            the first. "similarity": those whose output differs most from their input. "damage": those without which
            the loss is highest. "second-order": the same once what is left is fitted, as `reconstruct` then does
            (`autolite.techniques.depth`).
        importance: what decides which heads, neurons and channels go (`autolite.techniques.importance`).
        allocation: "uniform": each layer keeps the same fraction. "global" and "isomorphic": heads and neurons are
            ranked over all layers, together or apart, and the same number of weights stays
            (`autolite.techniques.allocate`).
        reconstruct: fit what is left of each block to what the whole model did there, by least squares on a few
            examples (`autolite.techniques.reconstruct`): the output projections and, where hidden channels go, all
            that reads them; where layers go, to the stream after them. "second-order" always does.
        sparsity: zeros in the matrices of the layers: "none", "2:4" (of four inputs in a row two are not zero) or
            "50%" (the part of zeros). For targets that gain from them; files stay as large.
        mask: what zeros are chosen by: "wanda" or "magnitude" (`autolite.techniques.sparsity`).
    """

    heads: Amounts = 1.0
    ffn: Amounts = 1.0
    hidden: float = Field(1.0, gt=0, le=1)
    round_to: int = Field(32, ge=1)
    depth: float | tuple[int, ...] = 1.0
    layers: Literal["spaced", "similarity", "damage", "second-order"] = "spaced"
    importance: Literal["taylor", "magnitude", "activation", "wanda", "fisher", "second-order"] = "taylor"
    allocation: Literal["uniform", "global", "isomorphic"] = "uniform"
    reconstruct: bool = False
    sparsity: str = "none"
    mask: Criterion = "wanda"

    @field_validator("depth")
    @classmethod
    def _some_layers(cls, depth: float | tuple[int, ...]) -> float | tuple[int, ...]:
        if isinstance(depth, tuple):
            if not depth or list(depth) != sorted(set(depth)) or depth[0] < 0:
                raise ValueError("the layers that stay are given by ascending indices, from 0")
        elif not 0 < depth <= 1:
            raise ValueError("the fraction of the layers is above 0 and at most 1")
        return depth

    @field_validator("sparsity")
    @classmethod
    def _pattern(cls, pattern: str) -> str:
        parse(pattern)
        return pattern


def kept_heads(groups: int, amount: float) -> int:
    """Return how many of `groups` attention groups stay; a whole number is that count itself."""
    return amount if isinstance(amount, int) else max(1, nearest(amount * groups))


def kept_neurons(width: int, amount: float, multiple: int) -> int:
    """Return how many of `width` feed-forward neurons or hidden channels stay; a whole number is that count itself."""
    if isinstance(amount, int):
        return amount
    return width if amount == 1 else min(width, multiple * max(1, nearest(amount * width / multiple)))


def _kept_units(setting: str, units: int, level: float) -> int:
    return kept_heads(units, level) if setting == "heads" else kept_neurons(units, level, 1)


class Prune:
    """Layers go first; then channels, heads and neurons go by their importance in what is left; zeros come last."""

    name: ClassVar[str] = "prune"
    Config: ClassVar[type[plan.Config]] = PruneConfig
    numeric: ClassVar[bool] = False
    effort: ClassVar[str | None] = None
    needs_map: ClassVar[bool] = True
    layered: ClassVar[Mapping[str, Part]] = {"heads": "attention", "ffn": "ffn"}

    def damage(self, setting: str, levels: Sequence[Any], context: Context) -> list[list[float]]:
        """Return half of the Fisher information of the units that go, in nats: for each fraction, one number a layer
        (Kwon et al. 2022)."""
        scores = importance(context.teacher, "fisher", context)
        by_layer = scores.heads if setting == "heads" else scores.neurons
        rising = [torch.cat((each.new_zeros(1), each.sort().values.cumsum(0))) / 2 for each in by_layer]
        return [
            [float(each[len(each) - 1 - _kept_units(setting, len(each) - 1, level)]) for each in rising]
            for level in levels
        ]

    def resolve(self, shape: ModelShape, config: plan.Config, context: Context) -> plan.Config:
        """Return `config` with the layers that stay and the widths of each, where the teacher decides them, and without
        what then has no effect.

        Raises:
            PlanError: if the teacher's scores do not fit what an earlier step left.
        """
        assert isinstance(config, PruneConfig)
        if _chooses_layers(config) or _allocates(config):
            require_map(self.name, shape)
        if config.depth != 1 and shape.unmapped is None:
            count = len(shape.stacks[0].layers)
            depth = _chosen(shape, config, context) if _chooses_layers(config) else config.depth
            whole = len(_kept_layers(PruneConfig(depth=depth), count)) == count
            config = config.model_copy(update={"depth": 1.0 if whole else depth})
        changes: dict[str, Any] = {}
        if config.layers == "second-order":
            changes["reconstruct"] = _fits(config)
        if _allocates(config):
            shallow = _shallow(shape, PruneConfig(depth=config.depth))
            layers = shallow.stacks[0].layers
            budget = Budget(*_widths(layers, config), config.round_to)
            found = allocate(shallow, budget, config.allocation, config.importance, context)
            changes["heads"], changes["ffn"] = found
        idle = {"layers", "allocation"}
        if (config.heads, config.ffn, config.hidden) == (1, 1, 1):
            idle |= {"importance", "round_to"} | ({"reconstruct"} if config.depth == 1 else set())
        elif config.importance == "second-order":
            idle.add("reconstruct")
        if config.sparsity == "none":
            idle.add("mask")
        return PruneConfig(**{key: value for key, value in {**dict(config), **changes}.items() if key not in idle})

    def shape(self, shape: ModelShape, config: plan.Config) -> ModelShape:
        """Return the shape after pruning.

        Raises:
            PlanError: if matrices are already in a number format or have zeros, the model's architecture is not in the
                map, layers with low-rank differences are to be fitted anew, or the settings do not fit its layers.
        """
        assert isinstance(config, PruneConfig)
        require_float32(self.name, shape)
        if not _changes(config):
            return shape
        require_map(self.name, shape)
        if _chooses_layers(config) or _allocates(config):
            raise PlanError("prune: the layers and widths that the teacher decides are not known yet; resolve the plan")
        if shape.sparsity:
            raise PlanError(
                f"prune: the layers have {', '.join(sorted(shape.sparsity))} zeros already, a pattern that cuts would "
                "break; give the sparsity in the last prune step"
            )
        relaxed = any(x.attention_rank or x.ffn_rank for stack in shape.stacks for x in stack.layers)
        if relaxed and _fits(config):
            raise PlanError(
                "prune: what layers share cannot be fitted anew beside their low-rank differences; set share.rank to "
                "0, or reconstruct to false with another importance than second-order"
            )
        shape = _shallow(shape, config)
        (stack,) = shape.stacks
        groups, widths = _widths(stack.layers, config)
        layers = tuple(
            replace(x, heads=count * x.heads // x.kv_heads, kv_heads=count, ffn=width)
            for x, count, width in zip(stack.layers, groups, widths, strict=True)
        )
        shape = shape.with_layers(0, numbered(layers))
        hidden = kept_neurons(stack.hidden, config.hidden, config.round_to)
        shape = shape.with_hidden(0, hidden) if hidden < stack.hidden else shape
        for layer in shape.stacks[0].layers:
            if (width := unfit(config.sparsity, hidden, layer)) is not None:
                raise PlanError(
                    f"prune.sparsity: {config.sparsity} does not divide inputs that are {width} wide; choose widths "
                    "that are multiples of it"
                )
        return shape.with_sparsity(config.sparsity)

    def apply(self, student: Student, config: plan.Config, context: Context) -> Student:
        """Return the pruned student; without reconstruction its output equals that of the student with the removed
        units masked to zero, norms taking their statistics over the channels that are left."""
        assert isinstance(config, PruneConfig)
        shape = self.shape(student.shape, config)
        if shape == student.shape:
            return student
        context = context.read_by(student)
        model: Any = clone(student.model)
        before, after = _shallow(student.shape, config), shape.stacks[0]
        if before != student.shape:
            keep_layers(model, _kept_layers(config, len(student.shape.stacks[0].layers)))
        if shape.with_sparsity("none") != student.shape:
            model = _narrow(student, Student(model, before), after, config, context)
        if config.sparsity != "none":
            zero(model, config.sparsity, config.mask, context)
        return replace(student, model=model, shape=shape)


def _narrow(original: Student, whole: Student, after: Stack, config: PruneConfig, context: Context) -> Any:
    """Cut `whole`, which has the layers of `original` that stay, to the widths of `after` and return its model; what
    goes is chosen by scores in it, and what is left imitates `original` if it is to be fitted."""
    before = whole.shape.stacks[0]
    model: Any = whole.model
    second_order = config.importance == "second-order"
    narrower = [(x.kv_heads, x.ffn) for x in before.layers] != [(x.kv_heads, x.ffn) for x in after.layers]
    scores = importance(whole, config.importance, context) if narrower and not second_order else None
    channels: list[int] | None = None
    outputs: list[int] | None = None
    if after.hidden < before.hidden:
        channels = best(channel_importance(whole, config.importance, context), after.hidden)
        outputs = head_outputs(model, after.hidden)
        keep_hidden(model, channels, outputs)
    if _fits(config):
        model.to(context.device)
        imitated = moved(original.model, context.device)
        cut_blocks(model, imitated, channels, after.layers, scores, context, outputs, streams_of(original, context))
        return model.cpu()
    for index, (old, new) in enumerate(zip(before.layers, after.layers, strict=True)):
        # Layers with another layer's number share its block, which is cut once, there.
        if scores is not None and new.kv_heads < old.kv_heads and new.attention == index:
            keep_heads(model, index, best(scores.heads[index], new.kv_heads))
        if scores is not None and new.ffn < old.ffn and new.feed_forward == index:
            keep_neurons(model, index, best(scores.neurons[index], new.ffn))
    return model


def _fits(config: PruneConfig) -> bool:
    """Whether what is left is fitted to what the whole model did."""
    narrower = (config.heads, config.ffn, config.hidden) != (1, 1, 1)
    shallower = config.depth != 1
    second_order = (narrower and config.importance == "second-order") or (shallower and config.layers == "second-order")
    return ((narrower or shallower) and config.reconstruct) or second_order


def _changes(config: PruneConfig) -> bool:
    amounts = (config.heads, config.ffn, config.hidden, config.depth)
    return any(amount != 1 for amount in amounts) or config.sparsity != "none"


def _chooses_layers(config: PruneConfig) -> bool:
    return config.layers != "spaced" and isinstance(config.depth, float) and config.depth < 1


def _allocates(config: PruneConfig) -> bool:
    shared_out = [isinstance(amount, float) and amount < 1 for amount in (config.heads, config.ffn)]
    return config.allocation != "uniform" and any(shared_out)


def _kept_layers(config: PruneConfig, count: int) -> tuple[int, ...]:
    """Return which of `count` layers stay, as the settings say."""
    kept = spaced_layers(count, config.depth) if isinstance(config.depth, float) else config.depth
    if kept[-1] >= count:
        raise PlanError(f"prune.depth: there is no layer {kept[-1]} to keep; the layers are 0 to {count - 1}")
    return kept


def _chosen(shape: ModelShape, config: PruneConfig, context: Context) -> tuple[int, ...]:
    """Return which layers of `shape` stay, as the teacher's own layers decide."""
    assert isinstance(config.depth, float)
    assert config.layers != "spaced"
    source, teacher = shape.source_layers[0], context.teacher.shape
    kept = max(1, nearest(config.depth * len(source)))
    if source != teacher.source_layers[0]:
        raise PlanError(
            f"prune.layers: '{config.layers}' looks at the teacher's layers, of which an earlier step removed some; "
            "choose all layers in one step, or give those that stay in depth"
        )
    return chosen_layers(context.teacher, config.layers, kept, context)


def _shallow(shape: ModelShape, config: PruneConfig) -> ModelShape:
    """Return the shape with only the layers that stay."""
    (stack,) = shape.stacks
    kept = _kept_layers(config, len(stack.layers))
    return shape.keep_layers(0, kept) if len(kept) < len(stack.layers) else shape


def _widths(layers: tuple[LayerShape, ...], config: PruneConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the attention groups and the neurons that each layer keeps.

    Raises:
        PlanError: if values for each layer are not as many as there are layers, are above what is there, or differ
            between layers that share weights.
    """
    heads = _each("heads", config.heads, len(layers))
    ffn = _each("ffn", config.ffn, len(layers))
    groups = tuple(kept_heads(x.kv_heads, amount) for x, amount in zip(layers, heads, strict=True))
    widths = tuple(kept_neurons(x.ffn, amount, config.round_to) for x, amount in zip(layers, ffn, strict=True))
    _check("heads", groups, [x.kv_heads for x in layers], [x.attention for x in layers])
    _check("ffn", widths, [x.ffn for x in layers], [x.feed_forward for x in layers])
    return groups, widths


def _each(name: str, amounts: float | tuple[int | float, ...], count: int) -> tuple[int | float, ...]:
    each = amounts if isinstance(amounts, tuple) else (amounts,) * count
    if len(each) != count:
        raise PlanError(f"prune.{name}: {len(each)} values for {count} layers; give one for each that stays")
    return each


def _check(name: str, kept: tuple[int, ...], there: list[int], weights: list[int]) -> None:
    for index, (count, most, number) in enumerate(zip(kept, there, weights, strict=True)):
        if count > most:
            raise PlanError(f"prune.{name}: layer {index} cannot keep {count} of {most}; give at most {most}")
        if count != kept[number]:
            raise PlanError(
                f"prune.{name}: layers {number} and {index} share weights and cannot keep {kept[number]} and {count}; "
                "give them equal values"
            )
