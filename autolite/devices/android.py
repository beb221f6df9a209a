"""Prepare a phone once: ONNX Runtime from its package for Android, and the runner, compiled here."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from autolite.devices.adb import SOURCE, Adb
from autolite.devices.base import Health
from autolite.devices.phone import MACHINES
from autolite.errors import DeviceError, first_line

_ABIS = ("arm64-v8a", "x86_64")
_OLDEST = 24  # Android's API level (7.0), from which on ONNX Runtime's package runs
_PAGE = 16384  # bytes of the largest pages that a phone has; programs for smaller ones do not start there
_KITS = ("ANDROID_NDK_HOME", "ANDROID_NDK_ROOT", "ANDROID_NDK_LATEST_HOME")
_HOMES = ("ANDROID_HOME", "ANDROID_SDK_ROOT")
_USUAL_HOMES = ("Android/Sdk", "Library/Android/sdk", "AppData/Local/Android/Sdk")  # of Android Studio


def install(device: Adb, found: Health, wanted: str, say: Callable[[str], None], package: Path | None) -> None:
    """Put ONNX Runtime and the runner on a phone, in a folder of their own.

    Args:
        device: connected.
        found: what it is.
        wanted: version of ONNX Runtime.
        say: told in words what is done.
        package: ONNX Runtime's package for Android.

    Raises:
        DeviceError: if there is nothing for its processor, or here something is missing: the sentence says what.
    """
    abi = next((abi for abi in _ABIS if MACHINES[abi] == found.machine), None)
    if abi is None:
        raise DeviceError(
            f"{device.address} runs programs for {found.machine}, and models are timed on {' and '.join(_ABIS)} alone: "
            "take a phone with 64 bits"
        )
    if package is None:
        raise DeviceError(
            f"a phone needs onnxruntime-android of version {wanted}: download it (com.microsoft.onnxruntime in Maven "
            f"Central), and name it: autolite device setup {device.address} --aar onnxruntime-android-{wanted}.aar"
        )
    compiler = _compiler()
    say(f"compiling the runner for {abi}")
    with tempfile.TemporaryDirectory() as folder:
        program, library = Path(folder) / "runner", Path(folder) / "libonnxruntime.so"
        library.write_bytes(_library(package, abi))
        _compile(compiler, found.machine, program)
        say(f"sending {library.stat().st_size / 1e6:.0f} MB to {device.address}")
        there = device.program.rpartition("/")[0]
        device.run(f"rm -rf {shlex.quote(there)}")
        device.send({file.name: file for file in (library, program)}, there)
    program_there = shlex.quote(device.program)
    device.run(f"chmod 755 {program_there} && {program_there} version")  # if it does not start, it says why


def _library(package: Path, abi: str) -> bytes:
    try:
        with zipfile.ZipFile(package) as archive:
            return archive.read(f"jni/{abi}/libonnxruntime.so")
    except KeyError:
        raise DeviceError(f"{package} has no ONNX Runtime for {abi}: give one of onnxruntime-android") from None
    except (OSError, zipfile.BadZipFile) as error:
        raise DeviceError(f"cannot read {package}: {first_line(error)}; give another file") from None


def _compile(compiler: Path, machine: str, program: Path) -> None:
    command = [str(compiler), f"--target={machine}-linux-android{_OLDEST}", "-std=gnu99", "-O2", "-fPIE", "-pie"]
    command += [f"-Wl,-z,max-page-size={_PAGE}", "-o", str(program), str(SOURCE), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), f"it ended with {done.returncode}")
        raise DeviceError(f"{compiler} cannot compile the runner: {said.strip()}")


def _compiler() -> Path:
    """The clang of an NDK that is installed here.

    Raises:
        DeviceError: if there is none.
    """
    for kit in _kits():
        for found in sorted(kit.glob("toolchains/llvm/prebuilt/*/bin/clang*")):
            if found.name in ("clang", "clang.exe"):
                return found
    raise DeviceError(
        "the runner for phones is compiled with Android's NDK, which is not found here: install it by Android Studio "
        "or from developer.android.com/ndk/downloads, and say in ANDROID_NDK_HOME where it is"
    )


def _kits() -> Iterator[Path]:
    """Folders where an NDK may be, the newest of several first."""
    yield from (Path(os.environ[name]) for name in _KITS if os.environ.get(name))
    homes = [Path(os.environ[name]) for name in _HOMES if os.environ.get(name)]
    for home in (*homes, *(Path.home() / usual for usual in _USUAL_HOMES)):
        yield from sorted(
            home.glob("ndk/*"), key=lambda kit: [int(n) for n in re.findall(r"\d+", kit.name)], reverse=True
        )
