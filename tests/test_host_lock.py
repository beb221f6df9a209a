"""A timing has the machine for itself, whoever else works there, and however they end."""

from __future__ import annotations

import os
import select
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

import pytest

from autolite.host_lock import give_way, host_lock, working


@pytest.fixture(autouse=True)
def _own_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def another_process(code: str, temporary: Path) -> tuple[subprocess.Popen[str], IO[str], IO[str]]:
    """Run code elsewhere, with its temporary files in that folder; returns the process and its input and output."""
    setup = f"import tempfile; tempfile.tempdir = {str(temporary)!r}\n"
    other = subprocess.Popen(
        [sys.executable, "-c", setup + code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdin is not None
    assert other.stdout is not None
    return other, other.stdin, other.stdout


def test_it_is_reentrant_within_a_process() -> None:
    with host_lock(pytest.fail), host_lock(pytest.fail):
        pass


def test_another_process_waits_and_says_so(tmp_path: Path) -> None:
    code = (
        "from autolite.host_lock import host_lock\n"
        "with host_lock(lambda message: print(message, flush=True)):\n"
        "    print('mine', flush=True)\n"
    )
    with host_lock():
        other, _, said = another_process(code, tmp_path)
        assert said.readline().startswith("waiting: another process is timing a model on this machine")
        assert other.poll() is None
    assert other.communicate(timeout=20)[0] == "mine\n"


def test_a_timing_waits_until_the_work_of_another_process_gives_way(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from autolite.host_lock import give_way, working\n"
        "with working():\n"
        "    print('working', flush=True)\n"
        "    sys.stdin.readline()\n"
        "    for _ in range(30):\n"
        "        time.sleep(0.01)\n"
        "        give_way()\n"
        "    print('worked on', flush=True)\n"
        "    sys.stdin.readline()\n"
    )
    other, asked, answers = another_process(code, tmp_path)
    assert answers.readline() == "working\n"
    said: list[str] = []

    def ask_to_give_way(message: str) -> None:
        said.append(message)
        asked.write("\n")
        asked.flush()

    with host_lock(ask_to_give_way):
        assert len(said) == 1
        assert str(other.pid) in said[0]
        threading.Event().wait(0.5)
        assert not select.select([answers], [], [], 0)[0]  # it still gives way
    assert answers.readline() == "worked on\n"
    asked.close()
    assert other.wait(timeout=20) == 0
    assert [path.name for path in (tmp_path / "autolite-locks").iterdir()] == ["timing.lock"]


def test_two_that_work_and_time_do_not_wait_for_each_other(tmp_path: Path) -> None:
    code = (
        "from autolite.host_lock import host_lock, working\n"
        "with working():\n"
        "    print('working', flush=True)\n"
        "    with host_lock(): pass\n"
    )
    with working():
        other, _, said = another_process(code, tmp_path)
        assert said.readline() == "working\n"
        with host_lock():
            pass
        while other.poll() is None:
            give_way()
    assert other.returncode == 0


def test_work_of_a_process_that_died_keeps_nobody_waiting(tmp_path: Path) -> None:
    with host_lock():
        pass
    (tmp_path / "autolite-locks" / "working-2147483647-abc.lock").touch()
    with host_lock(pytest.fail):
        assert not list(tmp_path.glob("*/working-*"))


def test_all_users_of_a_machine_can_have_the_locks(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        with host_lock(pytest.fail), working():
            modes = {path.name.partition("-")[0]: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("*/*")}
    finally:
        os.umask(before)
    assert modes == {"timing.lock": 0o666, "working": 0o666}
    assert stat.S_IMODE((tmp_path / "autolite-locks").stat().st_mode) == 0o777


def test_a_name_that_leads_elsewhere_is_left_alone(tmp_path: Path) -> None:
    (elsewhere := tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "autolite-locks").symlink_to(elsewhere)
    with host_lock(pytest.fail), working():
        assert len(list(tmp_path.glob(f"autolite-locks-{os.getuid()}/*.lock"))) == 2
    assert stat.S_IMODE(elsewhere.stat().st_mode) == 0o700
    assert not list(elsewhere.iterdir())
