"""Further processes that work on a run: they evaluate trials of the stage that is open, and decide nothing."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from autolite.errors import InputError, RunError
from autolite.hardware import LOCAL
from autolite.hardware.processor import cores
from autolite.search.engine import OPEN, Engine
from autolite.search.identity import check_same_run, run_identity
from autolite.search.leases import SEARCH, WORKER, Leases, Pauses
from autolite.search.problem import Problem, load_problem
from autolite.search.progress import FollowingClock, Observer, Snapshot, silent
from autolite.search.settings import Settings
from autolite.search.stages import Decision
from autolite.search.studies import open_studies
from autolite.space import Space
from autolite.store import Store, database_of, storage_errors

PATIENCE = 60.0  # seconds without the process that decides, after which a worker ends
PARENT = "AUTOLITE_PARENT"  # variable with the number of the process without which a worker ends at once
STORAGE = "AUTOLITE_STORAGE"  # variable with the database's URL, whose password a command line would show to everybody
INVITATION = "invitation"  # the fact with what another process needs to work on the run


def invite(problem: Problem, space: Space, store: Store) -> None:
    """Leave in the store what workers need; `space` is the one that was asked for, before any of it was left out."""
    settings = problem.settings
    local = problem.profile.name == LOCAL
    store.put(
        INVITATION,
        {
            "settings": settings.to_json(),
            "space": space.model_dump(mode="json"),
            "baseline": [file.relative_to(settings.out).as_posix() for file in problem.baseline],
            "machine": platform.node() if local else None,
        },
    )


def work(run: str | Path, storage: str | None = None, threads: int | None = None, observer: Observer = silent) -> int:
    """Evaluate trials of a run that another process searches, until it ends; returns how many.

    Args:
        run: the run's folder, as this machine sees it.
        storage: the URL that the search was given, if any.
        threads: processor cores that training and scoring may use; all of them if None.
        observer: called with a Snapshot whenever something changes.

    Raises:
        RunError: if there is no such run, it is of another model or data than what is found here, or no process
            searches it for a minute.
        InputError: if this process cannot have or do what the run needs.
    """
    out = Path(run)
    url, name = database_of(out, storage)
    alive = _not_orphaned()
    with ExitStack() as stack:
        stack.enter_context(storage_errors(str(out)))
        store = Store(url, name)
        stack.callback(store.close)
        leases = stack.enter_context(Leases(store, alive=alive))
        if threads is not None:
            stack.enter_context(torch_threads(threads))
        return _Worker(out, storage, store, leases, observer, alive).run()


def _not_orphaned() -> Callable[[], bool]:
    """Return what tells whether the process that started this one as its own worker, if any, is still there."""
    parent = os.environ.get(PARENT)
    return lambda: parent is None or os.getppid() == int(parent)


class _Worker:
    def __init__(
        self,
        out: Path,
        storage: str | None,
        store: Store,
        leases: Leases,
        observer: Observer,
        alive: Callable[[], bool],
    ) -> None:
        self._out, self._storage, self._store = out, storage, store
        self._leases, self._observer, self._alive = leases, observer, alive

    def run(self) -> int:
        if not self._open():
            return 0
        invitation = self._store.get(INVITATION)
        problem = self._join(invitation)
        done = 0
        presence = self._leases.take(f"{WORKER}{self._leases.owner}")
        assert presence is not None
        with open_studies(problem.settings, self._store.run, problem.task) as studies:
            while (opened := self._open()) is not None:
                # Limits and the budget may be others than they were, if the search was stopped and goes on.
                problem = replace(problem, settings=self._settings(self._store.get(INVITATION)))
                clock = FollowingClock(self._store, problem.settings.budget)
                engine = Engine(problem, studies, self._store, clock, self._leases, self._observer)
                decision = Decision.from_json(opened["decision"])
                done += engine.work(opened["stage"], decision, self._is_searched)
        return done

    def _open(self) -> Any:
        """Wait for a stage that is open and return it; None when the run is finished.

        Raises:
            RunError: if nobody searches.
        """
        pauses, alone = Pauses(), 0.0
        while self._alive():
            searched = self._store.holder(SEARCH) is not None
            if searched:
                alone = 0.0
                if opened := self._store.get(OPEN):
                    return opened
            elif self._store.get("finished") is not None:
                return None
            elif alone > PATIENCE:
                raise RunError(
                    f"no process has searched {self._out} for {alone:.0f} s: type its search command again, which goes "
                    "on with it, and then this one"
                )
            before = pauses.waited
            pauses.wait()
            alone += pauses.waited - before
            self._observer(Snapshot("waiting", "for the search to open a stage" if searched else "for the search"))
        return None

    def _is_searched(self) -> bool:
        return self._store.holder(SEARCH) is not None and self._alive()

    def _settings(self, invitation: Any) -> Settings:
        return Settings.from_json(invitation["settings"], self._out, self._storage)

    def _join(self, invitation: Any) -> Problem:
        settings = self._settings(invitation)
        if invitation["machine"] not in (None, platform.node()):
            raise InputError(
                f"the run in {self._out} measures on its own machine ({invitation['machine']}): workers for --target "
                "local run there, those for any other target anywhere"
            )
        space = Space.model_validate(invitation["space"])
        check_same_run(self._store, run_identity(settings, space), self._out)

        def note(text: str) -> None:
            self._observer(Snapshot("profile", text))

        baseline = [self._out / file for file in invitation["baseline"]]
        problem = load_problem(settings, space, self._store, note, baseline)
        begun = self._store.get("space")
        return problem if begun is None else replace(problem, space=Space.model_validate(begun))


@contextmanager
def local_workers(settings: Settings, observer: Observer) -> Iterator[None]:
    """Have as many workers as the settings say on this machine, each with its share of the cores; they end with the
    block, and their errors are in `worker-1.log` and so on in the run's folder.

    A worker gets no Ctrl-C of its own: this process ends it.
    """
    environment = {**os.environ, PARENT: str(os.getpid())}
    environment.pop(STORAGE, None)  # the user may have set it for another run
    if settings.storage is not None:
        environment[STORAGE] = settings.storage
    threads = max(1, cores() // (1 + settings.workers))
    command = [sys.executable, "-m", "autolite", "worker", str(settings.out), "--threads", str(threads), "--quiet"]
    processes: dict[str, subprocess.Popen[bytes]] = {}
    with ExitStack() as logs:
        try:
            for number in range(settings.workers):
                log = logs.enter_context((settings.out / f"worker-{number + 1}.log").open("wb"))
                processes[log.name] = subprocess.Popen(
                    command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
            yield
        finally:
            for name, process in processes.items():  # all, before the first is waited for: they end together
                if process.poll():  # ended by itself, and not well
                    observer(Snapshot("finish", f"a worker ended early: {name} says why"))
                process.terminate()
            for name, process in processes.items():
                _await_end(process, name)


def _await_end(process: subprocess.Popen[bytes], log: str) -> None:
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=10)
    process.kill()
    process.wait()
    with suppress(OSError):
        if Path(log).stat().st_size == 0:
            Path(log).unlink()


@contextmanager
def share_of_cores(processes: int) -> Iterator[None]:
    """Train and score on this process's share of the cores; one process has them all, as torch finds them."""
    if processes == 1:
        yield
    else:
        with torch_threads(max(1, cores() // processes)):
            yield


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use so many threads, and afterwards as many as before."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
