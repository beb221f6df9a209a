"""The order in which models are called and timed. Plain Python: it is sent to devices as it is."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # old Pythons on devices have others
    from collections.abc import Callable, Iterator, Mapping

    Call = Callable[[int], object]

_BURST_NS = 5_000_000
_BURST_CALLS = 50


def interleaved(
    calls: Mapping[str, Call],
    seconds: float,
    *,
    warmup: float = 0.2,
    min_rounds: int = 5,
    first: int = 0,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> Iterator[tuple[int, str, tuple[float, ...]]]:
    """Yield bursts of timed calls, model after model and round after round, so that a drift of the machine meets all.

    In a round each model is called once untimed (it brings its weights back into the caches that the others used) and
    then in a burst of timed calls: 5 ms of them, at least one. The order rotates from round to round.

    Args:
        calls: what to time, by name; each is given the number of the round.
        seconds: wall time for everything; `min_rounds` rounds are run even where that takes longer.
        warmup: seconds of untimed calls of each model before the first round.
        min_rounds: least number of rounds.
        first: number of the first round, where others were run before.
        clock: nanoseconds; for tests.

    Yields:
        The number of the round, the name, and the milliseconds of the burst's calls.
    """
    names, start = list(calls), clock()
    for call in calls.values():
        began = clock()
        call(first)
        while clock() - began < warmup * 1e9:
            call(first)
    done = first
    while done < min_rounds or clock() - start < seconds * 1e9:
        shift = done % len(names)
        for name in names[shift:] + names[:shift]:
            yield done, name, _burst(calls[name], done, clock)
        done += 1


def _burst(call: Call, number: int, clock: Callable[[], int]) -> tuple[float, ...]:
    call(number)
    found: list[float] = []
    began = now = clock()
    while not found or (now - began < _BURST_NS and len(found) < _BURST_CALLS):
        before = clock()
        call(number)
        now = clock()
        found.append((now - before) / 1e6)
    return tuple(found)
