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


def costing(resumable: int = 0, step: float = 0.125) -> Any:
    """A trial of eight steps, an eighth of a second each if nothing else is said."""
    times = {"train_seconds": 8 * step, "seconds": 8 * step, "own_train_seconds": 8 * step, "taught": (8, 0.0, 100)}
    steps = {"effort": 8, "trained_steps": 8, "step_seconds": step, "resumable_steps": resumable}
    about = {"stage": "recover", "recipe": "a", "trunk": "a", "examples": 100}
    return SimpleNamespace(number=0, user_attrs={**times, **steps, **about})


def fitted(durations: Durations, plans: list[Any], seconds: float, least: int = 40, most: int = 1000) -> list[int]:
    return [steps for _, steps in durations.fit(plans, seconds, lambda trial: least, most)]


@pytest.mark.parametrize(("processes", "steps"), [(1, 100), (2, 150), (3, 300), (9, 300)])
def test_several_processes_train_longer_as_far_as_whole_plans_can_be_shared_out(processes: int, steps: int) -> None:
    """Three plans at an eighth of a second a step in 37.5 s: one after the other, in two rounds, or all at once."""
    assert fitted(Durations([], processes=processes), [costing() for _ in range(3)], 37.5) == [steps] * 3


def test_plans_are_trained_for_as_many_seconds_not_steps() -> None:
    """In 90 s, at 1/2, 1/8 and 1/16 of a second a step."""
    plans = [costing(step=0.5), costing(step=0.125), costing(step=0.0625)]
    assert fitted(Durations([]), plans, 90.0) == [60, 240, 480]
    assert fitted(Durations([]), plans, 90.0, most=400) == [65, 260, 400], "what one may not use is for the others"
    assert fitted(Durations([]), plans, 90.0, least=100) == [100, 160, 320], "so many steps each has at least"


def test_where_there_is_no_time_for_the_least_the_last_are_dropped_but_two_are_kept() -> None:
    plans = [costing() for _ in range(5)]
    assert fitted(Durations([]), plans, 16.0) == [42] * 3
    assert fitted(Durations([]), plans, 4.0) == [16, 16]


@given(
    steps=st.lists(st.sampled_from([0.0625, 0.125, 0.5, 1.0]), min_size=1, max_size=5),
    seconds=st.integers(1, 500),
    processes=st.integers(1, 3),
)
def test_what_fits_ends_in_time_and_uses_it(steps: list[float], seconds: int, processes: int) -> None:
    plans = [costing(step=step) for step in steps]
    found = Durations([], processes=processes).fit(plans, seconds, lambda trial: 4, 10**6)
    end = makespan([trial.user_attrs["step_seconds"] * n for trial, n in found], processes)
    least = makespan([trial.user_attrs["step_seconds"] for trial, _ in found], processes)
    assert end <= max(seconds, least) + 1e-6
    if processes == 1:
        assert end >= seconds - sum(steps) - 1e-6 * len(steps) - 0.001 * len(steps)


@given(st.lists(st.floats(0.1, 100), max_size=5), st.integers(1, 3))
def test_processes_end_within_a_third_of_the_earliest_possible(seconds: list[float], processes: int) -> None:
    """The longest first: between the optimum, over all ways of sharing out, and 4/3 of it (Graham 1969)."""
    ways = itertools.product(range(processes), repeat=len(seconds))
    ends = (np.bincount(way, seconds, processes).max() if way else 0.0 for way in ways)
    optimum = min(ends)
    assert optimum * (1 - 1e-9) <= makespan(seconds, processes) <= optimum * (4 / 3 + 1e-9)


def test_several_processes_begin_with_what_takes_longest() -> None:
    short, long = (costing(), 100), (costing(step=0.5), 100)
    assert Durations([], processes=2).in_order([short, long]) == [long, short]
    assert Durations([]).in_order([short, long]) == [short, long], "one process begins with what is best"


def test_what_was_trained_before_is_not_paid_again() -> None:
    """Three plans at an eighth of a second a step in 37.5 s, each with 14 of its steps done."""
    plans = [costing(14) for _ in range(3)]
    assert fitted(Durations(plans), plans, 37.5) == [114] * 3
    assert fitted(Durations(plans, since=1), plans, 37.5) == [100] * 3, "the checkpoints are gone"


def test_the_teacher_is_run_on_the_batches_that_nobody_came_to_yet() -> None:
    """Of the 30 batches of an epoch eight are there; each takes a second, once for all plans and processes."""
    plans = [costing() for _ in range(3)]
    for plan, batches in zip(plans, (5, 3, 0), strict=True):  # by the processes that trained them
        plan.user_attrs["taught"] = (batches, float(batches), 30)
    assert [Durations(plans).teaching(steps) for steps in (4, 8, 20, 30, 1000)] == [0, 0, 12, 22, 22]
    assert Durations(plans, since=1).teaching(20) == 20, "what the teacher said is gone"
    assert fitted(Durations(plans), plans, 59.5) == [100] * 3
    assert fitted(Durations(plans, processes=2), plans, 48.5) == [150] * 3, "the processes share that out"


def test_where_the_teachers_outputs_are_not_kept_it_is_run_again_in_each_step() -> None:
    """Three plans of eight steps ran it 24 times, a second each, where eight would have done: in two of three steps."""
    plans = [costing() for _ in range(3)]
    for plan in plans:
        plan.user_attrs["taught"] = (8, 8.0, 8)
    assert Durations(plans, since=1).training(plans[0], 12) == pytest.approx(12 * (0.125 + 2 / 3))
    plans[1].user_attrs["taught"] = plans[2].user_attrs["taught"] = (0, 0.0, 8)
    assert Durations(plans, since=1).training(plans[0], 12) == pytest.approx(12 * 0.125)


def test_further_seeds_begin_anew() -> None:
    """Three plans at an eighth of a second a step, of which 14 are done for the first of three seeds."""
    plans = [costing(14) for _ in range(3)]
    steps = fitted(Durations(plans, seeds=3), plans, 200.0)
    assert sum(3 * each - 14 for each in steps) / 8 == pytest.approx(200.0, abs=3 * 3 / 8)


@pytest.mark.parametrize(("since", "steps"), [(1, 80), (0, 200)])
def test_what_is_done_once_does_not_grow_with_the_steps_nor_again_at_the_next_rung(since: int, steps: int) -> None:
    """Three plans in 37.5 s, of which each spends 7.5 s before it trains at a sixteenth of a second a step."""
    plans = [costing(step=0.0625) for _ in range(3)]
    for plan in plans:
        plan.user_attrs |= {"train_seconds": 8.0, "seconds": 8.0, "own_train_seconds": 8.0}
    assert fitted(Durations(plans, since), plans, 37.5) == [steps] * 3


PLAN = Plan((make_step("prune", {"heads": 0.5}), make_step("distill", {"steps": 90})))


@pytest.fixture
def problem(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(durations, "canonical", lambda plan, shape: plan)
    return SimpleNamespace(plan=lambda *_: PLAN, teacher=SimpleNamespace(shape=None))


def study(*done: Any, given_up: tuple[int, ...] = (), stage: str = "confirm") -> Any:
    return SimpleNamespace(stage=stage, trials=lambda: list(done), given_up=lambda name: given_up)


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
    assert expected_seconds(problem, study(last()), decision, Durations([own]), 0) == 2 + 76 / 8
    assert expected_seconds(problem, study(last()), decision, Durations([own], seeds=3), 0) == 2 + (76 + 2 * 90) / 8


def test_a_plan_that_was_never_tried_costs_what_the_last_trials_did(problem: Any) -> None:
    assert expected_seconds(problem, study(last()), Decision("1h 0", 4, 90, 100.0, ({},)), Durations([]), 0) == 47


def test_a_student_that_is_there_costs_its_scoring(problem: Any) -> None:
    known = last(student=student_plan(PLAN).digest)
    assert expected_seconds(problem, study(known), Decision("1h 0", 4, 90, 100.0, ({},)), Durations([]), 0) == 2


def test_further_formats_of_a_queued_student_cost_their_scoring(problem: Any) -> None:
    """Whoever is first trains it, unless it was given up."""
    own = costing()
    own.user_attrs["trunk"] = untrained(student_plan(PLAN)).digest
    decision = Decision("1h 0", 4, 90, 100.0, ({}, {}))
    assert expected_seconds(problem, study(last()), decision, Durations([own]), 1) == 2
    assert expected_seconds(problem, study(last(), given_up=(0,)), decision, Durations([own]), 1) == 2 + 90 / 8


def test_a_plan_that_is_queued_again_for_other_settings_of_training_costs_its_training(problem: Any) -> None:
    """The sampler has not drawn them yet, so that it looks like the plan with the default settings."""
    own = costing()
    own.user_attrs["trunk"] = untrained(student_plan(PLAN)).digest
    decision = Decision("1h 0", 4, 90, 100.0, ({}, {}))
    known = last(student=student_plan(PLAN).digest)
    assert expected_seconds(problem, study(known, stage="recover"), decision, Durations([own]), 1) == 2 + 90 / 8
