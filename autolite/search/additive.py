"""S2: what levels cost is taken to add up, is learned from every plan that was evaluated, and says what to try next.

At first the costs are the estimates of S0. Each evaluated plan corrects them (Bayesian linear regression). Tried next
is what is predicted to add the most hypervolume, among a sweep of the corrected costs (S1) and the plans on the front
with one or two levels switched.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from numpy.typing import ArrayLike, NDArray

from autolite import registry
from autolite.errors import PlanError
from autolite.pareto import gains, nondominated
from autolite.search.frontier import Frontier, Structure, by_layer, choose, part_of, total
from autolite.search.samplers import SAMPLERS
from autolite.search.sensitivity import Damages
from autolite.space import FRONTIER, Params, Scalar, Space
from autolite.techniques.base import Part

SPREAD = 1.0  # of a cost about its estimate, as a part of it
UNKNOWN = 0.02  # the spread of a cost that there is no estimate of
LEAST = 1e-3  # and of one whose estimate is zero
PRECISE = 3e-3  # the least standard error of a plan's quality
MISFIT = 0.1  # costs do not quite add up: spread of what was observed about the sum, as a part of it
WORST = 0.15  # of the quality lost, from which on a plan is worth nothing, if most lose less
WORST_TRAINED = 0.6  # the same before most of the training: what lost 0.42 in a screen lost 0.08 in time (CLINC150)
CHANCE = 0.02  # quality that scores tell apart poorly: what loses less is hardly better
OPTIMISM = (1.0, 0.5, 0.25, 0.1)  # factors of what plans are predicted to lose, if none is predicted to add anything
SURE, DRAWN = 8, 4  # after so many plans, costs are drawn from their posterior for one proposal of so many
SWITCHES = 128  # plans with one or two switched levels
LOOKED_AT = 64  # of the plans that add most: whether they are new
STRUCTURES = 8  # neighbours of the front's structures that are looked at beside them

Feature = tuple[str, str, int]  # kind, name and number; kinds are "level <i>", "gone", "shared" and "value <v>"


@dataclass(frozen=True)
class Observation:
    """An evaluated plan: its parameters, settled; the quality it lost with the standard error of that; and its other
    objectives, to be minimised: logarithms of latency and size as parts of the teacher's [2]."""

    params: Params
    lost: float
    error: float
    prices: tuple[float, float]


def corrected(
    estimates: NDArray[np.float64],
    unknown: NDArray[np.float64],
    used: NDArray[np.float64],
    lost: NDArray[np.float64],
    errors: NDArray[np.float64],
    rng: np.random.Generator | None = None,
    least: float = WORST,
) -> NDArray[np.float64]:
    """Return the costs [features] that the evaluated plans make likely: their posterior mean, or with `rng` a draw from
    the posterior (Thompson 1933; by Matheron's rule), with which what is unknown gets its turn.

    A priori each cost is its estimate times one scale for all, give or take `SPREAD` of that and `unknown`; what a plan
    loses is the sum of its costs, give or take `MISFIT` of it and its standard error. Costs are not negative.

    Args:
        estimates: of the costs, in any unit [features].
        unknown: spread of each beside that, in the unit of `lost` [features].
        used: how much of each feature the plans have [plans, features].
        lost: by the plans [plans].
        errors: standard errors of that [plans].
        rng: the source of randomness of a draw.
        least: what a plan may lose at least before nothing is learned from how much it is (`worst`).
    """
    if not len(lost):
        return estimates
    noise = np.hypot(MISFIT * lost, errors)
    precision = 1 / noise
    predicted = used @ estimates
    # Of plans that are ruined, what they lose no longer grows with what it is predicted to be.
    weights = precision**2 * (lost <= worst(lost, least))
    norm = (weights * predicted**2).sum()
    scale = max(float((weights * predicted * lost).sum() / norm), 1e-3) if norm > 0 else 1.0
    width = SPREAD * scale * estimates + unknown
    prior, seen = scale * estimates, lost
    if rng is not None:
        prior = prior + width * rng.standard_normal(len(prior))
        seen = seen + noise * rng.standard_normal(len(seen))
    left = used * width * precision[:, None]
    # Fewer plans than features: the smaller of both equivalent systems.
    change = left.T @ np.linalg.solve(left @ left.T + np.eye(len(lost)), (seen - used @ prior) * precision)
    return np.maximum(prior + width * change, 0)


def worst(lost: NDArray[np.float64], least: float) -> float:
    """Return what a plan may lose to be worth something, where others lost so much: `least`, or their median."""
    return max(least, float(np.median(lost))) if len(lost) else least


def tolerated(trains: bool, allowed: float = 0.0) -> float:
    """Return what a plan may lose in any case: what the user allows, but no less than `WORST`, or than `WORST_TRAINED`
    if it trains on after this."""
    return max(WORST_TRAINED if trains else WORST, allowed)


def log_lost(lost: ArrayLike) -> NDArray[np.float64]:
    """Return by what plans are compared that lost so much: its logarithm, flat below `CHANCE`.

    Training makes what plans lose smaller by a like factor for all (5 to 8 from 40 to 1000 steps on CLINC150, for plans
    that had lost 0.19 to 0.42). So it is ratios that last, and a plan that has lost twice as much is as much behind
    among the poor as it is among the good.
    """
    return np.log(np.maximum(lost, 0) + CHANCE)


def draws(seen: int) -> bool:
    """Whether costs are drawn, for a proposal after so many plans, and not the likeliest ones."""
    return seen >= SURE and seen % DRAWN == 0


@dataclass(frozen=True)
class Costs:
    """What the parts of a plan cost in quality. `damage` are the costs of levels [levels, teacher's layers] for each
    setting with levels by layer, `others` those of the other features."""

    damage: Damages
    others: Mapping[Feature, float]

    def of(self, frontier: Frontier, params: Mapping[str, Any], structure: Structure) -> float:
        """Return what a plan of this structure costs beside its levels."""
        return sum(self.others.get(f, 0.0) * much for f, much in _others(frontier, params, structure).items())


def learn(frontier: Frontier, seen: Sequence[Observation], rng: np.random.Generator | None = None) -> Costs:
    """Return the costs that the evaluated plans make likely, or with `rng` a draw of them (`corrected`)."""
    damage = frontier.damage
    estimates: dict[Feature, float] = {
        (f"level {level}", name, layer): float(estimate)
        for name, table in damage.items()
        for (level, layer), estimate in np.ndenumerate(table)
    }
    for (part, layer), estimate in _of_removal(damage).items():
        estimates |= {("gone", part, layer): estimate, ("shared", part, layer): estimate}
    structures = [frontier.structure(each.params) for each in seen]
    rows = [
        {**_levels(frontier, each.params, structure), **_others(frontier, each.params, structure)}
        for each, structure in zip(seen, structures, strict=True)
    ]
    for feature in itertools.chain(*rows):
        estimates.setdefault(feature, 0.0)
    index = {feature: place for place, feature in enumerate(estimates)}
    used = np.zeros((len(seen), len(index)))
    for place, row in enumerate(rows):
        for feature, much in row.items():
            used[place, index[feature]] = much
    unknown = np.array([UNKNOWN if feature[0].startswith("value") else LEAST for feature in index])
    lost = np.array([max(each.lost, 0.0) for each in seen])
    errors = np.array([max(each.error, PRECISE) for each in seen])
    prior = np.array(list(estimates.values()))
    costs = corrected(prior, unknown, used, lost, errors, rng, tolerated(frontier.space.trains))
    found, begin = {}, 0
    for name, table in damage.items():
        found[name] = costs[begin : begin + table.size].reshape(table.shape)
        begin += table.size
    others = {feature: float(costs[place]) for feature, place in index.items() if place >= begin}
    return Costs(found, others)


def _of_removal(damage: Damages) -> dict[tuple[Part, int], float]:
    """Return, for each part of each of the teacher's layers, an estimate of what it costs to lose it: that of its
    strongest levels."""
    found: dict[tuple[Part, int], float] = {}
    for name, table in damage.items():
        for layer, estimate in enumerate(table.max(0)):
            key = part_of(name), layer
            found[key] = found.get(key, 0.0) + float(estimate)
    return found


def _levels(frontier: Frontier, params: Mapping[str, Any], structure: Structure) -> dict[Feature, float]:
    """Return the features of a plan that are levels of layers."""
    found: dict[Feature, float] = {}
    layered = frontier.space.layered
    for block in structure.options:
        for name in block.names:
            value = params[name]
            level = value[block.layers[0]] if isinstance(value, list | tuple) else value
            place = layered[name].levels.index(level)
            for source in block.sources:
                found[f"level {place}", name, source] = 1.0
    return found


def _others(frontier: Frontier, params: Mapping[str, Any], structure: Structure) -> dict[Feature, float]:
    """Return the features of a plan that are not: layers that are gone, or have a block together with others, and the
    values of other settings."""
    found: dict[Feature, float] = {}
    for part in {block.part for block in structure.options}:
        for layer in structure.gone:
            found["gone", part, layer] = 1.0
    for block in structure.options:
        for source in block.sources if len(block.sources) > 1 else ():
            found["shared", block.part, source] = 1 - 1 / len(block.sources)
    for name, value in structural(frontier.space, params).items():
        if value != frontier.space.settings[name].extremes()[0]:  # the first choice costs nothing
            found[f"value {value}", name, 0] = 1.0
    return found


def structural(space: Space, params: Mapping[str, Any]) -> dict[str, Scalar]:
    """Return the searched settings that are the same for all layers, and no matter of training."""
    return {
        name: value
        for name, value in params.items()
        if name not in space.layered
        and not name.startswith(f"{FRONTIER}.")
        and not registry.get("technique", name.partition(".")[0]).effort
    }


@dataclass(frozen=True)
class _Candidates:
    """Plans of one structure: the option of each block [plans, blocks]; the quality predicted to be lost and the
    logarithms of both prices [plans, 3]."""

    params: Params
    structure: Structure
    chosen: NDArray[np.int64]
    points: NDArray[np.float64]


def propose(
    frontier: Frontier,
    seen: Sequence[Observation],
    is_new: Callable[[Params], bool],
    columns: Sequence[int],
    within: tuple[float, float],
    rng: np.random.Generator,
    allowed: float = 0.0,
) -> Params | None:
    """Return the parameters of the plan that is predicted to add the most hypervolume; None if there is nothing new.

    Args:
        frontier: of which the space, the estimates and the prices are used.
        seen: what was evaluated, and for what is evaluated just now what is predicted.
        is_new: whether a plan of such parameters can be made, and is not tried already.
        columns: of (quality lost, latency, size), the objectives.
        within: limits of latency and size, as parts of the teacher's.
        rng: the source of randomness.
        allowed: what a plan may lose by the user's word.
    """
    believed = learn(frontier, seen)
    costs = learn(frontier, seen, rng) if draws(len(seen)) else believed
    lost = np.array([_smoothed(frontier, believed, each) for each in seen])
    points = np.column_stack([log_lost(lost), np.array([each.prices for each in seen]).reshape(-1, 2)])
    best = nondominated(points[:, columns]) if len(seen) else np.zeros(0, bool)
    parents = [each for each, good in zip(seen, best, strict=True) if good]
    found = list(_candidates(frontier, costs, parents, rng))
    if not found:
        return None
    offered = np.concatenate([each.points for each in found])
    most = log_lost(worst(lost, tolerated(frontier.space.trains, allowed)))
    reference = np.array([most, *np.maximum(points[:, 1:].max(0, initial=0), 0)]) + 1e-6
    outside = (offered[:, 1:] > np.log(np.array(within))).any(1)
    owners = np.repeat(np.arange(len(found)), [len(each.points) for each in found])
    starts = np.cumsum([0, *(len(each.points) for each in found)])
    places = list(columns)
    for optimism in OPTIMISM:
        hoped = np.column_stack([log_lost(optimism * offered[:, 0]), offered[:, 1:]])
        gain = gains(hoped[:, places], points[best][:, places], reference[places].tolist())
        gain[outside] = 0
        order = np.argsort(-gain, kind="stable")
        for place in order[gain[order] > 0][:LOOKED_AT]:
            each = found[owners[place]]
            params = {**each.params, **by_layer(each.structure.options, each.chosen[place - starts[owners[place]]])}
            if is_new(params):
                return params
    return None


def predicted(frontier: Frontier, costs: Costs, params: Params) -> Observation:
    """Return what is predicted of a plan, settled.

    Raises:
        PlanError: if it cannot be applied.
    """
    structure = frontier.structure(params)
    rows = {name: _each_layer(frontier, structure, params[name]) for name in frontier.space.layered}
    chosen = np.array([[block.place(rows) for block in structure.options]])
    ((lost, latency, size),) = _points(frontier, costs, params, structure, chosen)
    return Observation(params, lost, MISFIT, (latency, size))


def _smoothed(frontier: Frontier, costs: Costs, seen: Observation) -> float:
    """Return what a plan is believed to lose: the mean of what was observed and what is predicted, each by its
    precision. Else what was lucky would look like a plan worth varying."""
    expected = predicted(frontier, costs, seen.params).lost
    misfit, error = max(MISFIT * expected, 1e-6), max(seen.error, 1e-6)
    return float(np.average([seen.lost, expected], weights=[error**-2, misfit**-2]))


def _each_layer(frontier: Frontier, structure: Structure, value: Any) -> Sequence[Scalar]:
    count = 1 + max(layer for block in structure.options for layer in block.layers)
    return value if isinstance(value, list | tuple) else [value] * count


def _points(
    frontier: Frontier, costs: Costs, params: Params, structure: Structure, chosen: NDArray[np.int64]
) -> NDArray[np.float64]:
    rises = [block.rises(costs.damage).sum(1) for block in structure.options]
    lost = total(rises, chosen) + costs.of(frontier, params, structure)
    prices = structure.price + total([block.prices for block in structure.options], chosen)
    return np.column_stack([lost, np.log(np.maximum(prices, 1e-6))])


def _candidates(
    frontier: Frontier, costs: Costs, parents: Sequence[Observation], rng: np.random.Generator
) -> Iterator[_Candidates]:
    """Yield the sweeps of all structures that are looked at, and the front's plans with levels switched."""
    latency, size = frontier.grid()
    for params in _structures(frontier, parents, rng):
        try:
            structure = frontier.structure(params)
        except PlanError:
            continue
        rises = [block.rises(costs.damage).sum(1) for block in structure.options]
        chosen = np.unique(choose(structure.options, rises, latency, size), axis=0)
        yield _Candidates(params, structure, chosen, _points(frontier, costs, params, structure, chosen))
    for parent in parents:
        structure = frontier.structure(parent.params)
        rows = {name: _each_layer(frontier, structure, parent.params[name]) for name in frontier.space.layered}
        own = np.array([block.place(rows) for block in structure.options])
        chosen = _switched(structure, own, -(-SWITCHES // len(parents)), rng)
        points = _points(frontier, costs, parent.params, structure, chosen)
        yield _Candidates(structural(frontier.space, parent.params), structure, chosen, points)


def _switched(structure: Structure, own: NDArray[np.int64], count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return `count` plans [plans, blocks] like `own` with one or two blocks' options changed in one setting each."""
    plans = np.repeat(own[None], count, axis=0)
    for plan in plans:
        for place in rng.permutation(len(own))[: rng.integers(1, 3)]:
            levels = structure.options[place].places
            near = np.flatnonzero((levels != levels[plan[place]]).sum(1) == 1)
            if len(near):
                plan[place] = rng.choice(near)
    return plans


def _structures(frontier: Frontier, parents: Sequence[Observation], rng: np.random.Generator) -> list[Params]:
    """Return the structures of the front, and of the space's start plans; and some that differ from them in one
    setting."""
    space = frontier.space
    found: dict[tuple[tuple[str, Scalar], ...], Params] = {}

    def add(params: Mapping[str, Any]) -> None:
        given = structural(space, space.complete(params))
        found.setdefault(tuple(sorted(given.items())), given)

    for params in (*(each.params for each in parents), *space.start, {}):
        add(params)
    mothers, trial = list(found.values()), _random_trial(rng)
    for number in range(STRUCTURES if mothers[0] else 0):
        params = mothers[rng.integers(len(mothers))]
        name = sorted(params)[rng.integers(len(params))]
        add({**params, name: space.settings[name].suggest(trial, f"{number} {name}")})
    return list(found.values())


def _random_trial(rng: np.random.Generator) -> optuna.Trial:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.create_study(sampler=SAMPLERS["random"](int(rng.integers(2**31)))).ask()
