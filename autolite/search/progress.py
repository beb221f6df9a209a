"""What a search tells whoever watches it, and the clock its budget runs on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from autolite.search.settings import Budget
from autolite.store import Store


@dataclass(frozen=True)
class FrontRow:
    """One point of the front so far, for people."""

    what: str
    kept: float
    faster: float
    smaller: float


@dataclass(frozen=True)
class Snapshot:
    """The state of a search at one moment. `trials` maps a stage to (finished, planned); planned 0 is open.
    `front` is that of stage `front_stage`: the last one that finished a trial."""

    stage: str
    doing: str
    step: int = 0
    steps: int = 0
    spent: float = 0.0
    left: float | None = None
    trials: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    front: tuple[FrontRow, ...] = ()
    front_stage: str = ""


Observer = Callable[[Snapshot], None]


def silent(_: Snapshot) -> None:
    """Watch nothing."""


class Clock:
    """Active seconds of a run over all its sessions; what was spent survives `kill -9` to within `every` seconds."""

    def __init__(self, store: Store, budget: Budget, started: float, every: float = 2.0) -> None:
        self._store, self.budget = store, budget
        self._before = float(store.get("spent", 0.0))
        self._started = started
        self._every, self._saved = every, started

    @property
    def spent(self) -> float:
        """Active seconds so far, this session's and earlier ones'."""
        return self._before + time.monotonic() - self._started

    @property
    def left(self) -> float | None:
        """Seconds left of a time budget, or None under a trial budget."""
        return None if self.budget.seconds is None else self.budget.seconds - self.spent

    def save(self, force: bool = False) -> None:
        """Write what was spent, at most every few seconds."""
        now = time.monotonic()
        if force or now - self._saved >= self._every:
            self._store.put("spent", self.spent)
            self._saved = now


class FollowingClock(Clock):
    """The clock of the process that decides, as others read it from the store: a few seconds late."""

    def __init__(self, store: Store, budget: Budget) -> None:
        super().__init__(store, budget, time.monotonic(), every=1.0)

    @property
    def spent(self) -> float:
        """Active seconds of the run, looked up at most once a second."""
        now = time.monotonic()
        if now - self._saved >= self._every:
            self._before, self._saved = float(self._store.get("spent", 0.0)), now
        return self._before

    def save(self, force: bool = False) -> None:
        """Write nothing: the time is another process's."""
