"""Candidates of a search for this machine: timed when confirmed, and all together in the end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from autolite.files import sha256
from autolite.front import Result
from autolite.hardware import load_target
from autolite.measure import Timing
from autolite.search import problem, timing
from tests.conftest import RunSearch
from tests.test_front import candidate


class Stopwatch:
    """In the place of timing: the baseline takes 60 ms, alone a candidate 6, and of several the n-th n."""

    def __init__(self) -> None:
        self.timed: list[list[str]] = []

    def __call__(self, runners: Mapping[str, Any], inputs: Any, seconds: float) -> dict[str, Timing]:
        names = list(runners)
        self.timed.append(names[1:])
        alone = len(names) == 2 and names[1] == "candidate"
        return {
            name: Timing(((60.0,) * 3 if not place else (6.0,) * 3 if alone else (float(place),) * 3,) * 5)
            for place, name in enumerate(names)
        }


@pytest.fixture
def stopwatch(monkeypatch: pytest.MonkeyPatch) -> Stopwatch:
    watch = Stopwatch()
    monkeypatch.setattr(timing, "time_interleaved", watch)
    monkeypatch.setattr(problem, "load_target", lambda *_: load_target("pixel8").model_copy(update={"name": "local"}))
    return watch


def test_the_front_has_the_numbers_of_one_run_of_all(
    stopwatch: Stopwatch, run_search: RunSearch, tmp_path: Path
) -> None:
    out = tmp_path / "run"

    def search(budget: str) -> Result:
        return run_search(out=out, target="local", space="quantize-only", budget=budget)

    front = search("5trials").front
    *alone, together = stopwatch.timed
    assert alone == [["candidate"]] * len(together)
    assert {c.id for c in front} <= set(together)
    for c in front:
        assert c.latency_ms.value == together.index(c.id) + 1
        assert c.faster.value == 60 / c.latency_ms.value
        assert c.latency_ms.source == c.faster.source == "measured"
        assert f"| {c.faster.value:.2f}x (" in (out / c.path / "README.md").read_text(encoding="utf-8")
        listed = json.loads((out / c.path / "autolite.json").read_text(encoding="utf-8"))["sha256"]
        assert listed == {name: sha256(out / c.path / name) for name in listed}
    # Other limits choose among the same numbers; new candidates are timed beside those that are there.
    stopwatch.timed.clear()
    assert {c.id: c.latency_ms for c in search("5trials").front} == {c.id: c.latency_ms for c in front}
    assert not stopwatch.timed
    search("8trials")
    assert set(stopwatch.timed[-1]) > {c.id for c in front}


def test_what_does_not_fit_into_memory_is_timed_in_groups() -> None:
    several = [candidate(size=size) for size in (9.0, 1.0, 30.0, 2.0, 8.0)]
    groups = [[c.size_bytes.value for c in group] for group in timing._groups(several, 11.0)]
    assert groups == [[1.0, 2.0, 8.0], [9.0], [30.0]]
