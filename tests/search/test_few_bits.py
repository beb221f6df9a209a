"""Finalists in few bits: trained for their formats where rounding cost them something, kept if that helped."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autolite.errors import PlanError
from autolite.front import Candidate
from autolite.plan import Plan, make_step
from autolite.search import few_bits
from autolite.search.few_bits import Recovered, recovered
from autolite.search.studies import read_trials
from autolite.store import database_of
from tests.conftest import RunSearch

DISTILLED = (make_step("prune", {"heads": 0.5}), make_step("distill", {"steps": 240}))
PLAN = Plan((*DISTILLED, make_step("quantize", {"ffn": "int4"})))


def looked_at(monkeypatch: pytest.MonkeyPatch, plan: Plan, keeps: dict[str, float], in_time: int = 1000) -> Any:
    """What becomes of a plan whose student keeps so much before rounding, after it, and after training for it."""

    def evaluate(problem: Any, tried: Plan, split: str, *_: Any, **__: Any) -> Any:
        assert split == "search"
        if tried.steps[-1].technique not in keeps:
            raise PlanError("recover: the loss is not finite")
        return SimpleNamespace(score=keeps[tried.steps[-1].technique], train_seconds=1.0)

    monkeypatch.setattr(few_bits, "evaluate", evaluate)
    monkeypatch.setattr(few_bits, "kept_on", lambda problem, score, split: SimpleNamespace(value=score))
    forms = {"int4": frozenset({"int4"}), "int8": frozenset({"int8"})}
    problem: Any = SimpleNamespace(shape=lambda each: SimpleNamespace(formats=forms[each.steps[-1].config.ffn]))
    return recovered(problem, plan, Path(), lambda done, total: None, lambda steps: min(steps, in_time))


def test_where_rounding_lost_something_the_student_is_trained_for_its_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = Plan((*PLAN.steps, make_step("recover", {"steps": 20})))
    found = looked_at(monkeypatch, PLAN, {"distill": 0.97, "quantize": 0.94, "recover": 0.96})
    assert found == Recovered(trained, 0.97, 0.94, 0.96, 3.0)


@pytest.mark.parametrize(
    ("keeps", "in_time"),
    [
        ({"distill": 0.97, "quantize": 0.969}, 1000),
        ({"distill": 0.97, "quantize": 0.94, "recover": 0.94}, 1000),
        ({"distill": 0.97, "quantize": 0.94}, 1000),
    ],
    ids=["nothing was lost", "nothing was regained", "the loss diverged"],
)
def test_otherwise_the_plan_stays_as_it_is(
    monkeypatch: pytest.MonkeyPatch, keeps: dict[str, float], in_time: int
) -> None:
    assert looked_at(monkeypatch, PLAN, keeps, in_time).plan == PLAN


def test_where_there_is_no_time_nothing_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    assert looked_at(monkeypatch, PLAN, {}, in_time=0) is None


@pytest.mark.parametrize(
    "plan",
    [
        Plan((*DISTILLED, make_step("quantize", {"ffn": "int8"}))),
        Plan((make_step("quantize", {"ffn": "int4"}),)),
        Plan((*PLAN.steps, make_step("recover", {"steps": 5}))),
    ],
    ids=["eight bits", "not trained", "trained for its formats already"],
)
def test_other_plans_are_not_looked_at(monkeypatch: pytest.MonkeyPatch, plan: Plan) -> None:
    monkeypatch.setattr(few_bits, "evaluate", None)
    shape = SimpleNamespace(formats=frozenset({"int8"} if "int8" in str(plan.steps[-1].config) else {"int4"}))
    problem: Any = SimpleNamespace(shape=lambda each: shape)
    assert recovered(problem, plan, Path(), lambda done, total: None, lambda steps: steps) is None


SPACE = """
name: few
description: Two bits and four.
steps:
  - prune: {ffn: [1.0, 0.5]}
  - distill: {}
  - quantize: {attention: [int2-asym, int4], ffn: [int2-asym, int4]}
stages:
  screen: {trials: 10, effort: 2}
  recover: {trials: 4, effort: 12, max_effort: 40}
  confirm: {trials: 4, effort: 24, max_effort: 120}
start:
  - {prune.ffn: 0.5, quantize.attention: int2-asym, quantize.ffn: int2-asym}
"""


def test_a_search_takes_what_training_for_two_bits_made_of_a_finalist_only_if_it_is_better(
    run_search: RunSearch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(few_bits, "LOST", -math.inf)  # a teacher that knows nothing loses nothing
    space = tmp_path / "few.yaml"
    space.write_text(SPACE)
    result = run_search(space=str(space), budget="7trials", out=tmp_path / "run")
    trials = read_trials(*database_of(result.path, None))["confirm"]
    seen = [t for t in trials if t.user_attrs["rounding"] and t.user_attrs["rounding"][2] is not None]
    assert seen
    for trial in seen:
        _, before, after = trial.user_attrs["rounding"]
        candidate = Candidate.from_json(trial.user_attrs["candidate"])
        assert (candidate.plan.steps[-1].technique == "recover") == (after > before)
        assert candidate.id == candidate.plan.digest[:8]
