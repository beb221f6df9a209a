"""Measurement: what was found, how surely, measured or predicted; and the only place where a model is timed."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from autolite.errors import InputError, unknown
from autolite.host_lock import host_lock
from autolite.rounds import interleaved

Inputs = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Workload:
    """The call whose latency is meant: `batch` sequences of `tokens` tokens, on `threads` threads.

    For language models `tokens` is the prompt and `generated` the number of tokens produced after it.
    """

    batch: int = 1
    tokens: int = 128
    threads: int = 1
    generated: int = 0

    def __str__(self) -> str:
        text = f"batch={self.batch},tokens={self.tokens},threads={self.threads}"
        return text + (f",generated={self.generated}" if self.generated else "")

    @classmethod
    def parse(cls, text: str, default: Workload | None = None) -> Workload:
        """Read the form that `str` writes; what is not named keeps its value in `default`.

        >>> str(Workload.parse("tokens=64, threads=2"))
        'batch=1,tokens=64,threads=2'

        Raises:
            InputError: naming the part that is unknown, repeated, not a whole number, or too small.
        """
        known = [field.name for field in fields(cls)]
        found: dict[str, int] = {}
        for part in text.split(","):
            name, equals, number = (piece.strip() for piece in part.partition("="))
            if not equals:
                raise InputError(f"workload '{text}': '{part}' is not name=number, as in batch=1,tokens=64,threads=1")
            if name not in known:
                raise InputError(f"workload '{text}': {unknown('part', name, known)}")
            if name in found:
                raise InputError(f"workload '{text}': {name} is given twice; give it once")
            least = 0 if name == "generated" else 1
            if not number.isascii() or not number.isdigit() or int(number) < least:
                raise InputError(f"workload '{text}': {name}={number} must be a whole number of at least {least}")
            found[name] = int(number)
        return replace(default or cls(), **found)


@dataclass(frozen=True, slots=True)
class Measurement:
    """One number with its 95 % interval. `source` is "measured" or "predicted"; sizes are exact (low = high).

    Metrics and units: latency_ms, p90_ms, ttft_ms (milliseconds), tokens_per_second, size_bytes, memory_bytes
    (bytes), energy_mj (millijoules).
    """

    metric: str
    value: float
    low: float
    high: float
    source: Literal["measured", "predicted"]
    runtime: str = ""
    workload: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the measurement as plain JSON types."""
        return asdict(self)


class Runner(Protocol):
    """A loaded artifact that can be called; what `autolite.measure` times."""

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run one call; names and dtypes of the arrays are the artifact's own."""
        ...


class Reading(Protocol):
    """A sequence of tokens that a language model is reading piece by piece."""

    def read(self, ids: np.ndarray) -> np.ndarray:
        """Read the next tokens, int64 [batch, tokens]; return the logits after the last, float32 [batch, vocab]."""
        ...


@runtime_checkable
class Decoder(Runner, Protocol):
    """A loaded language model that can go on from the keys and values of earlier calls."""

    def reading(self, limit: int) -> Reading:
        """Begin to read a sequence of at most `limit` tokens piece by piece."""
        ...

    def generating(self, tokens: int) -> Runner:
        """Return what makes whole calls, in which so many tokens follow the prompt."""
        ...


_RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Timing:
    """Wall times of one runner in milliseconds: for each round, the calls of its burst in order.

    A round is the unit of resampling, because calls of one burst are not independent of each other.
    """

    rounds: tuple[tuple[float, ...], ...]

    @property
    def samples(self) -> int:
        """Number of timed calls."""
        return sum(len(calls) for calls in self.rounds)

    @property
    def medians(self) -> np.ndarray:
        """The median of each round, float64 [rounds]."""
        return np.array([np.median(calls) for calls in self.rounds])

    @property
    def median(self) -> float:
        """Median over the rounds of their medians, so that every round weighs the same."""
        return float(np.median(self.medians))

    @property
    def p90(self) -> float:
        """The 90th percentile of all calls."""
        return float(np.percentile(np.concatenate(self.rounds), 90))

    def median_interval(self) -> tuple[float, float]:
        """95 % percentile-bootstrap interval of the median, rounds resampled."""
        medians = self.medians
        return _interval(np.median(medians[_resamples(len(medians))], axis=1))

    def p90_interval(self) -> tuple[float, float]:
        """95 % percentile-bootstrap interval of the 90th percentile, whole rounds resampled."""
        calls = [np.array(burst) for burst in self.rounds]
        picks = _resamples(len(calls))
        return _interval(np.array([np.percentile(np.concatenate([calls[i] for i in pick]), 90) for pick in picks]))


def _resamples(rounds: int) -> np.ndarray:
    """The same resamples for every timing of so many rounds: [resamples, rounds] indices."""
    return np.random.default_rng(0).integers(rounds, size=(_RESAMPLES, rounds))


def _interval(estimates: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(estimates, [2.5, 97.5])
    return float(low), float(high)


def time_interleaved(
    runners: Mapping[str, Runner],
    inputs: Inputs | Sequence[Inputs],
    seconds: float,
    *,
    warmup: float = 0.2,
    min_rounds: int = 5,
    waiting: Callable[[str], None] | None = None,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, Timing]:
    """Time runners in turn, round after round; see `autolite.rounds.interleaved`. Garbage collection is off and the
    host's timing lock is held throughout.

    Args:
        runners: what to time, by name.
        inputs: the arrays of a call, or several sets of them, used in turn, the same set for all runners of a round.
        seconds: wall time for everything; `min_rounds` rounds are run even where that takes longer.
        warmup: seconds of untimed calls of each runner before the first round.
        min_rounds: least number of rounds.
        waiting: called once with a sentence if another process is timing and this one has to wait for it.
        clock: nanoseconds; for tests.

    Raises:
        ValueError: if there is no runner or no input.
    """
    sets: Sequence[Inputs] = [inputs] if isinstance(inputs, Mapping) else list(inputs)
    if not runners or not sets:
        raise ValueError(f"need at least one runner and one input, but got {len(runners)} and {len(sets)}")
    calls = {name: partial(_call, runner, sets) for name, runner in runners.items()}
    rounds: dict[str, list[tuple[float, ...]]] = {name: [] for name in runners}
    with host_lock(waiting), _no_garbage_collection():
        for _, name, burst in interleaved(calls, seconds, warmup=warmup, min_rounds=min_rounds, clock=clock):
            rounds[name].append(burst)
    return {name: Timing(tuple(found)) for name, found in rounds.items()}


def _call(runner: Runner, sets: Sequence[Inputs], number: int) -> None:
    runner.run(sets[number % len(sets)])


def faster(baseline: Timing, candidate: Timing) -> tuple[float, float, float]:
    """Return baseline / candidate (ratio of medians) and its 95 % interval.

    Rounds are resampled in pairs: what slowed a whole round slowed both, and cancels.

    Raises:
        ValueError: if the two were not timed together (numbers of rounds differ).
    """
    if len(baseline.rounds) != len(candidate.rounds):
        raise ValueError(
            f"baseline has {len(baseline.rounds)} rounds, candidate {len(candidate.rounds)}: "
            "time both in one call of time_interleaved"
        )
    slow, fast = baseline.medians, candidate.medians
    picks = _resamples(len(slow))
    low, high = _interval(np.median(slow[picks], axis=1) / np.median(fast[picks], axis=1))
    return float(np.median(slow) / np.median(fast)), low, high


def tokens_per_second(whole: Timing, prompt: Timing, tokens: int) -> tuple[float, float, float] | None:
    """Return how many tokens a second are generated, and its 95 % interval: `tokens` (of all sequences together) in the
    time by which whole calls are slower than those that only read the prompt, rounds resampled in pairs; None if that
    is lost in noise.

    Raises:
        ValueError: if the two were not timed together (numbers of rounds differ).
    """
    if len(whole.rounds) != len(prompt.rounds):
        raise ValueError(f"{len(whole.rounds)} and {len(prompt.rounds)} rounds: time both in one time_interleaved")
    steps = whole.medians - prompt.medians
    if np.median(steps) <= 0:
        return None
    resampled = np.median(steps[_resamples(len(steps))], axis=1)
    low, high = _interval(1e3 * tokens / resampled[resampled > 0])
    return float(1e3 * tokens / np.median(steps)), low, high


def timing_to_measurements(timing: Timing, workload: Workload, runtime: str) -> dict[str, Measurement]:
    """Return latency_ms (the median) and p90_ms as measurements."""
    return {
        metric: Measurement(metric, value, *interval, "measured", runtime, str(workload))
        for metric, value, interval in (
            ("latency_ms", timing.median, timing.median_interval()),
            ("p90_ms", timing.p90, timing.p90_interval()),
        )
    }


def random_texts(vocab: int, workload: Workload, seed: int = 0, count: int = 4) -> list[dict[str, np.ndarray]]:
    """Return inputs of a workload's size, random ids without padding: int64 [batch, tokens]. Models that have no token
    types leave those out."""
    rng, shape = np.random.default_rng(seed), (workload.batch, workload.tokens)
    return [
        {
            "input_ids": rng.integers(0, vocab, shape, dtype=np.int64),
            "attention_mask": np.ones(shape, dtype=np.int64),
            "token_type_ids": np.zeros(shape, dtype=np.int64),
        }
        for _ in range(count)
    ]


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
