"""The runner of phones in C, run here as a program; and what a phone says, as text."""

from __future__ import annotations

import io
import json
import re
import signal
import struct
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autolite.devices.phone import specification, tensors, thermal
from autolite.devices.timing import Artifact
from autolite.errors import DeviceError
from autolite.rounds import interleaved

# As phones print it: of Android 15, and before.
NEW = """Thermal Status: {status}
Cached temperatures:
	Temperature{{mValue=99.0, mType=3, mName=skin, mStatus=0}}
Current temperatures from HAL:
	Temperature{{mValue=31.5, mType=3, mName=skin, mStatus=0}}
	Temperature{{mValue=62.0, mType=0, mName=cpu, mStatus=0}}
	Temperature{{mValue=NaN, mType=5, mName=PA, mStatus=0}}
	Temperature{{mValue=0.0, mType=4, mName=USB, mStatus=0}}
Current cooling devices from HAL:
	CoolingDevice{{mValue=120, mType=2, mName=thermal-cpufreq-0}}
Temperature static thresholds from HAL:
	TemperatureThreshold{{mType=3, mName=skin, mHotThrottlingThresholds=[25.0, 35.0, 45.0, 52.0], mCold...=[0.0]}}
	TemperatureThreshold{{mType=0, mName=cpu, mHotThrottlingThresholds=[NaN, NaN, NaN, 95.0], mCold...=[0.0]}}
"""
OLD = NEW.partition("TemperatureThreshold")[0] + (
    "{{.type = SKIN, .name = skin, .hotThrottlingThresholds = [NaN, NaN, NaN, 40.5], .coldThrottlingThresholds = []}}\n"
    "\t{{.type = CPU, .name = cpu, .hotThrottlingThresholds = [NaN, NaN, NaN, NaN], .coldThrottlingThresholds = []}}\n"
)


@pytest.mark.parametrize(
    ("text", "status", "found"),
    [
        (NEW, 0, (62.0, 13.5)),
        (NEW, 1, (62.0, 13.5)),  # nobody notices
        (NEW, 2, (62.0, 0.0)),
        (OLD, 0, (62.0, 9.0)),
        ("Can't find service: thermalservice", 0, (None, None)),
        ("", 0, (None, None)),
    ],
)
def test_heat_is_read_from_what_android_prints(text: str, status: int, found: tuple[float, float]) -> None:
    assert thermal(text.format(status=status)) == found


def packed(**inputs: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **inputs)  # type: ignore[arg-type]
    return tensors(file.getvalue())


def test_inputs_of_unknown_types_are_refused() -> None:
    with pytest.raises(DeviceError, match="input 'x' is of complex64"):
        packed(x=np.zeros(2, np.complex64))


def test_names_that_no_line_holds_are_refused() -> None:
    spec = {"cores": [], "models": {"m": {"file": "a\nb", "inputs": "c"}}}
    with pytest.raises(DeviceError, match="a file with a line break"):
        specification(spec)


# The runner


@pytest.fixture
def spec(runner: Path, artifacts: Mapping[str, Artifact], tmp_path: Path) -> dict[str, Any]:
    """What has it run a model three times in a row, under names that JSON has to escape."""
    inputs = tmp_path / "inputs"
    inputs.write_bytes(packed(**artifacts["one"].inputs))
    names = ("a", 'b "quoted"', "\u00e7")
    models = {name: {"file": str(artifacts["one"].files[0]), "inputs": str(inputs)} for name in names}
    found = {"models": models, "threads": 1, "cores": [], "lock": False, "warmup": 0.0, "seconds": 0.0}
    return found | {"min_rounds": 7, "first": 0}


def answers(runner: Path, word: str, text: str) -> Iterator[dict[str, Any]]:
    done = subprocess.run([runner, word], input=text, capture_output=True, text=True, check=False, timeout=60)
    return map(json.loads, done.stdout.splitlines())


def test_rounds_are_those_of_the_other_devices(runner: Path, spec: dict[str, Any]) -> None:
    heard = list(answers(runner, "time", specification(spec | {"first": 2})))
    names = {name: (lambda number: None) for name in spec["models"]}
    expected = [(number, name) for number, name, _ in interleaved(names, 0.0, warmup=0.0, min_rounds=7, first=2)]
    bursts = [each for each in heard if "round" in each]
    assert [(each["round"], each["model"]) for each in bursts] == expected
    assert all(0 < len(each["milliseconds"]) <= 50 for each in bursts)
    assert all(sum(each["milliseconds"][:-1]) < 5.1 for each in bursts)
    assert {"celsius", "megahertz"} == set(next(each for each in heard if "state" in each)["state"])


def test_a_runner_that_nobody_hears_is_replaced(runner: Path, spec: dict[str, Any]) -> None:
    forgotten = subprocess.Popen([runner, "time"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert forgotten.stdin
    assert forgotten.stdout
    forgotten.stdin.write(specification(spec | {"lock": True, "seconds": 100.0}))
    forgotten.stdin.close()
    assert "runtime" in json.loads(forgotten.stdout.readline())
    heard = answers(runner, "outputs", specification(spec | {"lock": True, "replaces": forgotten.pid}))
    assert "output" in next(heard)
    assert forgotten.wait(5) == 1, "it was asked, and ended by itself"
    forgotten.stdout.close()


def test_one_runner_waits_for_another(runner: Path, spec: dict[str, Any]) -> None:
    text = specification(spec | {"lock": True, "seconds": 100.0})
    with (
        subprocess.Popen([runner, "time"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first,
        subprocess.Popen([runner, "time"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as second,
    ):
        try:
            for each in (first, second):
                assert each.stdin
                assert each.stdout
                each.stdin.write(text)
                each.stdin.close()
                if each is first:
                    assert "runtime" in each.stdout.readline()
            assert second.stdout
            assert json.loads(second.stdout.readline()) == {"waiting": True}
        finally:
            for each in (first, second):
                each.send_signal(signal.SIGKILL)


TENSOR = struct.pack("<III1qQ", 1, 7, 1, 1, 8) + b"x" + bytes(8)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "has an input that is not given: "),
        (TENSOR, "has an input that is not given: "),
        (TENSOR[:-1], "broken inputs"),
        (struct.pack("<III", 2**31, 7, 1) + bytes(100), "broken inputs"),
        (struct.pack("<III", 1, 7, 9) + bytes(100), "broken inputs"),
        (struct.pack("<III1qQ", 1, 7, 1, 1, 2**62) + bytes(100), "broken inputs"),
        (struct.pack("<III2qQ", 9, 7, 2, 1, 1000, 8) + b"input_ids" + bytes(8), "not enough space"),
    ],
)
def test_inputs_are_not_trusted(
    runner: Path, spec: dict[str, Any], tmp_path: Path, content: bytes, reason: str
) -> None:
    (tmp_path / "inputs").write_bytes(content)
    *_, last = answers(runner, "outputs", specification(spec))
    assert re.search(reason, last["error"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "names no model"),
        ("nonsense 1\n", "is unknown: nonsense"),
        ("nonsense\n", "is no word and value: nonsense"),
        ("threads two\n", "no whole number: two"),
        ("seconds \n", "no number: "),
        ('model "a"\n', 'has no file or no inputs: "a"'),
        ("file a\n", "is unknown: file"),
    ],
)
def test_what_it_is_to_do_is_not_trusted(runner: Path, text: str, reason: str) -> None:
    (found,) = answers(runner, "outputs", text)
    assert reason in found["error"]
