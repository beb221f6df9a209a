"""How long trials will take, by how long they took before, and how long plans can be trained for."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autolite.compress import student_plan, untrained
from autolite.plan import Plan, make_step
from autolite.search import durations
from autolite.search.durations import Durations, expected_seconds, makespan
from autolite.search.stages import Decision


def costing(resumable: int = 0) -> Any:
    times = {"train_seconds": 1.0, "seconds": 1.0, "own_train_seconds": 1.0}
    steps = {"effort": 8, "trained_steps": 8, "step_seconds": 0.125, "resumable_steps": resumable}
    about = {"stage": "recover", "recipe": "a", "trunk": "a", "examples": 100}
    return SimpleNamespace(number=0, user_attrs={**times, **steps, **about})


@pytest.mark.parametrize(("processes", "steps"), [(1, 100), (2, 150), (3, 300), (9, 300)])
def test_several_processes_train_longer_as_far_as_whole_plans_can_be_shared_out(processes: int, steps: int) -> None:
    """Three plans at an eighth of a second a step in 37.5 s: one after the other, in two rounds, or all at once."""
    chosen, effort = Durations([], processes=processes).fit([costing() for _ in range(3)], 37.5, 40, 1000)
    assert (len(chosen), effort) == (3, steps)


@given(st.lists(st.floats(0.1, 100), max_size=5), st.integers(1, 3))
def test_processes_end_within_a_third_of_the_earliest_possible(seconds: list[float], processes: int) -> None:
    """The longest first: between the optimum, over all ways of sharing out, and 4/3 of it (Graham 1969)."""
    ways = itertools.product(range(processes), repeat=len(seconds))
    ends = (np.bincount(way, seconds, processes).max() if way else 0.0 for way in ways)
    optimum = min(ends)
    assert optimum * (1 - 1e-9) <= makespan(seconds, processes) <= optimum * (4 / 3 + 1e-9)


def test_several_processes_begin_with_what_takes_longest() -> None:
    short, long = costing(), costing()
    long.user_attrs |= {"step_seconds": 0.5, "trunk": "b"}
    assert Durations([], processes=2).in_order([short, long], 100) == [long, short]
    assert Durations([]).in_order([short, long], 100) == [short, long], "one process begins with what is best"


def test_what_was_trained_before_is_not_paid_again() -> None:
    """Three plans at an eighth of a second a step in 37.5 s, each with 14 of its steps done."""
    plans = [costing(14) for _ in range(3)]
    assert Durations(plans).fit(plans, 37.5, 40, 1000)[1] == 114
    assert Durations(plans, since=1).fit(plans, 37.5, 40, 1000)[1] == 100, "the checkpoints are gone"


def test_a_step_costs_what_it_did_when_the_teachers_outputs_were_there_already() -> None:
    """The longest of three trainings, an eighth of a second a step, waited for them."""
    plans = [costing() for _ in range(3)]
    plans[2].user_attrs |= {"step_seconds": 0.5, "effort": 80}
    assert Durations(plans, since=1).fit(plans, 37.5, 40, 1000)[1] == 100


def test_further_seeds_begin_anew() -> None:
    """Three plans at an eighth of a second a step, of which 14 are done for the first of three seeds."""
    plans = [costing(14) for _ in range(3)]
    chosen, effort = Durations(plans, seeds=3).fit(plans, 200.0, 40, 1000)
    assert len(chosen) * (3 * effort - 14) / 8 == pytest.approx(200.0, abs=3 * 3 / 8)


@pytest.mark.parametrize(("since", "steps"), [(1, 80), (0, 200)])
def test_what_is_done_once_does_not_grow_with_the_steps_nor_again_at_the_next_rung(since: int, steps: int) -> None:
    """Three plans in 37.5 s, of which each spends 7.5 s before it trains at a sixteenth of a second a step."""
    plans = [costing() for _ in range(3)]
    for plan in plans:
        plan.user_attrs |= {"train_seconds": 8.0, "seconds": 8.0, "own_train_seconds": 8.0, "step_seconds": 1 / 16}
    assert Durations(plans, since).fit(plans, 37.5, 40, 1000)[1] == steps


PLAN = Plan((make_step("prune", {"heads": 0.5}), make_step("distill", {"steps": 90})))


@pytest.fixture
def problem(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(durations, "canonical", lambda plan, shape: plan)
    return SimpleNamespace(plan=lambda *_: PLAN, teacher=SimpleNamespace(shape=None))


def study(*done: Any) -> Any:
    return SimpleNamespace(trials=lambda: list(done), next_in_queue=lambda name: 0)


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
    assert expected_seconds(problem, study(last()), decision, Durations([own])) == 2 + 76 / 8
    assert expected_seconds(problem, study(last()), decision, Durations([own], seeds=3)) == 2 + (76 + 2 * 90) / 8


def test_a_plan_that_was_never_tried_costs_what_the_last_trials_did(problem: Any) -> None:
    assert expected_seconds(problem, study(last()), Decision("1h 0", 4, 90, 100.0, ({},)), Durations([])) == 47


def test_a_student_that_is_there_costs_its_scoring(problem: Any) -> None:
    known = last(student=student_plan(PLAN).digest)
    assert expected_seconds(problem, study(known), Decision("1h 0", 4, 90, 100.0, ({},)), Durations([])) == 2
