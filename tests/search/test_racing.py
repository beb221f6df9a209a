"""Racing gives up early only when it is told to, and never changes what a whole split comes to."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autolite import registry
from autolite.errors import InputError
from autolite.search.racing import parts, raced, surely_behind
from autolite.search.samplers import SAMPLERS, sampler_of
from autolite.search.scoring import Score, score
from autolite.tasks.base import Split


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

    def behind(part: object, seen: np.ndarray) -> bool:
        looks.append(len(seen))
        assert np.array_equal(part.examples, score(Echo(), task, split.take(seen), 0).examples)  # type: ignore[attr-defined]
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


def test_samplers_are_known_by_name_or_given_as_a_function() -> None:
    for name, make in SAMPLERS.items():
        assert sampler_of(name) is make
        assert type(make(1)).__name__.lower().startswith(name[:2])
    own = SAMPLERS["random"]
    assert sampler_of(own) is own
    with pytest.raises(InputError, match="unknown sampler 'tep': did you mean 'tpe'"):
        sampler_of("tep")
