"""Tensors on disk: found again bit for bit, never above the limit, the least recently used gone first."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autolite.techniques.features import FeatureCache, room

KIB = 2**10


def block(value: int, size: int = KIB) -> dict[str, torch.Tensor]:
    return {"x": torch.full((size,), value, dtype=torch.uint8)}


def bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def test_what_was_written_is_read(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, 2**20)
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(2).bfloat16(), "n": torch.tensor(7)}
    assert cache.write("one", tensors)
    assert (cache.has("one"), cache.has("two")) == (True, False)
    assert not FeatureCache(tmp_path, 16).write("two", tensors), "it would push out all others"
    found = FeatureCache(tmp_path, 2**20).read("one")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert cache.read("two") == {}


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, 20 * KIB)
    for number in range(10):
        cache.write(str(number), block(number))
        os.utime(tmp_path / f"{number}.safetensors", (number, number))
    assert cache.read("0")  # which makes it the latest
    for number in range(10, 20):
        cache.write(str(number), block(number))
    assert bytes_in(tmp_path) <= 20 * KIB
    assert cache.read("0")["x"][0] == 0
    assert not cache.read("1")
    assert cache.read("19")


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(1, 2000), max_size=30), limit=st.integers(0, 16 * KIB))
def test_the_folder_never_holds_more_than_the_limit(sizes: list[int], limit: int, tmp_path_factory: object) -> None:
    folder = tmp_path_factory.mktemp("features")  # type: ignore[attr-defined]
    cache = FeatureCache(folder, limit)
    for number, size in enumerate(sizes):
        cache.write(str(number), block(number % 256, size))
        assert bytes_in(folder) <= limit


WRITER = """
import sys
from pathlib import Path
from autolite.techniques.features import FeatureCache
from tests.techniques.test_features import block
cache, number = FeatureCache(Path(sys.argv[1]), 64 * 1024), int(sys.argv[2])
print("ready", flush=True)
while True:
    number += 1
    cache.write(str(number % 50), block(number % 50))
"""


def test_processes_write_together_and_are_killed(tmp_path: Path) -> None:
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(i)], stdout=subprocess.PIPE) for i in (0, 25)
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
    cache, found = FeatureCache(tmp_path, 64 * KIB), 0
    while found < 500:
        for number in range(50):
            tensors = cache.read(str(number))
            if tensors:
                assert (tensors["x"] == number).all()
                found += 1
    for writer in writers:
        writer.send_signal(signal.SIGKILL)
        writer.communicate(timeout=30)
    whole = [file for file in tmp_path.iterdir() if file.suffix == ".safetensors"]
    assert whole
    assert all(cache.read(file.stem) for file in whole)


CLAIMANT = """
import sys, time
from pathlib import Path
from autolite.techniques.features import FeatureCache
with FeatureCache(Path(sys.argv[1]), 1024).claimed("one") as free:
    print(free, flush=True)
    time.sleep(600)
"""


def test_one_process_at_a_time_makes_an_entry_and_a_dead_one_has_no_claim(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, KIB)
    claimant = subprocess.Popen([sys.executable, "-c", CLAIMANT, str(tmp_path)], stdout=subprocess.PIPE)
    assert claimant.stdout is not None
    assert claimant.stdout.readline() == b"True\n"
    with cache.claimed("one") as free, cache.claimed("two") as other:
        assert (free, other) == (False, True)
    claimant.send_signal(signal.SIGKILL)
    claimant.communicate(timeout=30)
    with cache.claimed("one") as free:
        assert free


def test_without_a_word_a_tenth_of_the_free_space_is_used_within_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for free in (2**30, 2**33, 2**36, 2**43):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, free=free: SimpleNamespace(free=free))
        found.append(room(tmp_path))
    assert found == [2**29, 2**31, 2**36 // 10, 2**35]
