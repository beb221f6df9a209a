"""How fast this machine multiplies at best: what a profile compares a model's own products with."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from autolite.errors import StorageError
from autolite.files import write_atomically
from autolite.hardware.local import cache_file
from autolite.hardware.probes import loaded, square
from autolite.host_lock import host_lock
from autolite.measure import time_interleaved

CLASSES = ("fp32", "int8", "int4")
SIZES = (256, 512, 1024)  # rows, columns and depth alike: the fastest of them is the peak
_SECONDS = 3.0
_NOISE = 0.25
_REVISION = 1  # of what is measured: a cache file of another one is not read


def local_peaks(threads: int = 1, progress: Callable[[str], None] | None = None) -> dict[str, float]:
    """Return the peak of each kernel class ("fp32", "int8", "int4") on this machine, in GFLOP/s.

    The peak is measured, with one multiply-add counted as two operations: the highest rate of ONNX Runtime's own
    product of square matrices of 256, 512 and 1024, in its quietest round. That of "int8" is the rate of the fastest
    8-bit kernel, which codes of all 8 bits cannot use everywhere (`autolite.hardware.processor`). It is neither the
    processor's theoretical figure nor the peak of the `local` profile, which is extrapolated from products of a
    transformer's sizes. It is measured in about three seconds the first time, and then read from the user's cache
    folder.

    Args:
        threads: number of threads that ONNX Runtime computes with.
        progress: told in words what is done.

    Raises:
        TargetError: if this machine has fewer processors than `threads`.
    """
    say = progress or (lambda message: None)
    file = cache_file(threads, f"peaks-r{_REVISION}.json")
    with host_lock(say):
        if (known := _read(file)) is not None:
            return known
        say(f"measuring the peaks of this machine on {threads} thread{'s' if threads > 1 else ''}, about three seconds")
        probes = {f"{kernel} {size}": square(kernel, size) for kernel in CLASSES for size in SIZES}
        timings = time_interleaved(loaded(probes, threads), {}, _SECONDS, warmup=0.01, min_rounds=3)
    quiet = {name: float(timing.medians.min()) for name, timing in timings.items()}
    peaks = {
        kernel: max(2e-6 * size**3 / quiet[f"{kernel} {size}"] for size in SIZES)  # quiet is in milliseconds
        for kernel in CLASSES
    }
    noise = float(np.median([timing.median / quiet[name] for name, timing in timings.items()])) - 1
    if noise > _NOISE:
        say(f"other programs slowed the products by {100 * noise:.0f} %: the peaks are measured again next time")
        return peaks
    with suppress(StorageError):  # a read-only home only means measuring again next time
        write_atomically(file, json.dumps(peaks).encode())
    return peaks


def _read(file: Path) -> dict[str, float] | None:
    """The peaks that were measured before, or None if there are none or the file is damaged."""
    with suppress(OSError, ValueError, AttributeError, TypeError):
        known = {str(kernel): float(peak) for kernel, peak in json.loads(file.read_text(encoding="utf-8")).items()}
        if set(known) == set(CLASSES) and min(known.values()) > 0:
            return known
    return None
