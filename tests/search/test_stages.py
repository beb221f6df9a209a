"""How a budget is split, and which plans go on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autolite.limits import Constraints
from autolite.search import promotion, stages
from autolite.search.additive import CHANCE
from autolite.search.settings import parse_budget
from autolite.space import STAGES


@given(st.integers(1, 500), st.booleans())
def test_the_trials_of_the_stages_add_up_to_the_budget(total: int, trains: bool) -> None:
    split = [stages.trials_for(stage, total, trains) for stage in STAGES]
    assert sum(split) == total
    assert min(split) >= 0
    assert split[2] >= 1


def trial(kept: float, latency: float, size: float, student: str) -> Any:
    attributes = {"kept": kept, "latency_ms": latency, "student": student}
    return SimpleNamespace(user_attrs=attributes, values=[kept, latency, size])


@pytest.fixture
def problem(monkeypatch: pytest.MonkeyPatch) -> Any:
    base = {"latency_ms": SimpleNamespace(value=100.0), "size_bytes": SimpleNamespace(value=1000.0)}
    monkeypatch.setattr(promotion, "price", lambda problem, shape: base)
    settings = SimpleNamespace(constraints=Constraints(max_drop=0.02), objectives=("quality", "latency", "size"))
    teacher, space = SimpleNamespace(shape=None), SimpleNamespace(trains=True)
    return SimpleNamespace(settings=settings, teacher=teacher, space=space, others=())


def test_dominated_and_ruined_plans_are_not_promoted_before_good_ones(problem: Any) -> None:
    good, smaller = trial(0.99, 20, 500, "a"), trial(0.97, 30, 100, "b")
    dominated, ruined = trial(0.98, 50, 600, "c"), trial(0.50, 1, 10, "d")
    chosen = promotion.promote(problem, [ruined, dominated, smaller, good], 2, keep_floor=True)
    assert {id(t) for t in chosen} == {id(good), id(smaller)}


def test_one_student_is_promoted_once_while_there_are_others(problem: Any) -> None:
    twins = [trial(0.99, 20, 500, "a"), trial(0.985, 20, 250, "a")]
    other = trial(0.90, 19, 499, "b")
    chosen = promotion.promote(problem, [*twins, other], 2, keep_floor=False)
    assert {t.user_attrs["student"] for t in chosen} == {"a", "b"}


@pytest.mark.parametrize(
    ("trains", "max_drop", "kept", "goes_on"),
    [(True, 0.02, 0.58, True), (False, 0.02, 0.78, False), (False, 0.3, 0.78, True)],
)
def test_a_fast_plan_that_loses_much_goes_on_where_training_wins_it_back_or_the_user_allows_it(
    problem: Any, trains: bool, max_drop: float, kept: float, goes_on: bool
) -> None:
    problem.space.trains, problem.settings.constraints = trains, Constraints(max_drop=max_drop)
    good, alike, fast = trial(0.99, 20, 500, "a"), trial(0.985, 19, 480, "b"), trial(kept, 1, 10, "c")
    ruined = trial(0.3, 1, 9, "d")
    chosen = promotion.promote(problem, [good, alike, fast, ruined], 2, keep_floor=False)
    assert (fast in chosen) == goes_on


def test_ratios_of_what_is_lost_count_for_training_keeps_them(problem: Any) -> None:
    """Twice as fast for twice as much lost is worth as much among poor plans as among good ones."""
    best, good = trial(0.97, 40, 500, "a"), trial(0.92, 20, 500, "b")
    poor, ruined = trial(0.82, 10, 500, "c"), trial(0.62, 5, 500, "d")
    points = promotion.objectives(problem, [best, good, poor, ruined])
    assert np.allclose(np.diff(points[:, 0]), np.log(2), atol=0.01)


@pytest.mark.parametrize(
    ("kept", "prices", "behind"),
    [
        (0.96, [20.0, 500.0], True),
        (0.98, [20.0, 500.0], False),
        (0.96, [19.0, 500.0], False),
        (0.96, [20.0, 499.0], False),
    ],
    ids=["beaten in everything", "within chance", "faster", "smaller"],
)
def test_what_is_beaten_in_everything_beyond_chance_is_behind(kept: float, prices: list[float], behind: bool) -> None:
    ours, rival = trial(kept, *prices, "a"), trial(0.985, 20, 500, "b")
    ours.user_attrs |= {"prices": prices, "kept_low": kept - 0.01}
    rival.user_attrs |= {"prices": [20.0, 500.0], "kept_low": 0.975}
    assert promotion.behind(ours, rival) == behind
    assert not promotion.behind(rival, ours)


@given(st.integers(1, 60), st.sampled_from(["9trials", "9m"]))
def test_the_rungs_of_a_stage_are_fewer_plans_each_and_add_up_under_a_budget_of_trials(count: int, budget: str) -> None:
    rungs = [stages.trials_at("recover", rung, count, parse_budget(budget)) for rung in range(stages.RUNGS["recover"])]
    assert rungs == sorted(rungs, reverse=True)
    assert rungs[0] > 0
    assert budget == "9m" or sum(rungs) == count


def test_objectives_are_relative_to_the_baseline(problem: Any) -> None:
    found = promotion.objectives(problem, [trial(0.9, 50, 250, "a")])
    assert np.allclose(found, [[np.log(0.1 + CHANCE), np.log(0.5), np.log(0.25)]])


def test_only_the_objectives_are_compared(problem: Any) -> None:
    problem.settings.objectives = ("quality", "size")
    found = promotion.objectives(problem, [trial(0.9, 50, 250, "a")])
    assert np.allclose(found, [[np.log(0.1 + CHANCE), np.log(0.25)]])
    slow, fast = trial(0.99, 90, 500, "a"), trial(0.98, 1, 501, "b")
    assert promotion.promote(problem, [fast, slow], 1, keep_floor=False) == [slow]
