"""Racing gives up early only when it is told to, and never changes what a whole split comes to."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.samplers import TPESampler

from autolite import registry
from autolite.errors import InputError
from autolite.search import engine, racing
from autolite.search.racing import parts, raced, surely_behind
from autolite.search.samplers import ADDITIVE, SAMPLERS, sampler_of
from autolite.search.scoring import Score, score
from autolite.search.studies import read_trials
from autolite.tasks.base import Split
from tests.conftest import RunSearch


@dataclass
class Echo:
    """Says class 1 for every text whose first id is odd, and counts the texts."""

    texts: int = 0
    calls: list[int] = field(default_factory=list)

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        ids = inputs["input_ids"]
        self.texts += len(ids)
        return {"logits": np.eye(2, dtype=np.float32)[ids[:, 0] % 2]}


def split_of(count: int) -> Split:
    rng = np.random.default_rng(count)
    ids = [rng.integers(4, 90, rng.integers(2, 9)) for _ in range(count)]
    return Split("search", ids, None, rng.integers(0, 2, count))


@given(st.integers(1, 10_000))
def test_parts_grow_and_end_with_all(count: int) -> None:
    found = list(parts(count))
    assert found[-1] == count
    assert found == sorted(set(found))
    assert all(b <= 4 * a for a, b in itertools.pairwise(found))


@pytest.mark.parametrize("count", [1, 63, 64, 65, 300])
def test_the_whole_split_scores_as_without_racing(count: int) -> None:
    task, split = registry.get("task", "text-classification"), split_of(count)
    whole = score(Echo(), task, split, 0)
    found, seen = raced(Echo(), task, split, 0, seed=3, behind=lambda *_: False)
    assert len(seen) == count
    assert np.array_equal(found.examples, whole.examples)


def test_what_is_behind_is_not_scored_on_the_rest() -> None:
    task, split, runner = registry.get("task", "text-classification"), split_of(300), Echo()
    looks: list[int] = []

    def behind(part: Score, seen: np.ndarray) -> bool:
        looks.append(len(seen))
        assert np.array_equal(part.examples, score(Echo(), task, split.take(seen), 0).examples)
        return len(seen) > 64

    found, seen = raced(runner, task, split, 0, seed=3, behind=behind)
    assert (len(seen), runner.texts, looks) == (256, 256, [64, 256])
    assert np.array_equal(found.examples, score(Echo(), task, split, 0).examples[seen])


def test_a_plan_is_behind_only_beyond_the_noise_of_both() -> None:
    task, rng = registry.get("task", "text-classification"), np.random.default_rng(0)

    def accuracy(value: float) -> Score:
        return Score(np.stack([(rng.random(400) < value).astype(float), np.ones(400)], axis=1))

    teacher, seen = accuracy(0.95), np.arange(400)
    assert not surely_behind(teacher, 0.97, task, 0)(accuracy(0.93), seen), "a few points can be chance"
    assert surely_behind(teacher, 0.97, task, 0)(accuracy(0.7), seen)
    assert not surely_behind(teacher, 0.5, task, 0)(accuracy(0.7), seen), "it is ahead of that one"


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_samplers_are_known_by_name_or_given_as_a_function() -> None:
    for name, make in SAMPLERS.items():
        assert sampler_of(name) is make
        assert type(make(1)).__name__.lower().startswith("tp" if name == ADDITIVE else name[:2])
    own = SAMPLERS["random"]
    assert sampler_of(own) is own
    with pytest.raises(InputError, match="unknown sampler 'tep': did you mean 'tpe'"):
        sampler_of("tep")


@pytest.mark.parametrize(
    "sampler",
    [
        pytest.param("nsga2", marks=pytest.mark.slow),
        pytest.param("gp", marks=pytest.mark.slow),
        lambda seed: TPESampler(seed=seed, n_startup_trials=2),
    ],
    ids=["nsga2", "gp", "own"],
)
def test_a_search_runs_with_any_sampler(sampler: Any, run_search: RunSearch, tmp_path: Path) -> None:
    result = run_search(sampler=sampler, budget="10trials", out=tmp_path / "run")
    assert len(result.front)


def test_only_the_screen_gives_up_and_only_what_a_rival_is_as_fast_and_as_small_as(
    run_search: RunSearch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(racing, "FIRST", 8)
    monkeypatch.setattr(engine, "surely_behind", lambda *_: lambda part, seen: True)
    result = run_search(budget="18trials", out=tmp_path / "run")
    trials = read_trials(f"sqlite:///{result.path / 'study.db'}", "run")
    seen = {stage: {t.user_attrs["examples"] for t in found} for stage, found in trials.items()}
    assert len(seen["recover"]) == len(seen["confirm"]) == 1, "later stages score whole splits"
    assert seen["screen"] == {8, max(seen["screen"])}
    for t in trials["screen"]:
        rivals = [
            r
            for r in trials["screen"]
            if r.number < t.number
            and r.user_attrs["latency_ms"] <= t.user_attrs["latency_ms"]
            and r.values[2] <= t.values[2]
        ]
        assert bool(rivals) == (t.user_attrs["examples"] == 8)
