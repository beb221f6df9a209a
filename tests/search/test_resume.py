"""A search that is stopped, in either way, goes on from where it was; these tests really kill the process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import autolite
from autolite.errors import RunError
from tests.conftest import RunSearch
from tests.search.test_run import completed, strip

TRIALS = 10


class Session:
    """`autolite search` as a process of its own, watched through its JSON events."""

    def __init__(self, teacher: Path, data: Path, space: Path, out: Path, *more: str) -> None:
        command = [sys.executable, "-m", "autolite", "search", "--model", str(teacher), "--data", str(data)]
        command += ["--space", str(space), "--target", "pixel8", "--budget", f"{TRIALS}trials", "--out", str(out)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([*command, *more, "--json"], stdout=subprocess.PIPE, text=True, env=environment)

    def wait_for_trials(self, count: int) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event = json.loads(line)
            if sum(done for done, _ in event.get("trials", {}).values()) >= count:
                return
        pytest.fail(f"the search ended before trial {count}")

    def stop(self, how: signal.Signals) -> int:
        self.process.send_signal(how)
        self.process.communicate(timeout=120)
        return self.process.returncode


def test_killed_twice_it_ends_with_every_trial_once(
    tiny_teacher: Path, tiny_data: Path, tiny_space: Path, run_search: RunSearch, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    kept: dict[tuple[str, str], list[float]] = {}
    for count in (2, 8):  # in the screen, and in the confirm stage
        session = Session(tiny_teacher, tiny_data, tiny_space, out)
        session.wait_for_trials(count)
        time.sleep(0.05)  # somewhere inside the next trial
        assert session.stop(signal.SIGKILL) == -signal.SIGKILL
        found = completed(out)
        assert len(found) >= count
        assert kept.items() <= found.items()
        kept = found
    result = run_search(out=out, budget=f"{TRIALS}trials")
    assert len(completed(out)) == TRIALS
    assert kept.items() <= completed(out).items()
    # Being killed changed nothing: an undisturbed search finds the same front.
    undisturbed = run_search(out=tmp_path / "undisturbed", budget=f"{TRIALS}trials")
    assert strip(result.front.to_json()) == strip(undisturbed.front.to_json())


def test_interrupted_it_leaves_a_front_and_exit_code_130(
    tiny_teacher: Path, tiny_data: Path, tiny_space: Path, run_search: RunSearch, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    session = Session(tiny_teacher, tiny_data, tiny_space, out)
    session.wait_for_trials(1)  # with most of the search ahead, however busy the machine is
    assert session.stop(signal.SIGINT) == 130
    front = autolite.read_front(out)
    assert not front.complete
    assert front.candidates
    assert all((out / c.path / "model.onnx").is_file() for c in front)
    done = run_search(out=out, budget=f"{TRIALS}trials")
    assert done.front.complete
    listed = {c.id for c in done.front} | {miss["id"] for miss in done.front.nearest_misses}
    assert {folder.name for folder in out.glob("candidates/*")} == listed, "what it had then is gone"
    assert len(completed(out)) == TRIALS


def test_two_processes_do_not_work_on_one_run(
    tiny_teacher: Path, tiny_data: Path, tiny_space: Path, run_search: RunSearch, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    session = Session(tiny_teacher, tiny_data, tiny_space, out)
    session.wait_for_trials(1)
    try:
        with pytest.raises(RunError, match="another process"):
            run_search(out=out, budget=f"{TRIALS}trials")
    finally:
        session.stop(signal.SIGKILL)
