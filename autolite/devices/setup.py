"""Prepare a device once: the ONNX Runtime that is installed here, in a folder of its own there."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from autolite.devices.adb import Adb
from autolite.devices.base import ConnectionLost, Device, Health, health_of
from autolite.devices.ssh import Ssh
from autolite.errors import DeviceError, InputError

_MACHINES = ("x86_64", "aarch64")  # that ONNX Runtime has wheels for
_OLDEST = 17  # of glibc 2.x, that wheels are made for


def setup(
    device: Device, say: Callable[[str], None] = lambda message: None, android_package: Path | None = None
) -> Health:
    """Make a connected device ready to run models, and return its health.

    Nothing is installed outside AutoLite's folder there. A board's packages are downloaded here and sent, so that it
    needs no internet.

    Args:
        device: connected; on this machine there is nothing to do.
        say: told in words what is done.
        android_package: for a phone, the .aar file of ONNX Runtime's package.

    Raises:
        InputError: if there is a package for Android, but the device is no phone.
        DeviceError: if ONNX Runtime has no package for its processor or Python, or the device or this machine lacks
            what is needed.
    """
    if android_package is not None and not isinstance(device, Adb):
        raise InputError(f"{android_package} is for phones, but {device.address} is none: leave it out")
    found = health_of(device)
    import onnxruntime

    wanted = str(onnxruntime.__version__)
    if found.onnxruntime == wanted or not isinstance(device, Ssh | Adb):
        return found
    if isinstance(device, Adb):
        from autolite.devices.android import install

        install(device, found, wanted, say, android_package)
    else:
        _install_packages(device, found, wanted, say)
    found = health_of(device)
    if found.onnxruntime != wanted:
        has = f"onnxruntime {found.onnxruntime}" if found.onnxruntime else "no ONNX Runtime"
        raise DeviceError(f"{device.address} runs {has} after {wanted} was installed there")
    return found


def _install_packages(device: Ssh, found: Health, wanted: str, say: Callable[[str], None]) -> None:
    """Send packages for a device's Python, and make an environment of them."""
    if found.machine not in _MACHINES or not found.libc.startswith("glibc 2."):
        raise DeviceError(
            f"{device.address} is a machine of {found.machine} with {found.libc or 'a C library unknown'}, and ONNX "
            f"Runtime has packages for {' and '.join(_MACHINES)} with glibc alone: install such a system there"
        )
    with tempfile.TemporaryDirectory() as folder:
        say(f"downloading onnxruntime {wanted} for {found.machine} and Python {found.python}")
        wheels = _download(wanted, found, Path(folder))
        say(f"sending {sum(w.stat().st_size for w in wheels) / 1e6:.0f} MB to {device.address}")
        first = device.push(wheels)
    say("installing")
    _install(device, str(Path(first).parent), wanted)


def _download(wanted: str, device: Health, folder: Path) -> Sequence[Path]:
    """Download the packages for a device's Python, processor and C library."""
    version = ".".join(device.python.split(".")[:2])
    newest = int(device.libc.rpartition(".")[2])
    platforms = [f"manylinux_2_{minor}_{device.machine}" for minor in range(newest, _OLDEST - 1, -1)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--dest", str(folder)]
    command += ["--only-binary=:all:", "--python-version", version, *(f"--platform={each}" for each in platforms)]
    command += [f"--platform=manylinux2014_{device.machine}", f"onnxruntime=={wanted}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return sorted(folder.iterdir())
    said = done.stderr.strip().splitlines() or ["pip failed"]
    if any("No matching distribution" in line for line in said):
        raise DeviceError(
            f"there is no onnxruntime {wanted} for Python {version} on {device.machine} with {device.libc}: install a "
            "newer Python there, or the version of onnxruntime here that it has one for"
        )
    raise DeviceError(f"onnxruntime {wanted} cannot be downloaded here: {said[-1]}")


def _install(device: Ssh, wheels: str, wanted: str) -> None:
    """Make the environment anew."""
    made = shlex.quote(device.environment)
    device.run(f"rm -rf {made}")
    try:
        device.run(f"python3 -m venv {made}")
    except ConnectionLost:
        raise
    except DeviceError as error:
        raise DeviceError(f"{error}; on Debian, apt install python3-venv there may be what it needs") from None
    pip = f"{made}/bin/python -m pip install --no-compile --no-index --find-links {shlex.quote(wheels)}"
    device.run(f"{pip} onnxruntime=={wanted} && rm -rf {shlex.quote(wheels)}")
