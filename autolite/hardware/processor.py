"""How much of this machine's processor there is to use."""

from __future__ import annotations

from autolite.machine import processors


def cores() -> int:
    """Return how many physical cores this process may use."""
    import psutil

    return min(psutil.cpu_count(logical=False) or 1, processors())
