"""Machines that models are timed on: this one, or one that is reached over a network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from autolite.errors import InputError

if TYPE_CHECKING:
    from autolite.devices.base import Device

__all__ = ["connected", "device_at"]


def device_at(address: str) -> Device:
    """Return the device at an address, not yet connected.

    Args:
        address: "local"; "ssh://[user@]host[:port]", where host may be a name of `~/.ssh/config`; or "adb://[serial]",
            where the serial is that of `adb devices`, and not needed where only one phone is connected.

    Raises:
        InputError: if the address has another form.
    """
    if address == "local":
        from autolite.devices.local import Local

        return Local()
    if address.startswith("ssh://"):
        from autolite.devices.ssh import Ssh

        return Ssh.parse(address)
    if address.startswith("adb://"):
        from autolite.devices.adb import Adb

        return Adb.parse(address)
    raise InputError(f"'{address}' is no device: give local, ssh://[user@]host[:port], or adb://[serial]")


@contextmanager
def connected(address: str) -> Iterator[Device]:
    """Connect to the device at an address, for as long as the `with` statement takes.

    Raises:
        InputError: as `device_at`.
        DeviceError: if it cannot be reached or refuses; the sentence says what to do.
    """
    device = device_at(address)
    try:
        device.open()
        yield device
    finally:
        device.close()
