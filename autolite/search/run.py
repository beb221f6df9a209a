"""One run: check, load, run the stages, choose the front, write it; or go on with what is there."""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from filelock import FileLock, Timeout

from autolite import registry
from autolite.devices import device_at
from autolite.errors import InputError, NoCandidateError, RunError
from autolite.files import write_atomically
from autolite.front import Front, Result, front_file, read_front
from autolite.hardware import LOCAL, load_target
from autolite.inference import MANIFEST
from autolite.search.engine import OPEN, Engine
from autolite.search.finish import listed, write_front
from autolite.search.identity import check_same_run, run_identity
from autolite.search.leases import WORKER, Leases
from autolite.search.narrow import narrow
from autolite.search.problem import Problem, clean_leftovers, load_problem
from autolite.search.progress import Clock, Observer, Snapshot, silent
from autolite.search.reachable import check_reachable
from autolite.search.samplers import sampler_of
from autolite.search.schedule import SINCE
from autolite.search.settings import Budget, Settings
from autolite.search.studies import open_studies
from autolite.search.timing import check_device
from autolite.search.worker import invite, local_workers, share_of_cores
from autolite.space import Space, load_space
from autolite.store import NAME, TEACHER_SHAPE, Store, storage_errors


def run(settings: Settings, observer: Observer = silent) -> Result:
    """Run a search from ready settings; raises what `autolite.search` raises."""
    started = time.monotonic()
    registry.get("task", settings.task)
    registry.get("runtime", settings.runtime)
    sampler_of(settings.sampler)
    if settings.workers and settings.own_functions:
        raise InputError(
            f"workers={settings.workers} with a {settings.own_functions[0]} of your own: another process cannot be "
            "given a Python function; leave workers out"
        )
    space = load_space(settings.space)
    for target in (settings.target, *settings.others):
        if target != LOCAL:  # a wrong name or file is told at once; "local" may have to be measured first
            load_target(target)
    _check_measure_on(settings)
    with storage_errors(str(settings.out)), _locked(settings.out):
        store = Store(settings.storage_url, _name(settings))
        try:
            identity = run_identity(settings, space)
            check_same_run(store, identity, settings.out)
            if not _finished(settings, store):
                _search(settings, space, identity, store, observer, started)
        finally:
            store.close()
    return _checked(Result(settings.out), settings)


def _check_measure_on(settings: Settings) -> None:
    """Refuse a device that cannot be timed on, whatever it is.

    Raises:
        InputError: saying why.
    """
    address = settings.measure_on
    if address is None:
        return
    device_at(address)
    if settings.target == LOCAL:
        raise InputError(
            f"--measure-on {address} with --target local, which is timed here: name the device's own profile as the "
            "target, such as what autolite calibrate has written for it"
        )
    if settings.runtime != "onnxruntime":
        raise InputError(
            f"--measure-on {address} with --runtime {settings.runtime}: devices have onnxruntime; leave one out"
        )


def _name(settings: Settings) -> str:
    """The run's name in its database, kept in its folder: a shared database may hold another run of that name."""
    file = settings.out / NAME
    if not file.is_file():
        name = settings.out.resolve().name
        unique = name if settings.storage is None else f"{name}-{uuid.uuid4().hex[:8]}"
        write_atomically(file, unique.encode())
    return file.read_text(encoding="utf-8")


def _search(
    settings: Settings, space: Space, identity: dict[str, str], store: Store, observer: Observer, started: float
) -> None:
    clock = Clock(store, settings.budget, started)
    with Leases(store, clock.save) as leases, share_of_cores(1 + settings.workers):
        leases.lead()
        store.put(OPEN, None)
        store.put("finished", None)  # or workers would end as soon as this process is interrupted
        if not store.leases(WORKER):  # what is half-written may be theirs
            clean_leftovers(settings.out)
        _search_as_leader(settings, space, identity, store, observer, clock, leases)


def _search_as_leader(
    settings: Settings,
    space: Space,
    identity: dict[str, str],
    store: Store,
    observer: Observer,
    clock: Clock,
    leases: Leases,
) -> None:
    def note(text: str) -> None:
        observer(Snapshot("profile", text, spent=clock.spent, left=clock.left))

    problem = load_problem(settings, space, store, note)
    problem = replace(problem, space=_narrowed(problem, store, note))
    check_reachable(problem)
    check_device(problem, note)
    store.put("identity", identity)
    store.put(TEACHER_SHAPE, problem.teacher.shape.to_json())
    with open_studies(settings, store.run, problem.task) as studies:
        invite(problem, space, store)
        engine = Engine(problem, studies, store, clock, leases, observer)
        try:
            with local_workers(settings, observer):
                engine.run()
            where = "" if settings.measure_on is None else f" on {settings.measure_on}"
            timing = f"timing the finalists together{where}, " if problem.times_finalists else ""
            engine.show(stage="finish", doing=f"{timing}scoring the finalists on the test split", step=0, steps=0)
            write_front(problem, studies, store, clock, complete=True, say=note)
            store.put(SINCE, len(studies["recover"].study.get_trials(deepcopy=False)))
            for done in ("cache", "scratch"):
                shutil.rmtree(settings.out / done, ignore_errors=True)
            store.put("finished", asdict(settings.budget))
        except KeyboardInterrupt:
            engine.show(stage="stopping", doing="writing the best front so far", step=0, steps=0)
            write_front(problem, studies, store, clock, complete=False)
            raise
        finally:
            clock.save(force=True)


def _narrowed(problem: Problem, store: Store, note: Callable[[str], None]) -> Space:
    """Leave out the number formats that gain nothing here; a run that goes on keeps the space it was begun with."""
    if store.get("identity") is None:
        space = narrow(problem, note)
        store.put("space", space.model_dump(mode="json"))
        return space
    begun = store.get("space")
    return problem.space if begun is None else Space.model_validate(begun)


def _finished(settings: Settings, store: Store) -> bool:
    """Whether this run ended under at least this budget and constraints, and all that it left is there."""
    done = store.get("finished")
    if done is None or settings.budget.exceeds(Budget(**done)):
        return False
    try:
        first, *others = (read_front(settings.out, target) for target in (None, *settings.others))
    except RunError:
        return False
    timed = settings.measure_on in (None, first.target.get("measured_on"))
    return timed and all(_is_whole(front, settings) for front in (first, *others))


def _is_whole(front: Front, settings: Settings) -> bool:
    return (
        front.complete
        and (front.constraints, front.objectives) == (settings.constraints, settings.objectives)
        and all((settings.out / each.path / MANIFEST).is_file() for each in listed(front))
    )


def _checked(result: Result, settings: Settings) -> Result:
    """Refuse a result without a candidate on any target.

    Raises:
        NoCandidateError: saying for each target what blocked the nearest miss.
    """
    fronts = {target: read_front(result.path, target) for target in (None, *settings.others)}
    if any(front.candidates for front in fronts.values()):
        return result
    told = []
    for target, front in fronts.items():
        where = f" on {front.target['name']}" if len(fronts) > 1 else ""
        if misses := front.nearest_misses:
            blocked = ", ".join(f"{limit} by {excess:.1%}" for limit, excess in misses[0]["blocked_by"].items())
            count = f"{len(misses)} nearest misses are in {front_file(result.path, target)}"
            told.append(f"the nearest{where} misses {blocked}; {count}")
        else:
            told.append(f"nothing was confirmed that runs{where}")
    raise NoCandidateError(
        f"no candidate meets the constraints: {'; '.join(told)}. Relax that constraint, or go on with a larger "
        "--budget",
        result.path,
    )


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the run's folder: one process works on a run at a time."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise RunError(f"{out} is a file, not a folder: choose another with --out") from None
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(f"another process is working on {out}: wait for it, or choose another with --out") from None
    try:
        yield
    finally:
        lock.release()
