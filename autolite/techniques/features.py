"""Tensors kept on disk by the content they were computed from, up to a size; the least recently used go first."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import torch
from filelock import FileLock, Timeout
from safetensors.torch import load, save

from autolite.files import write_atomically
from autolite.techniques.base import CACHE_LIMIT

LARGEST_PART = 1 / 16  # of the limit that one entry may take: one that is larger would push out all others
KEPT = 0.9  # of the limit that stays when something has to go


@dataclass(eq=False)
class FeatureCache:
    """Dictionaries of tensors in files of one folder, at most `limit` bytes of them (0 keeps nothing).

    Several processes may use the folder: a file is there whole or not at all, and one that is damaged, or that another
    process removed, is as if it had never been written.
    """

    folder: Path
    limit: int
    _written: int | None = field(default=None, init=False)  # bytes there, as far as this process knows

    def read(self, key: str) -> dict[str, torch.Tensor]:
        """Return what was written under `key`; nothing if there is none."""
        file = self.folder / f"{key}.safetensors"
        try:
            content = file.read_bytes()
            tensors = load(content)
            if int(_metadata(content)["crc32"]) != _checksum(tensors):
                return {}
            os.utime(file)
        except (OSError, safetensors.SafetensorError, KeyError, ValueError):
            return {}
        return tensors

    def has(self, key: str) -> bool:
        """Whether something was written under `key`."""
        return (self.folder / f"{key}.safetensors").is_file()

    def write(self, key: str, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Write under `key`, replacing what was there, and remove the least recently used beyond the limit; False if it
        is too large to be kept.

        Raises:
            StorageError: if the file cannot be written.
        """
        plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
        size = sum(tensor.numel() * tensor.element_size() for tensor in plain.values())
        if size > self.limit * LARGEST_PART:
            return False
        content = save(plain, {"crc32": str(_checksum(plain))})
        write_atomically(self.folder / f"{key}.safetensors", content, durable=False)
        self._written = len(content) + (self._size() if self._written is None else self._written)
        if self._written > self.limit:
            self._written = self._shrink()
        return True

    @contextmanager
    def claimed(self, key: str) -> Iterator[bool]:
        """Say whether it is this process that may make what is kept under `key`; False while another does. A process
        that dies has no claim."""
        lock = FileLock(self.folder / f"{key[:2]}.lock")  # few files: what shares one only seems to be taken
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        except OSError:  # `write` says what is wrong
            yield True
            return
        try:
            yield True
        finally:
            lock.release()

    def _size(self) -> int:
        return sum(size for _, size, _ in self._files())

    def _files(self) -> list[tuple[float, int, Path]]:
        found = []
        for file in self.folder.glob("*.safetensors"):
            with suppress(OSError):  # removed by another process
                stat = file.stat()
                found.append((stat.st_mtime, stat.st_size, file))
        return sorted(found)

    def _shrink(self) -> int:
        files = self._files()
        size = sum(each for _, each, _ in files)
        for _, each, file in files:
            if size <= self.limit * KEPT:
                break
            with suppress(OSError):
                file.unlink(missing_ok=True)
            size -= each
        return size


def room(folder: Path) -> int:
    """Return how many bytes such a folder may take where the user does not say: a tenth of what is free on its disk,
    within limits, and never more than half. What does not fit is computed again in each epoch, by each process."""
    free = shutil.disk_usage(folder).free
    return min(max(CACHE_LIMIT, free // 10), 16 * CACHE_LIMIT, free // 2)


def _metadata(content: bytes) -> dict[str, str]:
    length = int.from_bytes(content[:8], "little")
    found: dict[str, str] = json.loads(content[8 : 8 + length])["__metadata__"]
    return found


def _checksum(tensors: Mapping[str, torch.Tensor]) -> int:
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].flatten().view(torch.uint8).numpy().data, zlib.crc32(name.encode(), total))
    return total
