"""Leases: who works on what, so that several processes can share a search and any of them may die.

A process holds a lease on each thing that it works on and renews it; one that is not renewed runs out, and whoever
takes it then has a higher token. What a lease guards is written only in a transaction that finds its token still the
last one (fencing: Kleppmann 2016, "How to do distributed locking"), so that a process that slept through its lease
changes nothing. Times are those of the database's clock: the clocks of the machines need not agree.
"""

from __future__ import annotations

import os
import platform
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from autolite.errors import RunError, StorageError
from autolite.store import Store

SECONDS = 30.0  # that a lease lasts without being renewed, which happens six times in that
POLL = 0.05, 1.0  # seconds between two looks at what somebody else holds: at first, and at most

SEARCH = "search"  # the lease of the process that decides
WORKER = "worker "  # before the owner, in the leases by which workers say that they are there


class LeaseLostError(Exception):
    """Another process has taken what this one worked on: it must not write anything about it."""


@dataclass(frozen=True)
class Lease:
    """What is held, and the fencing token."""

    key: str
    token: int


class Leases:
    """The leases of this process, renewed by a thread of it; a process that stops, or dies, loses them."""

    def __init__(
        self, store: Store, beat: Callable[[], None] = lambda: None, alive: Callable[[], bool] = lambda: True
    ) -> None:
        """Renew whatever is taken from now on; `beat` is called beside it. A process that is not `alive`, because the
        one that it works for is gone, gives up what it works on."""
        self.store, self._beat, self._alive = store, beat, alive
        self.owner = f"{platform.node()} {os.getpid()} {uuid.uuid4().hex[:8]}"
        self._held: set[Lease] = set()
        self._lead: Lease | None = None
        self._lock = threading.Lock()  # or the thread might renew what was just given up
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="leases", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._closed.set()
        self._thread.join()
        with suppress(StorageError):  # they run out by themselves
            for lease in list(self._held):
                self.end(lease)

    def take(self, key: str, *, force: bool = False) -> Lease | None:
        """Take a lease; None while another process holds it, unless `force`."""
        token = self.store.take_lease(key, self.owner, SECONDS, force=force)
        if token is None:
            return None
        lease = Lease(key, token)
        self._held.add(lease)
        return lease

    def lead(self) -> Lease:
        """Become the process that decides, in the place of one that died: its leases end. The caller holds the lock
        of the run's folder, so that no other process of this machine decides.

        Raises:
            RunError: if a process of another machine does.
        """
        holder = self.store.holder(SEARCH)
        if holder is not None and holder.rpartition(" ")[0].rpartition(" ")[0] != platform.node():
            raise RunError(
                f"another process is working on the run '{self.store.run}' ({holder}): wait for it, or "
                f"{SECONDS:.0f} s if it is dead"
            )
        self.store.end_leases_with(SEARCH)
        lease = self.take(SEARCH, force=True)
        assert lease is not None
        self._lead = lease
        return lease

    def check_lead(self) -> None:
        """Raises RunError if another process decides now: this one slept for longer than its lease."""
        if self._lead not in self._held:
            raise RunError(
                f"another process has taken the run '{self.store.run}' over, while this one did not run for "
                f"{SECONDS:.0f} s: what was found is kept, and that one goes on"
            )

    def end(self, lease: Lease) -> None:
        """Give a lease up, if it is still held."""
        with self._lock:
            if lease in self._held:
                self._held.discard(lease)
                self.store.end_lease(lease.key, lease.token)

    def drop(self, lease: Lease) -> None:
        """Renew it no more."""
        with self._lock:
            self._held.discard(lease)

    def check(self, lease: Lease, *, asking: bool = False) -> None:
        """Ask this process, or with `asking` (before a result is written) the database, whether a lease is still held.

        Raises:
            LeaseLostError: if it is not.
        """
        if asking and not self.store.renew_lease(lease.key, lease.token, SECONDS):
            self._held.discard(lease)
        if lease not in self._held or not (asking or self._alive()):
            raise LeaseLostError(lease.key)

    @contextmanager
    def holding(self, key: str, unless: Callable[[], bool] = lambda: False) -> Iterator[Lease | None]:
        """Hold a lease, waiting while another process does; None, without one, as soon as `unless` is true."""
        lease, pauses = None, Pauses()
        while not unless() and (lease := self.take(key)) is None:
            pauses.wait()
        try:
            yield lease
        finally:
            if lease is not None:
                self.end(lease)

    def _renew(self) -> None:
        while not self._closed.wait(SECONDS / 6):
            with suppress(StorageError):  # what cannot be renewed now may be, the next time
                for lease in list(self._held):
                    with self._lock:
                        if lease in self._held and not self.store.renew_lease(lease.key, lease.token, SECONDS):
                            self._held.discard(lease)
                self._beat()


class Pauses:
    """Waits between looks at something: short ones, then longer ones. `waited` has the seconds of all."""

    def __init__(self) -> None:
        self.waited = 0.0
        self._next = POLL[0]

    def wait(self) -> None:
        """Wait once."""
        threading.Event().wait(self._next)
        self.waited += self._next
        self._next = min(2 * self._next, POLL[1])
