"""What a device is: files are sent to it, commands run on it, and their lines come back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from autolite.errors import DeviceError

KEPT = 7  # days that models are kept on a device
SMALL = 2**20  # bytes; of smaller files it is not asked whether there is room
_KILLED = 128


class ConnectionLost(DeviceError):
    """The device cannot be reached, or went away while something ran on it; it may come back."""


class Device(Protocol):
    """A machine with a model runtime."""

    address: str

    def open(self) -> None:
        """Connect.

        Raises:
            DeviceError: if it refuses; the sentence says what to do.
            ConnectionLost: if it cannot be reached.
        """
        ...

    def close(self) -> None:
        """Close the connection, if there is one."""
        ...

    def alone(self, say: Callable[[str], None]) -> AbstractContextManager[None]:
        """Have the device for oneself; `say` is told if another process has to be waited for first."""
        ...

    def push(self, files: Sequence[Path]) -> str:
        """Send files that belong together and return where the first one is there; equal files are sent once.

        Raises:
            DeviceError: if they do not fit, or cannot be written.
            ConnectionLost: if the device goes away.
        """
        ...

    def drop(self, paths: Sequence[str]) -> None:
        """Remove what `push` has sent there.

        Raises:
            ConnectionLost: if the device goes away.
        """
        ...

    def runner(self, words: Sequence[str], text: str = "") -> Iterator[str]:
        """Run `autolite.devices.runner` and yield the lines of its output as they come; `text` is its input.

        Raises:
            DeviceError: if it fails, with what it said.
            ConnectionLost: if the device goes away, or is silent for two minutes.
        """
        ...


@dataclass(frozen=True)
class Health:
    """What a device is and how it does; None for what it does not tell.

    Attributes:
        model: the board's or the processor's name.
        machine: "x86_64", "aarch64", ...
        system: the kernel and its version.
        libc: its C library, "glibc 2.36", or the version of Android.
        python: version of the one that answers; nothing if it needs none.
        onnxruntime: version that models run with.
        cores: that a process may use.
        memory_bytes: all of its memory.
        cache_bytes: its last-level cache.
        free_bytes: on the disk of the user's files.
        celsius: of the hottest sensor.
        margin_celsius: until the first part of it slows down.
        megahertz: the clock of each core.
    """

    model: str
    machine: str
    system: str
    libc: str
    python: str
    onnxruntime: str | None
    cores: int
    memory_bytes: int
    cache_bytes: float | None
    free_bytes: int
    celsius: float | None
    margin_celsius: float | None
    megahertz: Sequence[int] | None

    @property
    def is_hot(self) -> bool:
        """Whether it is within five degrees of where it slows down."""
        return self.margin_celsius is not None and self.margin_celsius < 5


def health_of(device: Device) -> Health:
    """Ask a connected device for its health.

    Raises:
        DeviceError: if it cannot answer.
    """
    for line in answers(device, ["health"]):
        return Health(**line)
    raise DeviceError(f"{device.address} ended without an answer: try it again")


def check_room(address: str, folder: str, name: str, size: int, free: int) -> None:
    """Refuse a file for which there is no room in a device's folder.

    Raises:
        DeviceError: if it has more bytes than are free.
    """
    if size > free:
        raise DeviceError(
            f"{address} has {free:,} bytes free where models are kept, but {name} has {size:,}: remove what is not "
            f"needed there, such as {folder}/files"
        )


def check_status(address: str, command: str, code: int, said: str) -> None:
    """Refuse the exit status of a shell's command on a device, unless it is 0.

    Args:
        address: of the device.
        command: that ended.
        code: its exit status; of a program that a signal ended, 128 and the signal's number.
        said: its last line.

    Raises:
        DeviceError: if it failed.
    """
    if code > _KILLED:
        raise DeviceError(
            f"{address}: what ran there was ended by signal {code - _KILLED}: its memory may be too small"
        )
    if code:
        raise DeviceError(f"{address}: '{command:.80}' ended with {code}: {said or 'it said nothing'}")


def check_runtime(health: Health, address: str) -> None:
    """Refuse a device with another ONNX Runtime than is installed here: another version has other kernels.

    Raises:
        DeviceError: saying how to install it there.
    """
    import onnxruntime

    wanted = onnxruntime.__version__
    if health.onnxruntime != wanted:
        has = f"onnxruntime {health.onnxruntime}" if health.onnxruntime else "no ONNX Runtime"
        raise DeviceError(f"{address} has {has}, and here it is {wanted}: type autolite device setup {address}")


def answers(device: Device, words: Sequence[str], spec: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    """Yield what the runner on a device answers; other lines are what its libraries say, and not for us.

    Raises:
        DeviceError: if it fails, with the reason.
        ConnectionLost: if the device goes away.
    """
    for line in device.runner(words, "" if spec is None else json.dumps(spec)):
        if not line.startswith("{"):
            continue
        answer = json.loads(line)
        if "error" in answer:
            raise DeviceError(f"{device.address}: {answer['error']}")
        yield answer
