"""AutoLite's command line in processes of their own, for tests that kill them. They are forked from one that has
imported all that a search needs, so that each is there at once; that one has no threads yet."""

from __future__ import annotations

import atexit
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

_FORKS = get_context("forkserver")
_FORKS.set_forkserver_preload(["autolite.search.run", "autolite.search.worker"])


class CommandLine:
    """`autolite WORDS`, and what it prints; `patch` is called with `given` before it begins."""

    def __init__(self, *words: str, patch: Callable[..., None] | None = None, given: tuple[object, ...] = ()) -> None:
        receiver, sender = _FORKS.Pipe(duplex=False)
        self._process = _FORKS.Process(target=_main, args=(words, dict(os.environ), sender, patch, given))
        self._process.start()
        atexit.register(self._process.kill)  # what a failed test leaves, stopped or not, is not waited for
        sender.close()
        self._printed: SimpleQueue[str | None] = SimpleQueue()
        Thread(target=self._read, args=(receiver,), daemon=True).start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def _read(self, receiver: Connection) -> None:
        with receiver, open(receiver.fileno(), encoding="utf-8", closefd=False) as printed:
            for line in printed:
                self._printed.put(line)
        self._printed.put(None)

    def lines(self) -> Iterator[str]:
        """Yield what it prints, until it ends."""
        while (line := self._printed.get()) is not None:
            yield line

    def send_signal(self, how: signal.Signals) -> None:
        os.kill(self.pid, how)

    def wait(self, seconds: float) -> int:
        """Return its exit code, or minus the signal that ended it."""
        self._process.join(seconds)
        assert self._process.exitcode is not None, f"it has not ended after {seconds} s"
        return self._process.exitcode


def _main(
    words: tuple[str, ...],
    environment: dict[str, str],
    printed: Connection,
    patch: Callable[..., None] | None,
    given: tuple[object, ...],
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(printed.fileno(), 1)
    printed.close()
    if patch is not None:
        patch(*given)
    from autolite.cli import main

    main(list(words))


def hold_first_trial(folder: Path, lease: float) -> None:
    """Stop a worker in its first trial, when its student is trained and scored, until a file is there."""
    from autolite.search import engine, leases

    original = engine.evaluate

    def held(*arguments: object) -> object:
        found = original(*arguments)
        (folder / "evaluated").touch()
        while not (folder / "go").exists():
            time.sleep(0.05)
        return found

    leases.SECONDS, engine.evaluate = lease, held
