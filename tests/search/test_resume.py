"""A search that is stopped, in either way, goes on from where it was; these tests really kill the process."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

import autolite
from autolite.errors import RunError
from tests.conftest import RunSearch
from tests.processes import CommandLine
from tests.search.test_run import completed, strip

TRIALS = 10


class Session:
    """`autolite search` as a process of its own, watched through its JSON events."""

    def __init__(self, teacher: Path, data: Path, space: Path, out: Path, *more: str) -> None:
        words = ["search", "--model", str(teacher), "--data", str(data), "--space", str(space), "--out", str(out)]
        self.process = CommandLine(*words, "--target", "pixel8", "--budget", f"{TRIALS}trials", *more, "--json")

    def wait_for_trials(self, count: int) -> None:
        for line in self.process.lines():
            event = json.loads(line)
            if sum(done for done, _ in event.get("trials", {}).values()) >= count:
                return
        pytest.fail(f"the search ended before trial {count}")

    def stop(self, how: signal.Signals) -> int:
        self.process.send_signal(how)
        return self.process.wait(120)


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
