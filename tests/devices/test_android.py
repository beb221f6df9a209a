"""Phones that are set up: the package is the one of this machine's ONNX Runtime, and the kit's compiler is gcc."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import onnxruntime
import pytest
from click.testing import CliRunner

from autolite.cli import main
from autolite.devices import android, connected
from autolite.devices.base import health_of
from autolite.devices.setup import setup
from autolite.devices.timing import Artifact, time_on
from autolite.errors import DeviceError, InputError
from tests.devices.fake_adbd import FakePhone

CLANG = Path("toolchains/llvm/prebuilt/linux-x86_64/bin/clang")


def kit(folder: Path, script: str) -> Path:
    """Make what looks like an NDK, with a compiler."""
    (folder / CLANG).parent.mkdir(parents=True)
    (folder / CLANG).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    (folder / CLANG).chmod(0o755)
    return folder


def package(file: Path, content: bytes, abi: str = "x86_64") -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"jni/{abi}/libonnxruntime.so", content)
    return file


@pytest.fixture(autouse=True)
def nothing_of_android(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*android._KITS, *android._HOMES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kit whose compiler is this machine's, and notes what it was asked to compile for."""
    if shutil.which("gcc") is None:
        pytest.skip("there is no C compiler: apt install gcc libc6-dev")
    found = kit(tmp_path / "kit", f'echo "$1" > {tmp_path}/target; shift; exec gcc "$@"')
    monkeypatch.setenv("ANDROID_NDK_HOME", str(found))
    return tmp_path / "target"


def test_a_phone_is_set_up_once(
    handset: FakePhone, compiler: Path, library: Path, artifacts: dict[str, Artifact], tmp_path: Path
) -> None:
    address = f"adb://{handset.serial}"
    words = ["device", "setup", address, "--aar", str(package(tmp_path / "a.aar", library.read_bytes()))]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert "compiling the runner for x86_64" in done.stderr
    assert f"next: autolite measure DIR --target {address}" in done.stdout
    assert compiler.read_text(encoding="utf-8") == "--target=x86_64-linux-android24\n"
    assert "compiling" not in CliRunner().invoke(main, words).stderr, "nothing was done again"
    with connected(address) as phone:
        assert health_of(phone).onnxruntime == onnxruntime.__version__
        assert time_on(phone, artifacts, threads=1, seconds=0.0, warmup=0.0, memory=False).timings


def refused(handset: FakePhone, file: Path | None = None) -> str:
    with pytest.raises(DeviceError) as found, connected(f"adb://{handset.serial}") as phone:
        setup(phone, android_package=file)
    return str(found.value)


def test_another_processor_is_refused(handset: FakePhone) -> None:
    (handset.folder / "properties" / "ro.product.cpu.abi").write_text("armeabi-v7a\n", encoding="utf-8")
    assert "runs programs for armv7l, and models are timed on arm64-v8a and x86_64 alone" in refused(handset)


def test_a_computer_without_the_kit(handset: FakePhone, tmp_path: Path) -> None:
    said = refused(handset, package(tmp_path / "a.aar", b""))
    assert "is compiled with Android's NDK, which is not found here: install it" in said


@pytest.mark.usefixtures("compiler")
def test_packages_that_are_none(handset: FakePhone, tmp_path: Path) -> None:
    (tmp_path / "text.aar").write_text("<html>", encoding="utf-8")
    assert f"cannot read {tmp_path}/text.aar: File is not a zip file" in refused(handset, tmp_path / "text.aar")
    other = package(tmp_path / "other.aar", b"", "arm64-v8a")
    assert "other.aar has no ONNX Runtime for x86_64" in refused(handset, other)
    broken = package(tmp_path / "broken.aar", b"no library")
    assert "cannot load ONNX Runtime: " in refused(handset, broken)


def test_a_compiler_that_does_not_compile(handset: FakePhone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = kit(tmp_path / "kit", "echo 'runner.c:1:1: error: no such target' >&2; exit 1")
    monkeypatch.setenv("ANDROID_NDK_ROOT", str(found))
    said = refused(handset, package(tmp_path / "a.aar", b""))
    assert "cannot compile the runner: runner.c:1:1: error: no such target" in said


def test_the_newest_kit_is_taken(tmp_path: Path) -> None:
    folder = tmp_path / "home" / "Android" / "Sdk" / "ndk"
    for version in ("9.9.9", "27.0.12077973", "26.3.11579264"):
        kit(folder / version, "")
    assert android._compiler() == folder / "27.0.12077973" / CLANG


def test_a_package_for_phones_is_for_phones(tmp_path: Path) -> None:
    with connected("local") as device, pytest.raises(InputError, match=r"a\.aar is for phones, but local is none"):
        setup(device, android_package=tmp_path / "a.aar")


def test_without_a_package_it_is_said_which(handset: FakePhone) -> None:
    assert f"a phone needs onnxruntime-android of version {onnxruntime.__version__}" in refused(handset, None)
