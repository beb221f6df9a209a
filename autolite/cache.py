"""What is found out once about a model and its data, in the user's cache folder, where later runs find it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from autolite.errors import StorageError
from autolite.files import write_atomically


def cache_dir() -> Path:
    """Return the user's cache folder for AutoLite: `$XDG_CACHE_HOME/autolite`, or `~/.cache/autolite`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "autolite"


def remembered(kind: str, key: Sequence[object]) -> Any:
    """Return what is kept of this kind under a key; None if nothing is, or its file is damaged.

    Args:
        kind: the folder.
        key: JSON types that name all that it depends on.
    """
    with suppress(OSError, ValueError):
        return json.loads(_file(kind, key).read_text(encoding="utf-8"))
    return None


def remember(kind: str, key: Sequence[object], value: Any) -> None:
    """Keep a value of JSON types under a key; a folder that cannot be written only costs time."""
    with suppress(OSError, StorageError):
        write_atomically(_file(kind, key), json.dumps(value).encode())


def _file(kind: str, key: Sequence[object]) -> Path:
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    return cache_dir() / kind / f"{digest}.json"
