"""Several targets at once: each has its front, of candidates that are there, at its own prices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autolite import reprice
from autolite.errors import RunError, TargetError
from autolite.front import Result, read_front
from tests.conftest import RunSearch

TARGETS = ("pixel8", "raspberry-pi-5")
FILES = {"pixel8": "front.json", "raspberry-pi-5": "front-raspberry-pi-5.json"}


@pytest.fixture(scope="module")
def several(run_search: RunSearch, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run_search(target=TARGETS, budget="12trials", out=tmp_path_factory.mktemp("runs") / "several")


def test_each_target_has_a_front_whose_folders_are_there(several: Result) -> None:
    other = read_front(several.path, FILES["raspberry-pi-5"])
    assert several.front.target["name"] == "pixel8"
    assert other.target["name"] == "raspberry-pi-5"
    assert len(several.front)
    assert len(other)
    for candidate in [*several.front, *other]:
        assert (several.path / candidate.path / "autolite.json").is_file()
        assert candidate.test is not None


def test_prices_are_those_of_the_target_and_quality_is_the_same(several: Result) -> None:
    other = read_front(several.path, FILES["raspberry-pi-5"])
    again = reprice(several.path, "raspberry-pi-5").front
    assert [c.to_json() for c in other] == [c.to_json() for c in again]
    both = {c.id: c for c in several.front}.keys() & {c.id: c for c in other}.keys()
    for name in both:
        here, there = (next(c for c in front if c.id == name) for front in (several.front, other))
        assert here.kept == there.kept
        assert here.latency_ms.value != there.latency_ms.value


def test_a_finished_run_answers_at_once_and_belongs_to_its_targets(several: Result, run_search: RunSearch) -> None:
    before = (several.path / "front-raspberry-pi-5.json").read_bytes()
    run_search(target=TARGETS, budget="12trials", out=several.path)
    assert (several.path / "front-raspberry-pi-5.json").read_bytes() == before
    with pytest.raises(RunError, match="made with another other targets"):
        run_search(target="pixel8,x86-avx512", budget="12trials", out=several.path)


def test_a_limit_that_only_a_further_target_meets_is_held_there(
    several: Result, run_search: RunSearch, tmp_path: Path
) -> None:
    def least(target: str) -> float:
        fastest = min((c.latency_ms for c in read_front(several.path, FILES[target])), key=lambda each: each.low)
        return fastest.low

    fast, slow = sorted(TARGETS, key=least)
    limit = least(slow) / 2
    found = run_search(target=(slow, fast), budget="4trials", max_latency=limit, out=tmp_path / "run")
    there = read_front(found.path, f"front-{fast}.json")
    assert not found.front.candidates
    assert found.front.nearest_misses[0]["latency_ms"]["low"] > limit
    assert len(there)
    assert all(candidate.test is not None for candidate in there)
    assert there.teacher["test"] is not None


def test_a_wrong_target_is_told_before_anything_is_done(run_search: RunSearch, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(TargetError, match="pixel9"):
        run_search(target="pixel8,pixel9", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
