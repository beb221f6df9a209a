"""The additive model: corrections against the textbook's formula, and proposals."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autolite.pareto import hypervolume
from autolite.search.additive import (
    LEAST,
    MISFIT,
    SPREAD,
    WORST,
    Observation,
    corrected,
    learn,
    predicted,
    propose,
)
from autolite.search.frontier import Frontier
from autolite.space import Params, Space
from tests.search.layers import context_of, price

pytestmark = pytest.mark.usefixtures("own_cache")


@given(st.integers(0, 1000), st.integers(1, 12))
def test_costs_are_the_posterior_mean_of_bayesian_linear_regression(seed: int, plans: int) -> None:
    rng = np.random.default_rng(seed)
    estimates, unknown = rng.uniform(0, 0.3, 8), np.full(8, LEAST)
    used = rng.integers(0, 2, (plans, 8)).astype(float)
    used[:, 0] = 1  # nobody has nothing
    lost, errors = rng.uniform(0.01, WORST, plans), rng.uniform(0.003, 0.02, plans)
    noise = (MISFIT * lost) ** 2 + errors**2
    scale = float(
        np.linalg.lstsq((used @ estimates / np.sqrt(noise))[:, None], lost / np.sqrt(noise), rcond=None)[0][0]
    )
    prior = np.diag((SPREAD * scale * estimates + unknown) ** -2)
    right = used.T @ (lost / noise) + prior @ (scale * estimates)
    wanted = np.linalg.solve(used.T @ (used / noise[:, None]) + prior, right)
    assert corrected(estimates, unknown, used, lost, errors) == pytest.approx(np.maximum(wanted, 0), abs=1e-6)


def test_without_a_plan_costs_are_the_estimates() -> None:
    estimates = np.array([0.1, 0.2])
    assert corrected(estimates, estimates, np.zeros((0, 2)), np.zeros(0), np.zeros(0)) is estimates


def searched(frontier: Frontier, truth: Frontier, count: int, seed: int = 0) -> list[Observation]:
    """Evaluate proposals on a model whose costs are `truth`'s."""
    seen: list[Observation] = []
    costs = learn(truth, [])
    for number in range(count):
        known = {named(each.params) for each in seen}
        rng = np.random.default_rng([seed, number])
        params = propose(frontier, seen, partial(is_new, known=known), (0, 1, 2), (np.inf, np.inf), rng)
        if params is None:
            break
        seen.append(predicted(truth, costs, frontier.space.complete(params)))
    return seen


def is_new(params: Params, known: set[str]) -> bool:
    return named(params) not in known


def named(params: Params) -> str:
    return str(sorted((name, value) for name, value in params.items() if not name.startswith("frontier.")))


def volume(seen: list[Observation]) -> float:
    return hypervolume([[each.lost, *each.prices] for each in seen], [WORST, 0, 0])


def test_proposals_are_new_plans_with_a_level_for_each_layer_and_depend_on_the_seed_alone(space: Space) -> None:
    frontier = Frontier(space, context_of(), price)
    seen = searched(frontier, frontier, 12)
    assert len({named(each.params) for each in seen}) == len(seen) > 8
    assert [each.params for each in searched(frontier, frontier, 12)] == [each.params for each in seen]
    for each in seen:
        layers = {len(each.params[name]) for name in space.layered}
        assert layers == {3 if each.params["prune.depth"] == 1.0 else 2}
        assert frontier.levels(each.params) == {}


def estimating(space: Space, factors: list[float]) -> Frontier:
    """Estimates that grow with the level, and are so many times as large in each layer."""
    frontier = Frontier(space, context_of(), price)
    for name, setting in space.layered.items():
        table = np.outer(np.linspace(0, 0.03, len(setting.levels)), factors)
        frontier.context.memory[f"damage-{name}-{setting.levels}"] = table
    return frontier


def test_wrong_estimates_are_overcome(space: Space) -> None:
    """The estimates say that the layers' order of sensitivity is the reverse of what it is."""
    truth, turned = estimating(space, [0.5, 1.0, 2.0]), estimating(space, [2.0, 1.0, 0.5])
    best, learned = volume(searched(truth, truth, 16)), searched(turned, truth, 16)
    assert volume(learned) > 0.8 * best
    assert volume(learned[:3]) < 0.8 * best


def test_what_is_above_a_limit_is_not_proposed(space: Space) -> None:
    frontier = estimating(space, [1.0, 1.0, 1.0])
    for limit in (0.9, 0.7):
        params = propose(frontier, [], lambda _: True, (0, 1, 2), (limit, np.inf), np.random.default_rng(0))
        assert params is not None
        assert predicted(frontier, learn(frontier, []), params).prices[0] <= np.log(limit)
    assert propose(frontier, [], lambda _: True, (0, 1, 2), (1e-9, np.inf), np.random.default_rng(0)) is None
