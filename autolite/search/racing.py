"""Scoring in growing parts of a split, given up as soon as a plan is surely behind one that it cannot make up for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from autolite.measure import Runner
from autolite.search.scoring import Score, score
from autolite.tasks.base import Split, Task

FIRST, GROWTH = 64, 4  # examples of the first part, and how many times as many are scored at the next


def raced(
    runner: Runner, task: Task, split: Split, pad_id: int, seed: int, behind: Callable[[Score, NDArray[np.int64]], bool]
) -> tuple[Score, int]:
    """Score an artifact on a split, and return the score with how many of its examples were looked at.

    Args:
        runner: of the artifact.
        task: of the split.
        split: to score on.
        pad_id: of the tokenizer.
        seed: of the order, the same for all plans that are compared.
        behind: whether the score of the examples at these places, the first in that order, is enough to give up.
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
            return Score(examples[seen]), done
    return Score(examples), done


def parts(count: int) -> Iterator[int]:
    """Yield how many of `count` examples are scored at each look: 64, 256, 1024, ..., and all."""
    end = FIRST
    while end < count:
        yield end
        end *= GROWTH
    yield count
