"""One machine, several processes: who times a model has it for itself, and whoever trains there gives way.

The locks are files that the system releases when a process dies, in a folder that all users of the machine share.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from filelock import BaseFileLock

_WORKING = "working-"  # before the number of the process, in the names of lock files
_EVERY = 0.15  # seconds between two looks of a process at whether it has to give way; training asks every ten steps


@contextmanager
def host_lock(waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock that only one process of this machine has at a time; re-entrant within a process.

    It is had when no other process is `working`: those pause at their next `give_way` until it is released.

    Args:
        waiting: called once with a sentence if another process holds it, or is still working.
    """
    from filelock import Timeout

    lock, work = _timing_lock(), _work
    if lock.is_locked:  # by this process
        work = None
    if work is not None:
        work.release()  # or two processes that work and time would wait for each other
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if waiting:
                waiting(f"waiting: another process is timing a model on this machine (it holds {lock.lock_file})")
            lock.acquire(poll_interval=0.1)
        try:
            _wait_for_work(waiting)
            yield
        finally:
            lock.release()
    finally:
        if work is not None:
            work.acquire()
            _give_way()


_work: BaseFileLock | None = None  # held while this process works
_looked = 0.0  # when it last looked at whether it has to give way


@contextmanager
def working() -> Iterator[None]:
    """Train or score beside other processes, but not beside a timing of one of them (`host_lock`).

    A file lock of this process's own says so, which the system takes back when the process dies.
    """
    global _work
    from filelock import FileLock

    path = lock_folder() / f"{_WORKING}{os.getpid()}-{uuid.uuid4().hex[:8]}.lock"
    _work = FileLock(path, mode=0o666, thread_local=False)
    try:
        _work.acquire()
        _give_way()
        yield
    finally:
        _work.release(force=True)
        _work = None
        path.unlink(missing_ok=True)


def give_way() -> None:
    """Pause the work of this process while another one times a model, or waits to; looks a few times a second."""
    if time.monotonic() - _looked >= _EVERY:
        _give_way()


def _give_way() -> None:
    global _looked
    from filelock import Timeout

    lock, _looked = _timing_lock(), time.monotonic()
    while _work is not None:
        try:
            with lock.acquire(timeout=0):
                return
        except Timeout:
            _work.release()
            with lock.acquire(poll_interval=0.1):
                pass
            _work.acquire()


def _timing_lock() -> BaseFileLock:
    from filelock import FileLock

    return FileLock(lock_folder() / "timing.lock", mode=0o666, is_singleton=True, thread_local=False)


def lock_folder() -> Path:
    """Return the folder of all lock files.

    Everybody may write and remove there (no sticky bit), for in the temporary folder itself Linux refuses the files of
    other users. Where somebody has taken the name and does not share it, the users of a machine have a folder each, and
    only their own processes wait for each other.
    """
    shared = Path(tempfile.gettempdir()) / "autolite-locks"
    with suppress(OSError):
        shared.mkdir()
        shared.chmod(0o777)  # whatever the umask says; only now, for what was there may be a link to something else
    if not shared.is_symlink() and os.access(shared, os.W_OK | os.X_OK):
        return shared
    own = shared.with_name(f"{shared.name}-{os.getuid()}")
    own.mkdir(exist_ok=True)
    return own


def _wait_for_work(waiting: Callable[[str], None] | None) -> None:
    """Wait until no process works; one that is stopped (Ctrl-Z) disturbs nothing."""
    import psutil
    from filelock import FileLock, Timeout

    for path in lock_folder().glob(f"{_WORKING}*.lock"):
        process = int(path.name.removeprefix(_WORKING).partition("-")[0])
        told = False
        while True:
            try:
                with FileLock(path, mode=0o666).acquire(timeout=0):
                    break
            except Timeout:
                with suppress(psutil.Error):
                    if psutil.Process(process).status() == psutil.STATUS_STOPPED:
                        break
            if waiting and not told:
                waiting(f"waiting: process {process} is training on this machine, until it comes to a pause")
                told = True
            threading.Event().wait(0.05)
        if not psutil.pid_exists(process):
            path.unlink(missing_ok=True)
