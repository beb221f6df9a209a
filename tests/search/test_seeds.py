"""Finalists trained with several seeds: the best by *search* is the candidate, and what each keeps is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autolite.errors import InputError, PlanError, RunError
from autolite.front import Candidate, Result
from autolite.plan import Plan
from autolite.report.tables import front_table
from autolite.search import confirm
from autolite.search.confirm import Seeded
from autolite.search.studies import read_trials
from autolite.store import database_of
from tests.conftest import RunSearch
from tests.search.test_run import completed


@pytest.fixture(scope="module")
def two(run_search: RunSearch, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run_search(seeds=2, seed=5, budget="6trials", out=tmp_path_factory.mktemp("seeds") / "run")


def trained(result: Result) -> list[Candidate]:
    """All that were confirmed after training, on the front or not."""
    trials = read_trials(*database_of(result.path, None))["confirm"]
    found = [Candidate.from_json(trial.user_attrs["candidate"]) for trial in trials]
    return [each for each in found if each.kept_of_seeds]


def test_each_finalist_that_is_trained_says_what_its_seeds_keep(two: Result) -> None:
    assert trained(two)
    for each in trained(two):
        assert each.seeds == (5, 6)
        assert each.plan.seed in each.seeds
        assert each.id == each.plan.digest[:8]
        assert each.kept_of_seeds[each.seeds.index(each.plan.seed)] == each.kept.value


def test_the_table_tells_which_seed_it_is(two: Result) -> None:
    told = " ".join(map(str, front_table(two.front).renderables[1:]))
    assert all(f"{c.id}  is seed {c.plan.seed}" in told for c in two.front if c.kept_of_seeds)
    assert any(c.kept_of_seeds for c in two.front)


def test_the_same_again_finds_it_finished_and_another_number_of_seeds_is_another_run(
    two: Result, run_search: RunSearch
) -> None:
    before = completed(two.path)
    again = run_search(seeds=2, seed=5, budget="6trials", out=two.path)
    assert [each.to_json() for each in again.front] == [each.to_json() for each in two.front]
    assert completed(two.path) == before
    with pytest.raises(RunError, match="seeds"):
        run_search(seeds=3, seed=5, budget="6trials", out=two.path)
    with pytest.raises(InputError, match=r"seeds.* 0"):
        run_search(seeds=0, out=two.path)


def test_the_best_by_the_search_split_is_taken_whatever_the_selection_split_says(
    run_search: RunSearch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def tried(problem: object, plan: Plan, *_: object) -> Seeded:
        return Seeded(plan, searched=float(plan.seed == 6), selected=-plan.seed / 10, seconds=0.0)

    monkeypatch.setattr(confirm, "seeded", tried)
    found = run_search(seeds=3, seed=5, budget="6trials", out=tmp_path / "run")
    assert {(c.plan.seed, c.seeds, c.kept_of_seeds) for c in trained(found)} == {(6, (5, 6, 7), (-0.5, -0.6, -0.7))}


def test_a_seed_with_which_training_fails_is_left_out(
    run_search: RunSearch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original = confirm.seeded

    def fails(problem: Any, plan: Plan, *more: Any) -> Seeded:
        if plan.seed == 5:
            raise PlanError("distill: the loss is not finite")
        return original(problem, plan, *more)

    monkeypatch.setattr(confirm, "seeded", fails)
    assert {c.seeds for c in trained(run_search(seeds=2, seed=5, budget="6trials", out=tmp_path / "run"))} == {(6,)}
