"""What there is time for, by the clock and by what trials took."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from autolite.compress import student_plan, untrained
from autolite.plan import Plan, make_step
from autolite.search import durations
from autolite.search.few_bits import SLOWER
from autolite.search.schedule import SINCE, Schedule
from autolite.search.stages import RUNGS, Decision
from autolite.space import STAGES, Stage
from tests.search.test_durations import costing

FOLDER = 3.0  # seconds that are kept for the candidate's folder
PLAN = Plan((make_step("prune", {"heads": 0.5}), make_step("distill", {"steps": 90})))


def plan_of(steps: int) -> Plan:
    return Plan((make_step("prune", {"heads": 0.5}), make_step("distill", {"steps": steps})))


def schedule(waiting: list[int | None], workers: int = 0, spent: float = 0.0, done: int = 0) -> Schedule:
    """Of a run whose plan trained at an eighth of a second a step, without a thing done once, from the beginning."""
    trial = costing()
    trial.user_attrs |= {"trunk": untrained(student_plan(PLAN)).digest, "student": "another", "taught": (0, 0.0, 0)}
    confirm: Any = SimpleNamespace(
        stage="confirm", trials=lambda: [trial] * done, queued=lambda name: waiting, given_up=lambda name: set()
    )
    screen: Any = SimpleNamespace(trials=list)
    recover: Any = SimpleNamespace(trials=lambda: [trial])
    store: Any = SimpleNamespace(get=lambda key, other: {SINCE: 1}[key], leases=lambda key: ["worker"] * workers)
    problem: Any = SimpleNamespace(
        plan=lambda params, effort: plan_of(effort),
        teacher=SimpleNamespace(shape=None),
        settings=SimpleNamespace(seeds=1),
        profile=SimpleNamespace(name="pixel8"),
    )
    clock: Any = SimpleNamespace(spent=spent)
    return Schedule(problem, {"screen": screen, "recover": recover, "confirm": confirm}, store, clock)


@pytest.fixture(autouse=True)
def canonical(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durations, "canonical", lambda plan, shape: plan)


def confirming(deadline: float | None) -> Decision:
    return Decision("1h 0", 4, 80, deadline, ({}, {}, {}), (80, 160, 40))


def test_formats_are_trained_for_until_the_deadline() -> None:
    ends = schedule([], spent=80.0)
    assert ends.recovery("confirm", confirming(100.0), PLAN, 1000, 0.1) == int((20 - FOLDER) / (0.1 * SLOWER))
    assert ends.recovery("confirm", confirming(100.0), PLAN, 30, 0.1) == 30, "no more than that"
    assert ends.recovery("confirm", confirming(70.0), PLAN, 30, 0.1) == 0
    assert ends.recovery("confirm", confirming(None), PLAN, 30, 0.1) == 30, "under a budget of trials always"


def test_a_student_that_was_there_is_known_by_what_its_steps_took_before() -> None:
    assert schedule([]).recovery("confirm", confirming(100.0), PLAN, 1000, None) == int(
        (100 - FOLDER) / (0.125 * SLOWER)
    )
    unknown = Plan((make_step("prune", {"heads": 0.25}), make_step("distill", {"steps": 90})))
    assert schedule([]).recovery("confirm", confirming(100.0), unknown, 1000, None) == 0


@pytest.mark.parametrize(("workers", "spare"), [(0, 100 - 25), (1, 100 - 12.5)])
def test_what_is_queued_comes_first(workers: int, spare: float) -> None:
    """160 and 40 steps of an eighth of a second, which all processes share out."""
    ends = schedule([1, 2], workers)
    assert ends.recovery("confirm", confirming(100.0), PLAN, 1000, 0.1) == int((spare - FOLDER) / (0.1 * SLOWER))


def test_what_a_dead_process_left_is_taken_up_until_the_deadline() -> None:
    """Judged anew, as if nothing of it were done, a training that filled the time to the deadline would be dropped."""
    late = schedule([0], spent=99.0, done=1)
    assert not late.in_time("confirm", confirming(100.0))
    assert late.is_open("confirm", confirming(100.0))
    assert not schedule([0], spent=101.0, done=1).is_open("confirm", confirming(100.0))
    assert schedule([0], spent=101.0).is_open("confirm", confirming(100.0)), "one trial is always done"


@pytest.mark.parametrize(
    ("decided", "over"),
    [
        (["screen 1h 0"], []),
        (["screen 1h 0", "recover 1h 0"], [("screen", 0)]),
        (["screen 1h 0", "recover 1h 0", "recover 1h 1"], [("screen", 0), ("recover", 0)]),
        (["screen 2h 0", "recover 2h 0"], []),
    ],
    ids=["in the screen", "in the first rung", "in the second rung", "of another budget"],
)
def test_a_rung_is_over_when_the_next_one_was_decided(decided: list[str], over: list[tuple[Stage, int]]) -> None:
    facts = {f"stage {key}": {} for key in decided}
    store: Any = SimpleNamespace(get=lambda key: facts.get(key))
    clock: Any = SimpleNamespace(budget="1h")
    problem: Any = None
    found = Schedule(problem, {}, store, clock)
    assert [(s, r) for s in STAGES for r in range(RUNGS[s]) if found.is_over(s, r)] == over
