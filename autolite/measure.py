"""Measurement: what was found, how surely, and whether it was measured or predicted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import numpy as np


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
