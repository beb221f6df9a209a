"""Files on disk: written whole or not at all, and named by their content."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import uuid
from contextlib import suppress
from pathlib import Path

from autolite.errors import StorageError


def write_atomically(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write `data` to `path` such that a reader, or a crash at any moment, sees all of it or what was there before.

    Missing folders are made. The bytes are on the disk before the name points at them, unless `durable` is false: then
    a power failure (no crash of a process) can leave a damaged file, for readers that check what they read.

    Raises:
        StorageError: if the disk is full, or the file cannot be written for another reason.
    """
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")  # processes of several machines may write
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as stream:
            stream.write(data)
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
        os.replace(part, path)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = f"{error.strerror or error}{'; free some space' if full else ''}"
        raise StorageError(f"cannot write {path} ({len(data)} bytes): {reason}") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def parts_of(path: Path) -> list[Path]:
    """Return what processes that were killed while they wrote `path` left; or what others are just writing."""
    return sorted(path.parent.glob(f".{glob.escape(path.name)}.*.part"))


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
