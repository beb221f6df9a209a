"""How a number changes over a run."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]
WARM_UP = 20  # steps
DECAY = 0.4  # of all steps


def scheduled(start: float, end: float | None, schedule: Schedule, progress: float) -> float:
    """Return the value at `progress`, from 0 (the first step) to 1 (the last), on the way from `start` to `end`.

    "cosine" leaves the start and reaches the end slowly; "constant", or an `end` of None, stays at the start.
    """
    if schedule == "constant" or end is None:
        return start
    part = progress if schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return start + (end - start) * part


def stable_steps(steps: int) -> int:
    """Return how many of `steps` are the same in every longer run of `warm_up_stable_decay`."""
    return steps - round(DECAY * steps)


def warm_up_stable_decay(step: int, steps: int) -> float:
    """Return the learning rate's factor at `step` (from 0) of `steps`: up to 1 over the first `WARM_UP` steps, 1, and
    down to 0 over the last `DECAY` of all, in straight lines (Hu et al. 2024, "MiniCPM"; Hägele et al. 2024). A longer
    run begins as a shorter one does, and can go on from where that one's decay began."""
    stable = stable_steps(steps)
    return min((step + 1) / WARM_UP, 1.0, (steps - step) / max(1, steps - stable))
