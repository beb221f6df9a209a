"""Targets: what a device can do (profile), what a model costs on it (predict), and this machine measured (local)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autolite.hardware.profile import Profile

__all__ = ["LOCAL", "load_target", "target_names"]

LOCAL = "local"  # the name of this machine, which is measured


def target_names() -> list[str]:
    """Return what `--target` knows by name: the shipped profiles and "local", this machine."""
    from autolite.hardware.profile_files import profile_names

    return [*profile_names(), LOCAL]


def load_target(
    name_or_path: str | Path, threads: int | None = None, progress: Callable[[str], None] | None = None
) -> Profile:
    """Return the profile of a target.

    Args:
        name_or_path: a name of `target_names`, or the path of a profile's YAML file.
        threads: for "local", how many threads to measure with; all physical cores if None. Other profiles hold for
            any number of threads up to their default unit's.
        progress: told in words what is done while this machine is measured.

    Raises:
        TargetError: if the target is unknown or its file invalid, or `threads` is not available here.
    """
    if str(name_or_path) == LOCAL:
        from autolite.hardware.local import local_profile

        return local_profile(threads, progress=progress)
    from autolite.hardware.profile_files import load_profile

    return load_profile(name_or_path)
