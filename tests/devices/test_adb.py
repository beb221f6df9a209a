"""Phones by adb as it goes wrong, and as it goes right: the real adb, and in place of a phone what speaks as one."""

from __future__ import annotations

import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from autolite.devices import adb, connected
from autolite.devices import timing as timings
from autolite.devices.adb import Adb
from autolite.devices.base import ConnectionLost, health_of
from autolite.devices.timing import Artifact, outputs_on, time_on
from autolite.errors import DeviceError, InputError
from autolite.saturation import has_overflown, overflowing
from tests.devices.fake_adbd import FakePhone

FIXED, USUAL = (f"power set-fixed-performance-mode-enabled {on}" for on in ("true", "false"))


def program(handset: FakePhone, name: str, text: str) -> None:
    """Give a phone a program of its own."""
    file = handset.folder / "bin" / name
    file.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    file.chmod(0o755)


def test_what_a_phone_computes_is_what_this_machine_does(phone: Adb, artifacts: dict[str, Artifact]) -> None:
    with connected("local") as local:
        assert outputs_on(phone, artifacts["one"]) == outputs_on(local, artifacts["one"])


@pytest.mark.parametrize("exact", [True, False])
def test_products_overflow_there_as_here(phone: Adb, tmp_path: Path, exact: bool) -> None:
    model, inputs = overflowing()
    (tmp_path / "m.onnx").write_bytes(model)
    product = Artifact([tmp_path / "m.onnx"], inputs)
    with connected("local") as local:
        here = has_overflown(outputs_on(local, product, exact))
    assert has_overflown(outputs_on(phone, product, exact)) == here


# Files


def test_files_are_sent_once_and_whole(phone: Adb, handset: FakePhone, tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "model.onnx").write_bytes(b"model" * 100_000)
    (tmp_path / "w" / "x y.bin").write_bytes(b"weights")
    files = [tmp_path / "model.onnx", tmp_path / "w" / "x y.bin"]
    there = Path(handset.there(phone.push(files)))
    assert there.read_bytes() == files[0].read_bytes()
    assert (there.parent / "w" / "x y.bin").read_bytes() == b"weights"
    before = there.stat().st_ino
    phone.push(files)
    assert there.stat().st_ino == before
    files[1].write_bytes(b"other")
    assert handset.there(phone.push(files)) != str(there), "others go elsewhere"
    phone.drop([str(there)])
    assert not there.parent.exists()


def test_files_that_broke_off_are_sent_again(phone: Adb, handset: FakePhone, tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(b"whole")
    there = Path(handset.there(phone.push([tmp_path / "m"])))
    there.parent.rename(f"{there.parent}.0.part")
    assert Path(handset.there(phone.push([tmp_path / "m"]))).read_bytes() == b"whole"


def test_a_full_disk_is_told_before_anything_is_sent(phone: Adb, handset: FakePhone, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(2_000_000))
    program(handset, "df", "echo /dev/block/dm-50 112000000 111999996 4 100% /data/user/0")
    with pytest.raises(DeviceError, match=r"has 4,096 bytes free where .* large has 2,000,000: remove"):
        phone.push([tmp_path / "large"])
    assert not list((handset.tmp / "autolite" / "files").iterdir())


def test_a_disk_that_fills_meanwhile_is_told(phone: Adb, handset: FakePhone, tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(b"model")
    handset.full = True
    with pytest.raises(DeviceError, match=r"cannot store .*/m: write failed: No space left on device: remove"):
        phone.push([tmp_path / "m"])
    assert not list((handset.tmp / "autolite" / "files").iterdir())
    handset.full = False
    assert Path(handset.there(phone.push([tmp_path / "m"]))).read_bytes() == b"model"


# Getting in


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adb, "_PATIENCE", 0.6)
    monkeypatch.setattr(adb, "_LOOK", 0.1)
    monkeypatch.setattr(timings, "_PAUSE", 0.0)


def refusal(address: str) -> str:
    """What is said of a phone that cannot be used."""
    with pytest.raises(DeviceError) as refused, connected(address):
        pass
    return str(refused.value)


def test_the_only_phone_needs_no_name(phone: Adb) -> None:
    with connected("adb://") as found:
        assert isinstance(found, Adb)
        assert found.serial == phone.serial


@pytest.mark.usefixtures("impatient")
def test_a_phone_that_does_not_trust_this_computer(handset: FakePhone) -> None:
    handset.trusts = False
    said = refusal(f"adb://{handset.serial}")
    assert "does not let this computer in: unlock the phone and accept the computer's key" in said


@pytest.mark.usefixtures("impatient", "handset")
def test_no_phone_at_all() -> None:
    assert "no phone is connected: plug it in, with USB debugging switched on" in refusal("adb://")
    assert "cannot reach adb://0123456789: is it plugged in?" in refusal("adb://0123456789")


@pytest.mark.usefixtures("impatient")
def test_of_several_phones_one_has_to_be_named(phone: Adb, tmp_path: Path) -> None:
    other = FakePhone(tmp_path / "other")
    try:
        with connected(f"adb://{other.serial}"):
            said = refusal("adb://")
    finally:
        other.switch_off()
        subprocess.run(["adb", "disconnect", other.serial], capture_output=True, check=True)
    assert "several phones are connected" in said
    assert f"adb://{phone.serial}" in said


@pytest.mark.usefixtures("impatient", "handset")
def test_what_answers_nothing_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        serial = f"127.0.0.1:{silent.getsockname()[1]}"
        before = time.monotonic()
        assert serial in refusal(f"adb://{serial}")
        assert time.monotonic() - before < 10
        subprocess.run(["adb", "disconnect", serial], capture_output=True, check=False, timeout=60)


def test_a_computer_without_adb(handset: FakePhone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setenv("PATH", str(tmp_path))
        for name in ("ANDROID_HOME", "ANDROID_SDK_ROOT"):
            patched.delenv(name, raising=False)
        assert "phones need adb, which is not installed here" in refusal(f"adb://{handset.serial}")


@pytest.mark.parametrize("address", ["adb://a/b", "adb://a b", "adb://-s;x"])
def test_what_is_no_serial_is_refused(address: str) -> None:
    with pytest.raises(InputError, match=r"is no device: give adb://\[serial\]"):
        Adb.parse(address)


# Connections that break


@pytest.mark.usefixtures("impatient")
def test_a_phone_that_stays_away_is_given_up(phone: Adb, handset: FakePhone, artifacts: dict[str, Artifact]) -> None:
    said = list[str]()
    handset.switch_off()
    with pytest.raises(ConnectionLost, match=r"cannot reach|does not answer|silent"):
        time_on(phone, artifacts, threads=1, seconds=0.0, say=said.append)
    assert len(said) == 3


@pytest.fixture
def specification(phone: Adb, artifacts: dict[str, Artifact], tmp_path: Path) -> dict[str, object]:
    """What has a phone time a model for a minute."""
    inputs = phone.push([timings.saved(artifacts["one"].inputs, tmp_path / "inputs.npz")])
    models = {"one": {"file": phone.push(artifacts["one"].files), "inputs": inputs}}
    found = {"models": models, "threads": 1, "cores": [], "lock": True, "warmup": 0.0}
    return found | {"min_rounds": 1, "first": 0, "seconds": 60.0}


def test_a_runner_ends_with_whoever_asked(phone: Adb, handset: FakePhone, specification: dict[str, object]) -> None:
    heard = timings.answers(phone, ["time"], specification)
    process = next(heard)["process"]
    assert "round" in next(heard)
    assert handset.asked() == [FIXED]
    heard.close()  # type: ignore[attr-defined]
    assert _ends(process)
    assert handset.asked() == [FIXED, USUAL]


def _ends(process: int) -> bool:
    end = time.monotonic() + 10
    while time.monotonic() < end:
        if not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


# Heat and clocks


def test_a_phone_has_fixed_clocks_while_it_times(
    phone: Adb, handset: FakePhone, artifacts: dict[str, Artifact]
) -> None:
    time_on(phone, artifacts, threads=1, seconds=0.0, warmup=0.0)
    assert handset.asked() == [FIXED, USUAL]


def test_a_phone_without_that_mode_is_timed_too(phone: Adb, handset: FakePhone, artifacts: dict[str, Artifact]) -> None:
    program(handset, "cmd", "echo 'Unknown command' >&2; exit 255")
    assert time_on(phone, artifacts, threads=1, seconds=0.0, warmup=0.0, memory=False).timings


def test_the_mode_is_taken_back_from_a_runner_that_was_killed(
    phone: Adb, handset: FakePhone, specification: dict[str, object]
) -> None:
    file = Path(handset.there(phone.program))
    file.unlink()
    file.write_text("#!/bin/sh\ncmd power set-fixed-performance-mode-enabled true; kill -9 $$\n", encoding="utf-8")
    file.chmod(0o755)
    with pytest.raises(DeviceError, match="was ended by signal 9"):
        list(timings.answers(phone, ["time"], specification))
    assert handset.asked() == [FIXED, USUAL]


def test_a_hot_phone_is_given_time(
    phone: Adb, handset: FakePhone, artifacts: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timings, "_LOOK", 0.05)
    said = list[str]()

    def say(message: str) -> None:
        said.append(message)
        handset.warm(30.0)

    handset.warm(41.0)
    assert health_of(phone).is_hot
    time_on(phone, artifacts, threads=1, seconds=0.0, warmup=0.0, memory=False, say=say)
    assert said == [f"{phone.address} is 2 degrees from where it slows down: letting it cool"]


def test_a_phone_says_how_warm_it_is(phone: Adb, handset: FakePhone) -> None:
    handset.warm(30.5)
    found = health_of(phone)
    assert (found.model, found.libc, found.python) == ("Google Pixel 8", "Android 15", "")
    assert (found.celsius, found.margin_celsius) == (30.5, 12.5)
    handset.warm(30.5, status=3)
    assert health_of(phone).margin_celsius == 0


def test_what_is_no_android_is_told(phone: Adb, handset: FakePhone) -> None:
    program(handset, "nproc", "echo nproc: not found")
    with pytest.raises(DeviceError, match="the phone does not say what it is, as Android does"):
        health_of(phone)
