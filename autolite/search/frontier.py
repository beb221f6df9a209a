"""S1: levels for each layer, made of a few numbers; and the frontier that sweeping two of them gives.

The rise of the loss is taken as a sum over the blocks of a model (attention or FFN of the layers that share them), and
so are latency and size. With a price for each of these, every block's best level is found by itself: all plans on the
lower convex hull are found so, thousands in a second, and no model is run (Everett 1963, "Generalized Lagrange
Multiplier Method"). What the estimates miss, a search makes up for with weights of each setting and third of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from autolite import registry
from autolite.architecture import LayerShape, ModelShape
from autolite.compress import resolve, shape_after
from autolite.errors import PlanError
from autolite.pareto import nondominated, spread_subset
from autolite.plan import Plan, make_step
from autolite.search.sensitivity import damages
from autolite.space import BY_LAYER, FRONTIER, PRICES, THIRDS, Params, Scalar, Space
from autolite.techniques.base import Context, Part
from autolite.techniques.mixed_precision import Block, blocks_of, origins

# Latency and size of a model of this shape, as parts of the teacher's.
Price = Callable[[ModelShape], tuple[float, float]]
_GRID = {"latency": 57, "size": 29}  # prices that a sweep tries, over the range of the space's


@dataclass(frozen=True, eq=False)
class Options:
    """The combinations of levels that a block can have.

    Attributes:
        layers: of the student, that use the block.
        third: of the model, in which the first of them is.
        names: the settings that have levels.
        levels: one of each, for each option.
        errors: estimated rise of the loss in nats by each setting [options, settings].
        prices: change of latency and size by it, as parts of the teacher's [options, 2].
    """

    layers: tuple[int, ...]
    third: str
    names: tuple[str, ...]
    levels: tuple[tuple[Scalar, ...], ...]
    errors: NDArray[np.float64]
    prices: NDArray[np.float64]


@dataclass(frozen=True)
class Frontier:
    """Decodes parameters into levels for each layer of a student of `context.teacher`."""

    space: Space
    context: Context
    price: Price

    def levels(self, params: Mapping[str, Scalar]) -> dict[str, tuple[Scalar, ...]]:
        """Return the levels, one for each layer, of the settings that are "by-layer" in `params`.

        Raises:
            PlanError: if the rest of the plan cannot be applied.
        """
        values = self.space.complete(params)
        options = self._options(values)
        if not options:
            return {}
        chosen = _choose(options, values, *(np.array([values[f"{FRONTIER}.{price}"]]) for price in PRICES))
        return _by_layer(options, chosen[0])

    def sweep(self, params: Mapping[str, Scalar], count: int) -> list[Params]:
        """Return up to `count` settings of both prices that together dominate the most of estimated loss, latency and
        size, the best first; everything else is as in `params`.

        Raises:
            PlanError: if the rest of the plan cannot be applied.
        """
        values = self.space.complete(params)
        options = self._options(values)
        if not options:
            return [values]
        grids = []
        for price in PRICES:
            setting = self.space.settings[f"{FRONTIER}.{price}"]
            assert setting.low is not None
            assert setting.high is not None
            grids.append(np.geomspace(setting.low, setting.high, _GRID[price]))
        latency, size = (each.ravel() for each in np.meshgrid(*grids, indexing="ij"))
        chosen = _choose(options, values, latency, size)
        _, first = np.unique(chosen, axis=0, return_index=True)
        points = np.array([_estimate(options, chosen[i]) for i in first])
        front = first[nondominated(points)]
        points = np.array([_estimate(options, chosen[i]) for i in front])
        span = np.maximum(np.ptp(points, axis=0), 1e-12)
        scaled = (points - points.min(0)) / span
        order = spread_subset(scaled, [1.1] * 3, count)
        found = [dict(zip(PRICES, (float(latency[front[i]]), float(size[front[i]])), strict=True)) for i in order]
        return [{**values, **{f"{FRONTIER}.{price}": value for price, value in each.items()}} for each in found]

    def _options(self, values: Mapping[str, Scalar]) -> list[Options]:
        """Return every block's options; the same for all prices and weights, and kept for the next trials."""
        active = [name for name in self.space.layered if values[name] == BY_LAYER]
        structure = sorted((name, value) for name, value in values.items() if not name.startswith(f"{FRONTIER}."))
        key = f"frontier-options-{structure}-{[(name, self.space.layered[name].levels) for name in active]}"
        if active and key not in self.context.memory:
            self.context.memory[key] = self._made(values, active)
        found: list[Options] = self.context.memory[key] if active else []
        return found

    def _made(self, values: Mapping[str, Scalar], active: Sequence[str]) -> list[Options]:
        damage = damages(self.space, self.context)
        levels = {name: self.space.layered[name].levels for name in active}
        mildest = {name: levels[name][int(damage[name].sum(1).argmin())] for name in active}
        given = self.space.plan({**values, **mildest}, 1, self.context.seed)
        plan = resolve(given, self.context)
        teacher = self.context.teacher.shape
        base = shape_after(plan, teacher)
        if len(base.stacks) != 1:
            raise PlanError(f"levels by layer need a model of one stack of layers; '{base.family}' has several")
        count, (now, total) = len(base.stacks[0].layers), (np.array(self.price(shape)) for shape in (base, teacher))
        known: dict[object, NDArray[np.float64]] = {}
        made = []
        for block in blocks_of(base):
            names = tuple(name for name in active if _part(name) == block.part)
            if not names:
                continue
            combinations = tuple(product(*(levels[name] for name in names)))
            sources = origins(block, teacher)
            errors = np.array(
                [
                    [damage[n][levels[n].index(v), sources].sum() for n, v in zip(names, each, strict=True)]
                    for each in combinations
                ]
            )
            alike = (block.part, count - 1 in block.layers, *(_sizes(base.stacks[0].layers[i]) for i in block.layers))
            if alike not in known:
                plans = (_with(given, plan, names, each, mildest, block, count) for each in combinations)
                shapes = (shape_after(resolve(each, self.context), teacher) for each in plans)
                known[alike] = np.array([self.price(shape) for shape in shapes]) - now
            third = THIRDS[min(3 * block.layers[0] // count, 2)]
            made.append(Options(block.layers, third, names, combinations, errors, known[alike] / total))
        return made


def seeds(frontier: Frontier, count: int) -> list[Params]:
    """Return up to `count` parameters to begin a search with: the start plans of the space; and in turns, what a sweep
    finds in those that have levels by layer, and in the space's defaults."""
    starts = [dict(start) for start in frontier.space.start]
    layered = [BY_LAYER in frontier.space.complete(start).values() for start in starts]
    fixed = [start for start, by_layer in zip(starts, layered, strict=True) if not by_layer]
    open_ = [start for start, by_layer in zip(starts, layered, strict=True) if by_layer]
    if not frontier.space.layered:
        return fixed[:count]
    structures = [*open_, {}]
    each = max(1, -(-(count - len(fixed)) // len(structures)))
    swept = [frontier.sweep(params, each) for params in structures]
    in_turn = [found[i] for i in range(each) for found in swept if i < len(found)]
    return [*fixed, *in_turn][:count]


def _part(name: str) -> Part:
    technique, _, key = name.partition(".")
    part: Part = registry.get("technique", technique).layered[key]
    return part


def _sizes(layer: LayerShape) -> LayerShape:
    return replace(layer, attention=0, feed_forward=0)


def _with(
    given: Plan,
    resolved: Plan,
    names: Sequence[str],
    levels: Sequence[Scalar],
    others: Mapping[str, Scalar],
    block: Block,
    count: int,
) -> Plan:
    """Return a plan in which the layers of a block have these levels, and the others theirs. Only the steps that have
    levels are still to be resolved: what has no effect at one level may have at another."""
    wanted = dict(zip(names, levels, strict=True))
    steps = []
    for before, after in zip(given.steps, resolved.steps, strict=True):
        changes = {
            name.partition(".")[2]: tuple(level if i in block.layers else others[name] for i in range(count))
            for name, level in wanted.items()
            if name.partition(".")[0] == before.technique
        }
        steps.append(make_step(before.technique, {**before.config.model_dump(), **changes}) if changes else after)
    return replace(given, steps=tuple(steps))


def _choose(
    options: Sequence[Options], values: Mapping[str, Scalar], latency: NDArray[np.float64], size: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Return the option [prices, blocks] of least estimated loss plus price, for each pair of prices in nats for the
    whole of the teacher's latency and size."""
    columns = []
    for block in options:
        weights = np.array([values[f"{FRONTIER}.{name}"] for name in block.names], dtype=np.float64)
        error = (block.errors @ weights) * float(values[f"{FRONTIER}.{block.third}"])
        costs = error + latency[:, None] * block.prices[:, 0] + size[:, None] * block.prices[:, 1]
        columns.append(costs.argmin(1))
    return np.stack(columns, axis=1)


def _estimate(options: Sequence[Options], chosen: NDArray[np.int64]) -> tuple[float, float, float]:
    """Return the estimated rise of the loss, and the changes of latency and size, of a choice for each block."""
    error = sum(float(block.errors[i].sum()) for block, i in zip(options, chosen, strict=True))
    latency, size = np.sum([block.prices[i] for block, i in zip(options, chosen, strict=True)], axis=0)
    return error, float(latency), float(size)


def _by_layer(options: Sequence[Options], chosen: NDArray[np.int64]) -> dict[str, tuple[Scalar, ...]]:
    found: dict[str, dict[int, Scalar]] = {}
    for block, index in zip(options, chosen, strict=True):
        for name, level in zip(block.names, block.levels[index], strict=True):
            found.setdefault(name, {}).update(dict.fromkeys(block.layers, level))
    return {name: tuple(levels[i] for i in sorted(levels)) for name, levels in found.items()}
