"""This machine as a device: models are timed in a process of their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from autolite.errors import DeviceError
from autolite.host_lock import host_lock


class Local:
    """This machine."""

    address = "local"

    def open(self) -> None:
        """Nothing to do: it is here."""

    def close(self) -> None:
        """Nothing to do."""

    def alone(self, say: Callable[[str], None]) -> AbstractContextManager[None]:
        """Hold the lock of this machine, so that no search that runs here disturbs it."""
        return host_lock(say)

    def push(self, files: Sequence[Path]) -> str:
        """Return where the first file is: they are here."""
        return str(files[0].resolve())

    def drop(self, paths: Sequence[str]) -> None:
        """Nothing to do: nothing was sent."""

    def runner(self, words: Sequence[str], text: str = "") -> Iterator[str]:
        """Run the runner in a process; see `autolite.devices.base.Device`."""
        command = [sys.executable, "-m", "autolite.devices.runner", *words]
        said = ""
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                with suppress(BrokenPipeError):
                    process.stdin.write(text)
                    process.stdin.close()
                for line in process.stdout:
                    said = line.strip() or said
                    yield line
                process.wait()
            except BaseException:  # whoever reads has had enough, or is interrupted
                process.kill()
                raise
        if process.returncode:
            raise DeviceError(f"timing on this machine ended with {process.returncode}: {said}")
