"""What the front is, of candidates that have their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from autolite.front import Candidate
from autolite.limits import Constraints
from autolite.pareto import nondominated

NEAREST_MISSES = 3


def choose(
    candidates: Sequence[Candidate], limits: Constraints, objectives: Sequence[str]
) -> tuple[list[Candidate], list[Candidate]]:
    """Return the front, fastest first and with its ties, and the nearest misses, the nearest first.

    The front is what meets the limits and no other such candidate beats in the objectives, by point estimates. There
    are misses only if there is no front.
    """
    good = [c for c in candidates if not limits.violations(c)]
    if not good:
        return [], sorted(candidates, key=lambda c: sum(limits.violations(c).values()))[:NEAREST_MISSES]
    best = nondominated([point(c, objectives) for c in good])
    front = sorted((c for c, on_it in zip(good, best, strict=True) if on_it), key=lambda c: c.latency_ms.value)
    return [replace(c, ties=_ties(c, front)) for c in front], []


def point(candidate: Candidate, objectives: Sequence[str]) -> tuple[float, ...]:
    """Return what a candidate is compared by, each to be minimised."""
    # What was timed beside the baseline is compared by that ratio: a drift between two candidates' timings cancels.
    values = {
        "quality": -candidate.kept.value,
        "latency": 1 / candidate.faster.value,
        "size": candidate.size_bytes.value,
    }
    return tuple(values[name] for name in objectives)


def blocked(misses: Sequence[Candidate], limits: Constraints) -> tuple[dict[str, Any], ...]:
    """Return the misses as they stand in `front.json`, each with the limits that it is beyond."""
    return tuple({**c.to_json(), "blocked_by": limits.violations(c)} for c in misses)


def _ties(one: Candidate, front: Sequence[Candidate]) -> tuple[str, ...]:
    overlapping = (c for c in front if c.kept.low <= one.kept.high and one.kept.low <= c.kept.high)
    return tuple(c.id for c in overlapping if c.id != one.id)
