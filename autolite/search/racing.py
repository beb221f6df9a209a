"""Scoring in growing parts of a split, given up as soon as a plan is surely behind one that it cannot make up for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from autolite.measure import Runner
from autolite.search.scoring import Score, kept, score
from autolite.tasks.base import Split, Task

FIRST, GROWTH = 64, 4  # examples of the first part, and how many times as many are scored at the next

# Whether the score of the examples at these places is enough to give up.
Behind = Callable[[Score, NDArray[np.int64]], bool]


def surely_behind(teacher: Score, rival: float, task: Task, seed: int) -> Behind:
    """Return whether the upper end of the 95 % interval of what a plan keeps of the teacher's quality is below `rival`,
    the lower end of the interval of one that is as fast and as small."""
    return lambda part, seen: kept(part, Score(teacher.examples[seen]), task, seed).high < rival


def raced(
    runner: Runner, task: Task, split: Split, pad_id: int, seed: int, behind: Behind
) -> tuple[Score, NDArray[np.int64]]:
    """Score an artifact on a split, and return the score with the places of the examples that were looked at.

    Args:
        runner: of the artifact.
        task: of the split.
        split: to score on.
        pad_id: of the tokenizer.
        seed: of the order, the same for all plans that are compared.
        behind: asked after each part but the last.
    """
    order = np.random.default_rng(seed).permutation(len(split))
    examples = np.zeros((len(split), 2))
    done = 0
    for end in parts(len(split)):
        new = np.sort(order[done:end])
        examples[new] = score(runner, task, split.take(new), pad_id).examples
        done = end
        seen = np.sort(order[:done])
        if done < len(split) and behind(Score(examples[seen]), seen):
            return Score(examples[seen]), seen
    return Score(examples), np.arange(len(split))


def parts(count: int) -> Iterator[int]:
    """Yield how many of `count` examples are scored at each look: 64, 256, 1024, ..., and all."""
    end = FIRST
    while end < count:
        yield end
        end *= GROWTH
    yield count
