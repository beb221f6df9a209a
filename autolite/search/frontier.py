"""S1: levels for each layer, made of a few numbers; and the frontier that sweeping two of them gives.

The rise of the loss is taken as a sum over the blocks of a model (attention or FFN of the layers that share them), and
so are latency and size. With a price for each of these, every block's best level is found by itself: all plans on the
lower convex hull are found so, thousands in a second, and no model is run (Everett 1963, "Generalized Lagrange
Multiplier Method"). What the estimates miss, a search makes up for with weights of each setting and third of a model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autolite import registry
from autolite.architecture import LayerShape, ModelShape
from autolite.compress import resolve, shape_after
from autolite.errors import PlanError
from autolite.pareto import nondominated, spread_subset
from autolite.plan import Plan, make_step
from autolite.search.sensitivity import Damages, damages
from autolite.space import BY_LAYER, FRONTIER, PRICES, THIRDS, Params, Scalar, Space
from autolite.techniques.base import Context, Part
from autolite.techniques.mixed_precision import Block, blocks_of, origins

# Latency and size of models of these shapes.
Price = Callable[[Sequence[ModelShape]], list[tuple[float, float]]]
_GRID = {"latency": 57, "size": 29}  # prices that a sweep tries, over the range of the space's


@dataclass(frozen=True, eq=False)
class Options:
    """The combinations of levels that a block can have.

    Attributes:
        part: of the layers.
        layers: of the student, that use the block.
        sources: the teacher's layers that it comes from.
        third: of the model, in which the first of its layers is.
        names: the settings that have levels.
        levels: one of each, for each option.
        places: of these in the settings' lists of levels [options, settings].
        prices: change of latency and size by it, as parts of the teacher's [options, 2].
    """

    part: Part
    layers: tuple[int, ...]
    sources: tuple[int, ...]
    third: str
    names: tuple[str, ...]
    levels: tuple[tuple[Scalar, ...], ...]
    places: NDArray[np.int64]
    prices: NDArray[np.float64]

    def rises(self, damage: Damages) -> NDArray[np.float64]:
        """Return the rise of the loss by each setting [options, settings], if one layer's rises are `damage`."""
        each = zip(self.names, self.places.T, strict=True)
        return np.stack([damage[name][places][:, self.sources].sum(1) for name, places in each], axis=1)

    def where(self, fixed: Mapping[str, Scalar]) -> Options:
        """Return those in which these settings have these levels."""
        wanted = [i for i, each in enumerate(self.levels) if all(fixed.get(n, v) == v for n, v in self._named(each))]
        levels = tuple(self.levels[i] for i in wanted)
        return replace(self, levels=levels, places=self.places[wanted], prices=self.prices[wanted])

    def _named(self, levels: Sequence[Scalar]) -> Iterator[tuple[str, Scalar]]:
        return zip(self.names, levels, strict=True)

    def place(self, levels: Mapping[str, Sequence[Scalar]]) -> int:
        """Return the option that a plan with these levels, one for each layer, has."""
        return self.levels.index(tuple(levels[name][self.layers[0]] for name in self.names))


@dataclass(frozen=True, eq=False)
class Structure:
    """What a plan is whose levels are still open: the blocks' options; latency and size with the mildest levels, as
    parts of the teacher's [2]; and the teacher's layers, by number, of which nothing is left."""

    options: tuple[Options, ...]
    price: NDArray[np.float64]
    gone: tuple[int, ...]


@dataclass(frozen=True)
class Frontier:
    """Decodes parameters into levels for each layer of a student of `context.teacher`."""

    space: Space
    context: Context
    price: Price

    def levels(self, params: Mapping[str, Any]) -> dict[str, tuple[Scalar, ...]]:
        """Return the levels, one for each layer, of the settings that are "by-layer" in `params`.

        Raises:
            PlanError: if the rest of the plan cannot be applied.
        """
        values = self.space.complete(params)
        active = [name for name in self.space.layered if values[name] == BY_LAYER]
        if not active:
            return {}
        options = self._open(values)
        prices = (np.array([values[f"{FRONTIER}.{price}"]]) for price in PRICES)
        chosen = choose(options, self._weighted(options, values), *prices)
        found = by_layer(options, chosen[0])
        return {name: found[name] for name in active}

    def settled(self, params: Mapping[str, Any]) -> Params:
        """Return `params` with the levels themselves in the place of "by-layer": what changes beside them, such as a
        number format, then leaves them as they are.

        Raises:
            PlanError: if the rest of the plan cannot be applied.
        """
        return {**params, **self.levels(params)}

    def sweep(self, params: Mapping[str, Any], count: int) -> list[Params]:
        """Return up to `count` settings of both prices that together dominate the most of estimated loss, latency and
        size, the best first; everything else is as in `params`.

        Raises:
            PlanError: if the rest of the plan cannot be applied.
        """
        values = self.space.complete(params)
        if BY_LAYER not in values.values():
            return [values]
        options = self._open(values)
        latency, size = self.grid()
        chosen = choose(options, self._weighted(options, values), latency, size)
        _, first = np.unique(chosen, axis=0, return_index=True)
        rises = [each.rises(self.damage).sum(1) for each in options]
        points = np.column_stack([total(rises, chosen[first]), total([o.prices for o in options], chosen[first])])
        front = np.flatnonzero(nondominated(points))
        span = np.maximum(np.ptp(points[front], axis=0), 1e-12)
        scaled = (points[front] - points[front].min(0)) / span
        order = first[front[spread_subset(scaled, [1.1] * 3, count)]]
        found = [dict(zip(PRICES, (float(latency[i]), float(size[i])), strict=True)) for i in order]
        return [{**values, **{f"{FRONTIER}.{price}": value for price, value in each.items()}} for each in found]

    def grid(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the pairs of prices that a sweep tries, [prices] each."""
        axes = []
        for price in PRICES:
            low, high = map(float, self.space.settings[f"{FRONTIER}.{price}"].extremes())
            axes.append(np.geomspace(low, high, _GRID[price]))
        latency, size = (each.ravel() for each in np.meshgrid(*axes, indexing="ij"))
        return latency, size

    @property
    def damage(self) -> Damages:
        """The estimated rise of the loss, for each setting with levels by layer [levels, teacher's layers]."""
        return damages(self.space, self.context)

    def structure(self, params: Mapping[str, Any]) -> Structure:
        """Return what `params` say but for levels by layer; kept for the next trials.

        Raises:
            PlanError: if it cannot be applied.
        """
        values = self.space.complete(params)
        layered, damage = self.space.layered, self.damage
        mildest = {name: s.levels[int(damage[name].sum(1).argmin())] for name, s in layered.items()}
        free = {name for name in values if name in layered or name.startswith(f"{FRONTIER}.")}
        rest = {  # what trains changes no shape
            name: value
            for name, value in values.items()
            if name not in free and not registry.get("technique", name.partition(".")[0]).effort
        }
        known = self.context.memory.setdefault(f"structures-{[(n, s.levels) for n, s in layered.items()]}", {})
        key = json.dumps(sorted(rest.items()))
        if key not in known:
            known[key] = self._made(values, mildest, known)
        if isinstance(known[key], PlanError):
            raise known[key]
        found: Structure = known[key]
        return found

    def _made(self, values: Params, mildest: Params, known: dict[str, Any]) -> Structure | PlanError:
        """Make a structure, or return why it cannot be; blocks that are `known` from another are not priced again."""
        try:
            given = self.space.plan({**values, **mildest}, 1, self.context.seed)
            plan = resolve(given, self.context)
            base = shape_after(plan, self.context.teacher.shape)
            if len(base.stacks) != 1:
                raise PlanError(f"levels by layer need a model of one stack of layers; '{base.family}' has several")
            alike = str((blocks_of(base), base.stacks[0].layers))  # whatever the embedding and the head are
            if alike not in known:
                known[alike] = self._options(given, plan, base, mildest)
            left = {source for block in blocks_of(base) for source in block.sources}
            gone = (i for i, source in enumerate(self.context.teacher.shape.source_layers[0]) if source not in left)
            return Structure(known[alike], self._parts([base])[0], tuple(gone))
        except PlanError as error:
            return error

    def _open(self, values: Mapping[str, Any]) -> tuple[Options, ...]:
        """The blocks' options in which what is not "by-layer" is as in `values`."""
        fixed = {name: values[name] for name in self.space.layered if values[name] != BY_LAYER}
        return tuple(
            each.where({n: v[each.layers[0]] if isinstance(v, list | tuple) else v for n, v in fixed.items()})
            for each in self.structure(values).options
        )

    def _weighted(self, options: Sequence[Options], values: Mapping[str, Any]) -> list[NDArray[np.float64]]:
        found = []
        for block in options:
            weights = np.array([values[f"{FRONTIER}.{name}"] for name in block.names], dtype=np.float64)
            found.append(block.rises(self.damage) @ weights * float(values[f"{FRONTIER}.{block.third}"]))
        return found

    def _parts(self, shapes: Sequence[ModelShape]) -> NDArray[np.float64]:
        """Latency and size of models as parts of the teacher's [models, 2]."""
        key = "frontier-whole"
        if key not in self.context.memory:
            self.context.memory[key] = np.array(self.price([self.context.teacher.shape]))
        found: NDArray[np.float64] = np.array(self.price(shapes)) / self.context.memory[key]
        return found

    def _options(self, given: Plan, plan: Plan, base: ModelShape, mildest: Mapping[str, Scalar]) -> tuple[Options, ...]:
        layered, teacher = self.space.layered, self.context.teacher.shape
        count, now = len(base.stacks[0].layers), self._parts([base])[0]
        known: dict[object, NDArray[np.float64]] = {}
        made = []
        for block in blocks_of(base):
            names = tuple(name for name in layered if part_of(name) == block.part)
            if not names:
                continue
            combinations = tuple(product(*(layered[name].levels for name in names)))
            places = [[layered[n].levels.index(v) for n, v in zip(names, each, strict=True)] for each in combinations]
            alike = (block.part, count - 1 in block.layers, *(_sizes(base.stacks[0].layers[i]) for i in block.layers))
            if alike not in known:
                rows = (_in_block(block, count, dict(zip(names, each, strict=True)), mildest) for each in combinations)
                known[alike] = self._parts([self._leveled(given, plan, levels) for levels in rows]) - now
            third = THIRDS[min(3 * block.layers[0] // count, 2)]
            sources = tuple(origins(block, teacher))
            made.append(
                Options(block.part, block.layers, sources, third, names, combinations, np.array(places), known[alike])
            )
        # What is fused or cached does not quite add up, and where little is left, a little less than nothing would be:
        # changes of latency are scaled so that the fastest plan has its own.
        fastest = np.array([[int(each.prices[:, 0].argmin()) for each in made]])
        exact = self._parts([self._leveled(given, plan, by_layer(made, fastest[0]))])[0] - now
        change = total([each.prices for each in made], fastest)[0]
        factors = np.array([exact[0] / change[0] if change[0] < 0 else 1.0, 1.0])
        return tuple(replace(each, prices=each.prices * factors) for each in made)

    def _leveled(self, given: Plan, resolved: Plan, levels: Mapping[str, Sequence[Scalar]]) -> ModelShape:
        plan = resolve(_leveled(given, resolved, levels), self.context)
        return shape_after(plan, self.context.teacher.shape)


def first_plans(frontier: Frontier, count: int) -> list[Params]:
    """Return up to `count` parameters to begin a search with: the start plans of the space; and in turns, what a sweep
    finds in those that have levels by layer, and in the space's defaults. What cannot be applied to this model is left
    as it is: a trial will say why."""
    starts = [dict(start) for start in frontier.space.start]
    layered = [BY_LAYER in frontier.space.complete(start).values() for start in starts]
    fixed = [start for start, by_layer in zip(starts, layered, strict=True) if not by_layer]
    open_ = [start for start, by_layer in zip(starts, layered, strict=True) if by_layer]
    if not frontier.space.layered:
        return fixed[:count]
    structures = [*open_, {}]
    each = max(1, -(-(count - len(fixed)) // len(structures)))
    swept = []
    for params in structures:
        try:
            swept.append(frontier.sweep(params, each))
        except PlanError:
            swept.append([params])
    in_turn = [found[i] for i in range(each) for found in swept if i < len(found)]
    return [*fixed, *in_turn][:count]


def part_of(name: str) -> Part:
    """Return the part of the layers that a setting with levels by layer changes."""
    technique, _, key = name.partition(".")
    part: Part = registry.get("technique", technique).layered[key]
    return part


def _sizes(layer: LayerShape) -> LayerShape:
    return replace(layer, attention=0, feed_forward=0)


def _in_block(
    block: Block, count: int, levels: Mapping[str, Scalar], others: Mapping[str, Scalar]
) -> dict[str, list[Scalar]]:
    """Return the levels of `count` layers of which those of the block have `levels`, and the rest `others`."""
    return {name: [v if i in block.layers else others[name] for i in range(count)] for name, v in levels.items()}


def _leveled(given: Plan, resolved: Plan, levels: Mapping[str, Sequence[Scalar]]) -> Plan:
    """Return a plan with these levels, one for each layer. Only the steps that have some are still to be resolved: what
    has no effect at one level may have at another."""
    steps = []
    for before, after in zip(given.steps, resolved.steps, strict=True):
        mine = {n.partition(".")[2]: tuple(row) for n, row in levels.items() if n.partition(".")[0] == before.technique}
        steps.append(make_step(before.technique, {**before.config.model_dump(), **mine}) if mine else after)
    return replace(given, steps=tuple(steps))


def choose(
    options: Sequence[Options],
    rises: Sequence[NDArray[np.float64]],
    latency: NDArray[np.float64],
    size: NDArray[np.float64],
) -> NDArray[np.int64]:
    """Return the option [prices, blocks] of least rise plus price, for each pair of prices: what the whole of the
    teacher's latency and size are worth, in the unit of the blocks' `rises` [options]."""
    columns = []
    for block, rise in zip(options, rises, strict=True):
        costs = rise + latency[:, None] * block.prices[:, 0] + size[:, None] * block.prices[:, 1]
        columns.append(costs.argmin(1))
    return np.stack(columns, axis=1)


def total(each: Sequence[NDArray[np.float64]], chosen: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the sums [plans, ...] of what the blocks' options have, `each` [options, ...], for plans `chosen` [plans,
    blocks]."""
    found: NDArray[np.float64] = np.sum([values[places] for values, places in zip(each, chosen.T, strict=True)], axis=0)
    return found


def by_layer(options: Sequence[Options], chosen: Sequence[int] | NDArray[np.int64]) -> dict[str, tuple[Scalar, ...]]:
    """Return the levels, one for each layer, of a choice of an option for each block."""
    found: dict[str, dict[int, Scalar]] = {}
    for block, index in zip(options, chosen, strict=True):
        for name, level in zip(block.names, block.levels[index], strict=True):
            found.setdefault(name, {}).update(dict.fromkeys(block.layers, level))
    return {name: tuple(levels[i] for i in sorted(levels)) for name, levels in found.items()}
