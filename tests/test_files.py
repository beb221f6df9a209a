"""Files are written whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from autolite.errors import StorageError
from autolite.files import parts_of, sha256, write_atomically


def test_a_file_is_written_with_its_folders_and_nothing_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "er" / "file.bin"
    write_atomically(file, b"first")
    write_atomically(file, b"second")
    assert file.read_bytes() == b"second"
    assert os.listdir(file.parent) == ["file.bin"]


@pytest.mark.parametrize(("number", "hint"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EIO, False)])
def test_a_failed_write_names_the_file_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, hint: bool
) -> None:
    file = tmp_path / "file.bin"
    write_atomically(file, b"before")

    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError) as caught:
        write_atomically(file, b"after")
    assert str(file) in str(caught.value)
    assert os.strerror(number) in str(caught.value)
    assert ("free some space" in str(caught.value)) == hint
    assert file.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["file.bin"]


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"inner \(4 bytes\): File exists"):
        write_atomically(tmp_path / "file" / "inner", b"data")


def test_sha256_is_that_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    assert sha256(tmp_path / "file") == hashlib.sha256(b"content").hexdigest()


def test_what_killed_writers_left_is_found(tmp_path: Path) -> None:
    file = tmp_path / "a[1].bin"
    write_atomically(file, b"whole")
    assert parts_of(file) == []
    left = tmp_path / ".a[1].bin.0123abcd.part"
    left.write_bytes(b"who")
    (tmp_path / ".a1.bin.0123abcd.part").write_bytes(b"another's")
    assert parts_of(file) == [left]
