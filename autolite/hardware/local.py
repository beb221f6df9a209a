"""This machine as a target: a profile from a few seconds of small ONNX models, cached for the next time."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from autolite.cache import cache_dir
from autolite.errors import StorageError, TargetError
from autolite.files import write_atomically
from autolite.hardware import LOCAL
from autolite.hardware.fit import USUAL_CACHE, Machine, fit_profile, quiet
from autolite.hardware.probes import loaded, probes
from autolite.hardware.processor import cores
from autolite.hardware.profile import Profile
from autolite.hardware.profile_files import dump_profile, parse_profile
from autolite.host_lock import host_lock
from autolite.machine import cpu_name, last_level_cache, processors
from autolite.measure import time_interleaved
from autolite.saturation import saturates

_SECONDS = 8.0
_NOISE = 0.25
_REVISION = 3  # of the probes and their fit: a cache file of another one is not read


def local_profile(
    threads: int | None = None, refresh: bool = False, progress: Callable[[str], None] | None = None
) -> Profile:
    """Return the profile of this machine on `threads` threads (all physical cores if None).

    It is measured in about twelve seconds the first time, and then read from the user's cache folder; the key is the
    processor's name, the number of threads and ONNX Runtime's version.

    Args:
        threads: number of threads that ONNX Runtime computes with.
        refresh: measure again even if a cached profile exists.
        progress: told in words what is done.

    Raises:
        TargetError: if this machine has fewer processors than `threads`.
    """
    import onnxruntime
    import psutil

    if threads is None:
        threads = cores()
    say = progress or (lambda message: None)
    file = cache_file(threads, f"r{_REVISION}.yaml")
    with host_lock(say):
        if not refresh and file.is_file():
            with suppress(TargetError, OSError, UnicodeDecodeError):  # a damaged cache file is measured anew
                return parse_profile(file.read_text(encoding="utf-8"), str(file))
        say(f"measuring this machine on {threads} thread{'s' if threads > 1 else ''}, about twelve seconds")
        cache = last_level_cache()
        models = probes(cache or USUAL_CACHE, saturates())
        timings = time_interleaved(loaded(models, threads), {}, _SECONDS, warmup=0.01)
        machine = Machine(LOCAL, cpu_name(), threads, float(psutil.virtual_memory().total), cache)
        profile = fit_profile(timings, models, machine, f"ONNX Runtime {onnxruntime.__version__}")
        noise = float(np.median([timing.median / quiet(timing) for timing in timings.values()])) - 1
        if noise > _NOISE:
            say(f"other programs slowed the probes by {100 * noise:.0f} %: this machine is measured again next time")
            return profile
        with suppress(StorageError):  # a read-only home only means measuring again next time
            write_atomically(file, dump_profile(profile).encode())
    return profile


def keep_local(profile: Profile) -> None:
    """Let `profile` be that of this machine on as many threads, until it is measured anew.

    Raises:
        StorageError: if the user's cache folder cannot be written.
    """
    file = cache_file(profile.threads, f"r{_REVISION}.yaml")
    write_atomically(file, dump_profile(profile.model_copy(update={"name": LOCAL})).encode())


def cache_file(threads: int, ending: str) -> Path:
    """Return where something is kept that was measured on this processor, with this ONNX Runtime.

    Args:
        threads: number of threads it was measured on.
        ending: of the file's name.

    Raises:
        TargetError: if this machine has fewer processors than `threads`.
    """
    import onnxruntime

    check_threads(threads)
    name = re.sub(r"[^a-z0-9]+", "-", cpu_name().lower()).strip("-")
    return cache_dir() / "hardware" / f"{name}-{threads}t-ort{onnxruntime.__version__}-{ending}"


def check_threads(threads: int) -> None:
    """Refuse more threads than this process may use processors.

    Raises:
        TargetError: naming both.
    """
    available = processors()
    if not 1 <= threads <= available:
        raise TargetError(
            f"threads={threads}, but this process may use {available} processors: ask for 1 to {available}"
        )
