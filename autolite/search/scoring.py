"""Scoring an artifact on a split, and the bootstrap intervals of what was scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autolite.front import Interval, Quality
from autolite.hardware.processor import cores
from autolite.measure import Runner
from autolite.tasks.base import Further, Split, Task

BATCH = 32
RESAMPLES = 1000
IN_MEMORY = 4_000_000  # draws of examples at once


@dataclass(frozen=True)
class Score:
    """Per-example sums [n, 2]; the quality ratio is the sum of column 0 over the sum of column 1."""

    examples: NDArray[np.float64]

    @property
    def ratio(self) -> float:
        """Accuracy, or the mean loss of a language model."""
        top, bottom = self.examples.sum(0)
        return float(top / bottom)


def scoring_threads() -> int:
    """All physical cores, or this process's share of them, which torch was given: the workload's threads are for
    timing, and do not change what is computed."""
    import torch

    return min(cores(), torch.get_num_threads())


def score(runner: Runner, task: Task, split: Split, pad_id: int) -> Score:
    """Run an artifact over a split and score every example, in the split's order."""
    examples = np.zeros((len(split), 2))
    for batch in task.batches(split, BATCH, pad_id):
        logits = runner.run(batch.inputs)["logits"]
        examples[batch.indices] = task.score_examples(logits, batch.labels)
    return Score(examples)


def compared(
    runners: Mapping[str, Runner], teacher: str, task: Further, split: Split, pad_id: int
) -> dict[str, dict[str, Score]]:
    """Run artifacts over a split side by side, batch by batch, and return for each what the task says further of it
    beside the one that is the teacher."""
    found: dict[str, dict[str, Score]] = {name: {} for name in runners}
    for batch in task.batches(split, BATCH // 2, pad_id):  # two of them are in memory at once
        said = runners[teacher].run(batch.inputs)["logits"]
        for name, runner in runners.items():
            logits = said if name == teacher else runner.run(batch.inputs)["logits"]
            for what, sums in task.further(logits, said, batch.labels).items():
                scored = found[name].setdefault(what, Score(np.zeros((len(split), 2))))
                scored.examples[batch.indices] = sums
            del logits  # before the next are computed
        del said
    return found


def _resampled(scores: list[Score], seed: int) -> list[NDArray[np.float64]]:
    """Ratios of each score over the same bootstrap resamples (Efron 1979), so that differences are paired."""
    count = len(scores[0].examples)
    rng, even = np.random.default_rng(seed), np.full(count, 1 / count)
    examples = np.concatenate([s.examples for s in scores], axis=1)
    part = max(1, IN_MEMORY // count)
    parts = [min(part, RESAMPLES - done) for done in range(0, RESAMPLES, part)]
    sums = np.concatenate([rng.multinomial(count, even, size=size) @ examples for size in parts])
    with np.errstate(invalid="ignore"):  # a quotient of nothing, where few examples count
        return [sums[:, i] / sums[:, i + 1] for i in range(0, sums.shape[1], 2)]


def _interval(values: NDArray[np.float64], point: float) -> Interval:
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return Interval(point, float(min(low, point)), float(max(high, point)))


def interval(scored: Score, seed: int) -> Interval:
    """Return the ratio of the sums with its 95 % bootstrap interval."""
    (ratios,) = _resampled([scored], seed)
    return _interval(ratios, scored.ratio)


def quality(scored: Score, task: Task, split: str, seed: int) -> Quality:
    """Return the task's metric with its 95 % bootstrap interval."""
    (ratios,) = _resampled([scored], seed)
    value = _interval(_each(task.summary, ratios), task.summary(scored.ratio))
    return Quality(task.metric, task.direction, value.value, value.low, value.high, split)


def kept(scored: Score, teacher: Score, task: Task, seed: int) -> Interval:
    """Return the fraction of the teacher's quality kept with its 95 % paired-bootstrap interval."""
    ours, theirs = _resampled([scored, teacher], seed)
    values = np.array([task.kept(a, b) for a, b in zip(ours, theirs, strict=True)])
    return _interval(values, task.kept(scored.ratio, teacher.ratio))


def _each(function: Callable[[float], float], values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.array([function(float(v)) for v in values])
