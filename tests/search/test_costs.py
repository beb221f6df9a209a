"""What trials will cost, by what they cost before, and how long plans can be trained for it."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autolite.compress import student_plan, untrained
from autolite.plan import Plan, make_step
from autolite.search import costs
from autolite.search.costs import Costs, expected_seconds, fit, makespan
from autolite.search.stages import Decision


def costing(resumable: int = 0) -> Any:
    times = {"train_seconds": 1.0, "seconds": 1.0, "own_train_seconds": 1.0}
    steps = {"effort": 8, "trained_steps": 8, "step_seconds": 0.125, "resumable_steps": resumable}
    about = {"stage": "recover", "recipe": "a", "trunk": "a", "examples": 100}
    return SimpleNamespace(number=0, user_attrs={**times, **steps, **about})


@pytest.mark.parametrize(("processes", "steps"), [(1, 100), (2, 150), (3, 300), (9, 300)])
def test_several_processes_train_longer_as_far_as_whole_plans_can_be_shared_out(processes: int, steps: int) -> None:
    """Three plans at an eighth of a second a step in 37.5 s: one after the other, in two rounds, or all at once."""
    chosen, effort = fit(Costs([]), [costing() for _ in range(3)], 37.5, 40, 1000, processes)
    assert (len(chosen), effort) == (3, steps)


@given(st.lists(st.floats(0.1, 100), max_size=9), st.integers(1, 4))
def test_processes_end_within_a_third_of_the_earliest_possible(seconds: list[float], processes: int) -> None:
    """The longest first: at most 4/3 - 1/3m of the optimum (Graham 1969), which is at least both bounds here."""
    found = makespan(seconds, processes)
    assert found >= max([sum(seconds) / processes, *seconds]) * (1 - 1e-9)
    assert found <= (4 / 3) * min(_ends(seconds, processes)) * (1 + 1e-9)


def _ends(seconds: list[float], processes: int) -> list[float]:
    """When the last process ends, for every way of sharing out what is to be done."""
    ways = itertools.product(range(processes), repeat=len(seconds)) if processes ** len(seconds) <= 20_000 else []
    found = [max(sum(s for s, p in zip(seconds, way, strict=True) if p == i) for i in range(processes)) for way in ways]
    return found or [float("inf")]


def test_what_was_trained_before_is_not_paid_again() -> None:
    """Three plans at an eighth of a second a step in 37.5 s, each with 14 of its steps done."""
    plans = [costing(14) for _ in range(3)]
    assert fit(Costs(plans), plans, 37.5, 40, 1000)[1] == 114
    assert fit(Costs(plans, since=1), plans, 37.5, 40, 1000)[1] == 100, "the checkpoints are gone"


def test_a_step_costs_what_it_did_when_the_teachers_outputs_were_there_already() -> None:
    """The longest of three trainings, an eighth of a second a step, waited for them."""
    plans = [costing() for _ in range(3)]
    plans[2].user_attrs |= {"step_seconds": 0.5, "effort": 80}
    assert fit(Costs(plans, since=1), plans, 37.5, 40, 1000)[1] == 100


def test_further_seeds_begin_anew() -> None:
    """Three plans at an eighth of a second a step, of which 14 are done for the first of three seeds."""
    plans = [costing(14) for _ in range(3)]
    chosen, effort = fit(Costs(plans), plans, 200.0, 40, 1000, seeds=3)
    assert len(chosen) * (3 * effort - 14) / 8 == pytest.approx(200.0, abs=3 * 3 / 8)


@pytest.mark.parametrize(("since", "steps"), [(1, 80), (0, 200)])
def test_what_is_done_once_does_not_grow_with_the_steps_nor_again_at_the_next_rung(since: int, steps: int) -> None:
    """Three plans in 37.5 s, of which each spends 7.5 s before it trains at a sixteenth of a second a step."""
    plans = [costing() for _ in range(3)]
    for plan in plans:
        plan.user_attrs |= {"train_seconds": 8.0, "seconds": 8.0, "own_train_seconds": 8.0, "step_seconds": 1 / 16}
    assert fit(Costs(plans, since), plans, 37.5, 40, 1000)[1] == steps


PLAN = Plan((make_step("prune", {"heads": 0.5}), make_step("distill", {"steps": 90})))


@pytest.fixture
def problem(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(costs, "canonical", lambda plan, shape: plan)
    settings = SimpleNamespace(seeds=1)
    return SimpleNamespace(plan=lambda *_: PLAN, teacher=SimpleNamespace(shape=None), settings=settings)


def study(*done: Any, stage: str = "confirm") -> Any:
    return SimpleNamespace(stage=stage, trials=lambda: list(done), next_in_queue=lambda name: 0)


def last(**changes: Any) -> Any:
    """A trial of this stage: two seconds of scoring after 90 steps of half a second."""
    found = costing()
    times = {"train_seconds": 45.0, "own_train_seconds": 45.0, "seconds": 47.0, "trained_steps": 90}
    found.user_attrs |= {
        **times,
        "effort": 90,
        "step_seconds": 0.5,
        "student": "another",
        "trunk": "another",
        **changes,
    }
    return found


def test_the_next_trial_costs_what_its_own_plan_took_before(problem: Any) -> None:
    """An eighth of a second for each of 90 steps but the 14 that are there, and the scoring of the last one."""
    own = costing(14)
    own.user_attrs["trunk"] = untrained(student_plan(PLAN)).digest
    decision = Decision("1h 0", 4, 90, 100.0, ({},))
    assert expected_seconds(problem, study(last()), decision, Costs([own])) == 2 + 76 / 8
    problem.settings.seeds = 3
    assert expected_seconds(problem, study(last()), decision, Costs([own])) == 2 + 76 / 8 + 2 * 90 / 8
    assert expected_seconds(problem, study(last(), stage="recover"), decision, Costs([own])) == 2 + 76 / 8


def test_a_plan_that_was_never_tried_costs_what_the_last_trials_did(problem: Any) -> None:
    assert expected_seconds(problem, study(last()), Decision("1h 0", 4, 90, 100.0, ({},)), Costs([])) == 47


def test_a_student_that_is_there_costs_its_scoring(problem: Any) -> None:
    known = last(student=student_plan(PLAN).digest)
    assert expected_seconds(problem, study(known), Decision("1h 0", 4, 90, 100.0, ({},)), Costs([])) == 2
