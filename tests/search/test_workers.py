"""Several processes on one run: every trial once, and none is lost with the process that ran it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from optuna.trial import FrozenTrial, TrialState

from autolite.errors import InputError, RunError
from autolite.front import Result
from autolite.limits import Constraints
from autolite.search import engine, leases, worker
from autolite.search.identity import run_identity
from autolite.search.leases import SEARCH, Leases
from autolite.search.settings import Budget, Settings
from autolite.space import load_space
from autolite.store import Store
from autolite.tasks.base import DataSpec
from tests.conftest import RunSearch
from tests.processes import CommandLine, hold_first_trial
from tests.search.test_resume import Session
from tests.search.test_run import completed

TRIALS = 9
LEASE = 3.0  # seconds, in the tests that wait for one to run out

SETTINGS = Settings(
    "pixel8", Path("runs/r"), "my/model", DataSpec("a/hub-name", text="body", max_length=64, seed=3),
    "language-modeling", "decoder", Budget(trials=5), Constraints(max_drop=0.01, strict=True), "tokens=8",
    "onnxruntime", "sqlite:///x.db", 3, "cpu", 1000,
)  # fmt: skip


def until(condition: Callable[[], object], seconds: float = 120) -> None:
    for _ in range(int(seconds / 0.05)):
        if condition():
            return
        threading.Event().wait(0.05)
    pytest.fail(f"nothing happened for {seconds} s")


def trials(storage: str, out: Path) -> dict[str, list[FrozenTrial]]:
    """All trials of a run by stage, the teachers left out."""
    name = (out / ".name").read_text(encoding="utf-8")
    return {
        stage: optuna.load_study(study_name=f"{name}/{stage}", storage=storage).trials[1:]
        for stage in ("screen", "recover", "confirm")
    }


def evaluated(storage: str, out: Path) -> list[FrozenTrial]:
    """The trials that count; every one is finished, and no plan was evaluated twice in a stage."""
    found = trials(storage, out)
    assert all(t.state.is_finished() for stage in found.values() for t in stage)
    counted = [(s, t) for s in found for t in found[s] if t.state == TrialState.COMPLETE and "worker" in t.user_attrs]
    assert len({(s, t.user_attrs["plan_digest"]) for s, t in counted}) == len(counted)
    return [t for _, t in counted]


def before_first(monkeypatch: pytest.MonkeyPatch, action: Callable[[], None]) -> None:
    """Let the search itself do something in its first trial, when its stage is open to others."""
    original, done = engine.evaluate, []

    def acting(*arguments: Any) -> Any:
        if not done:
            done.append(True)
            action()
        return original(*arguments)

    monkeypatch.setattr(engine, "evaluate", acting)


# What two processes do on SQLite is below.
@pytest.mark.parametrize(
    ("storage", "others"),
    [("postgresql", 1), *(pytest.param(name, 2, marks=pytest.mark.slow) for name in ("sqlite", "postgresql"))],
    indirect=["storage"],
)
def test_several_processes_end_with_exactly_the_trials_of_the_budget(
    storage: str, others: int, run_search: RunSearch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"

    def wait_for_workers() -> None:
        store = Store(storage, (out / ".name").read_text(encoding="utf-8"))
        until(lambda: len(store.leases("trial ")) == others + 1)
        store.close()

    before_first(monkeypatch, wait_for_workers)
    result = run_search(out=out, storage=storage, workers=others, budget=f"{TRIALS}trials")
    found = evaluated(storage, out)
    assert len(found) == TRIALS
    assert len({t.user_attrs["worker"] for t in found}) == others + 1
    assert result.front.complete
    assert all((out / c.path / "model.onnx").is_file() for c in result.front)
    assert not [p for pattern in ("**/.*.part", "scratch", "candidates/.*") for p in out.glob(pattern)]
    # Another look at it needs no worker, and finds it finished.
    assert run_search(out=out, storage=storage, budget=f"{TRIALS}trials").front == result.front
    assert worker.work(out, storage) == 0


# One that is stopped is lost in the same way, and wakes up again. Searches that are killed are in test_resume.
@pytest.mark.parametrize(
    "how",
    [pytest.param(signal.SIGKILL, id="killed", marks=pytest.mark.slow), pytest.param(signal.SIGSTOP, id="stopped")],
)
def test_the_trial_of_a_worker_that_is_gone_is_taken_up_and_told_once(
    how: signal.Signals, run_search: RunSearch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, storage = tmp_path / "run", f"sqlite:///{tmp_path / 'run' / 'study.db'}"
    monkeypatch.setattr(leases, "SECONDS", LEASE)
    started: list[CommandLine] = []

    def start_and_lose_a_worker() -> None:
        words = ("worker", str(out), "--quiet", "--threads", "1")
        started.append(CommandLine(*words, patch=hold_first_trial, given=(tmp_path, LEASE)))
        until((tmp_path / "evaluated").exists)
        started[0].send_signal(how)

    before_first(monkeypatch, start_and_lose_a_worker)
    run_search(out=out, budget=f"{TRIALS}trials")
    (process,) = started
    before = {t.number: t for t in trials(storage, out)["screen"]}
    assert len(evaluated(storage, out)) == len(completed(out)) == TRIALS
    assert {t.user_attrs["worker"] for t in evaluated(storage, out)} == {before[1].user_attrs["worker"]}
    (tmp_path / "go").touch()
    if how == signal.SIGSTOP:  # it wakes up with a result that is not its own any more, and an end that it missed
        process.send_signal(signal.SIGCONT)
        assert process.wait(60) == 0
        assert {t.number: t for t in trials(storage, out)["screen"]} == before
        assert not list((out / "scratch").glob("*"))
    assert process.wait(60) in (0, -signal.SIGKILL)


def test_ctrl_c_ends_the_workers_too(tiny_teacher: Path, tiny_data: Path, tiny_space: Path, tmp_path: Path) -> None:
    session = Session(tiny_teacher, tiny_data, tiny_space, tmp_path / "run", "--workers", "1")
    session.wait_for_trials(1)
    (child,) = psutil.Process(session.process.pid).children()
    assert session.stop(signal.SIGINT) == 130
    assert not child.is_running()


def test_local_workers_have_this_runs_database_and_are_told_to_end_before_one_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    environments: list[dict[str, str]] = []

    class Process:
        def __init__(self, command: list[str], env: dict[str, str], **_: Any) -> None:
            environments.append(env)

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda **_: calls.append(name)

    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setenv(worker.STORAGE, "sqlite:///of-another-run.db")
    settings = replace(SETTINGS, out=tmp_path, storage=None, workers=2)
    with worker.local_workers(settings, lambda _: None):
        pass
    assert not any(worker.STORAGE in environment for environment in environments)
    assert [name for name in calls if name in ("terminate", "wait")][:2] == ["terminate"] * 2
    assert calls.count("terminate") == 2  # a second signal would interrupt how it gives up what it holds


def test_a_worker_without_a_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="has no run"):
        worker.work(tmp_path)


def test_a_worker_that_nobody_gives_work_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "PATIENCE", 0.2)
    (tmp_path / ".name").write_text("run", encoding="utf-8")
    Store(f"sqlite:///{tmp_path / 'study.db'}", "run").close()
    with pytest.raises(RunError, match="type its search command again"):
        worker.work(tmp_path)


def opened_again(finished: Result, out: Path, **changes: Any) -> Store:
    """A copy of a finished run as if its search went on, with some of what it tells workers replaced."""
    shutil.copytree(finished.path, out, ignore=shutil.ignore_patterns("candidates", "students"))
    store = Store(f"sqlite:///{out / 'study.db'}", (out / ".name").read_text(encoding="utf-8"))
    store.take_lease(SEARCH, "the search", 60)
    store.put(engine.OPEN, {"stage": "screen", "decision": {}})
    known = store.get(worker.INVITATION)
    settings = {name: value for name, value in changes.items() if name in known["settings"]}
    store.put(worker.INVITATION, {**known, **changes, "settings": {**known["settings"], **settings}})
    return store


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"seed": 7}, RunError, "another seed"),
        ({"own_functions": ["metric"]}, InputError, "Python function for its metric"),
        ({"model": "/no/such/model"}, InputError, "does not exist here"),
        ({"machine": "elsewhere"}, InputError, "measures on its own machine"),
    ],
)
def test_a_worker_refuses_what_it_cannot_do(
    changes: dict[str, Any], error: type[Exception], message: str, finished: Result, tmp_path: Path
) -> None:
    opened_again(finished, tmp_path / "run", **changes).close()
    with pytest.raises(error, match=message):
        worker.work(tmp_path / "run")


def test_a_worker_refuses_another_model_of_the_same_name(finished: Result, tiny_teacher: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_teacher, tmp_path / "model")
    (other / "config.json").write_text((other / "config.json").read_text(encoding="utf-8") + " ", encoding="utf-8")
    opened_again(finished, tmp_path / "run", model=str(other)).close()
    with pytest.raises(RunError, match="another model"):
        worker.work(tmp_path / "run")


def test_functions_of_the_users_own_are_refused_with_workers(run_search: RunSearch, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be given a Python function"):
        run_search(out=tmp_path / "run", workers=1, metric=lambda logits, labels: labels)
    assert not (tmp_path / "run").exists()


def test_settings_reach_another_process_whole() -> None:
    sent = json.loads(json.dumps(SETTINGS.to_json()))
    assert Settings.from_json(sent, SETTINGS.out, "sqlite:///x.db") == SETTINGS


def test_a_run_with_another_stride_is_another_one() -> None:
    space = load_space("decoder")
    strided = replace(SETTINGS, data=replace(SETTINGS.data, stride=16))
    usual, other = run_identity(SETTINGS, space), run_identity(strided, space)
    assert {**usual, "stride": "16"} == other
    assert "stride" not in usual  # what was begun before there were strides goes on


def test_a_search_on_another_machine_is_not_joined_by_a_second_one(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 'study.db'}", "run")
    store.take_lease(SEARCH, "elsewhere 1 abc", 60)
    with Leases(store) as mine, pytest.raises(RunError, match="another process is working on the run"):
        mine.lead()


def test_the_environment_of_the_tests_reaches_workers() -> None:
    assert os.environ["OMP_NUM_THREADS"] == "1"
