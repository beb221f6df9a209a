"""What the system tells of the machine that this runs on. Plain Python: it is sent to devices as it is."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from pathlib import Path

_SYS = Path("/sys")
_PASSIVE = ("passive", "hot")  # trip points at which a kernel slows its processors down
_FIRMWARE = {"Raspberry Pi": 80.0}  # degrees at which a board's firmware does, of which its kernel does not know


def processors() -> int:
    """Return how many logical processors this process may run on: all, or those that a scheduler gave it."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    """Return the processor's name as the system gives it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def device_name() -> str:
    """Return the board's name, and where there is none the processor's."""
    with suppress(OSError):
        return Path("/proc/device-tree/model").read_text(encoding="utf-8").strip("\0\n ")
    return cpu_name()


def last_level_cache() -> float | None:
    """Return the bytes of the last-level cache, None if the system does not tell."""
    sizes = []
    for file in _SYS.glob("devices/system/cpu/cpu0/cache/index*/size"):
        with suppress(OSError, ValueError):
            text = file.read_text(encoding="ascii").strip()
            sizes.append(float(text.rstrip("KM")) * {"K": 2**10, "M": 2**20}.get(text[-1], 1))
    return max(sizes, default=None)


def celsius() -> float | None:
    """Return the temperature of the hottest sensor, None if there is none."""
    found = map(_number, _SYS.glob("class/thermal/thermal_zone*/temp"))
    return max((value / 1000 for value in found if value and value > 0), default=None)


def megahertz() -> list[int] | None:
    """Return the clock of each core, None if they do not tell."""
    clocks = sorted(_SYS.glob("devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq"))
    return [round(value / 1000) for value in map(_number, clocks) if value is not None] or None


def margin_celsius() -> float | None:
    """Return the degrees until the first part of this machine slows down, None if it does not say so."""
    hottest, name = celsius(), device_name()
    found = [limit - hottest for board, limit in _FIRMWARE.items() if hottest and name.startswith(board)]
    for zone in _SYS.glob("class/thermal/thermal_zone*"):
        now = _number(zone / "temp")
        for kind in zone.glob("trip_point_*_type"):
            with suppress(OSError):
                limit = _number(kind.with_name(kind.name.replace("_type", "_temp")))
                if kind.read_text(encoding="ascii").strip() in _PASSIVE and now and limit and limit > 0:
                    found.append((limit - now) / 1000)
    return min(found, default=None)


def _number(file: Path) -> float | None:
    try:
        return float(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
