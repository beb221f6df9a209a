"""The one small tree of errors a user can meet; every message names the value, the limit and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class AutoliteError(Exception):
    """Base of every error AutoLite raises on purpose; `exit_code` is what the command line ends with."""

    exit_code = 2


class InputError(AutoliteError):
    """An option, a file or a value that the user gave cannot be used."""


class DataError(InputError):
    """The data is missing, empty, has no such column, or does not fit the model."""


class ModelError(InputError):
    """The model cannot be loaded, or is of a family AutoLite does not know."""


class TargetError(InputError):
    """A target or a hardware profile is unknown or invalid."""


class DeviceError(AutoliteError):
    """A device cannot be reached, refuses, is full, or cannot run a model."""


class SpaceError(InputError):
    """A search space is unknown or invalid."""


class PlanError(AutoliteError):
    """A plan cannot be applied to this model on this target; raised before anything is trained."""


class RunError(AutoliteError):
    """A run directory is locked, corrupt, or was made with another model, data set or target."""


class StorageError(AutoliteError):
    """The disk is full or the database cannot be reached."""


class NoCandidateError(AutoliteError):
    """No candidate meets the constraints; after a search, the nearest misses are in the front.json of `run`."""

    exit_code = 3

    def __init__(self, message: str, run: Path | None = None) -> None:
        super().__init__(message)
        self.run = run


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Return one sentence for an unknown `name`: the nearest known one, and the whole list.

    >>> unknown("target", "pixle8", ["pixel8", "local"])
    "unknown target 'pixle8': did you mean 'pixel8'? Known: local, pixel8"
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" did you mean '{near[0]}'?" if near else ""
    return f"unknown {kind} '{name}':{hint} Known: {', '.join(names)}"


def first_line(error: BaseException) -> str:
    """Return the first line of what an exception of another library says, for a sentence of our own."""
    return (str(error).strip() or repr(error)).splitlines()[0][:300]
