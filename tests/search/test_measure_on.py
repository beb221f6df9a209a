"""A search whose finalists are timed on a device in the end."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autolite.devices.base import ConnectionLost, Device
from autolite.errors import DeviceError, InputError
from autolite.front import Result, read_front
from autolite.search import engine, run, timing
from tests.conftest import RunSearch


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SECONDS", 0.0)


def search(run_search: RunSearch, out: Path, **changes: Any) -> Result:
    usual = {"space": "quantize-only", "budget": "5trials", "workload": "tokens=8,threads=1", "measure_on": "local"}
    return run_search(out=out, **{**usual, **changes})


def test_the_front_has_what_the_device_says(run_search: RunSearch, tmp_path: Path) -> None:
    front = search(run_search, tmp_path / "run").front
    assert front.target["measured_on"] == "local"
    assert front.baseline["latency_ms"]["source"] == "measured"
    for c in front:
        assert {c.latency_ms.source, c.faster.source, c.memory_bytes.source} == {"measured"}
        assert c.latency_ms.runtime.endswith("on local")
        assert c.energy_mj.source == "predicted"


def test_a_finished_run_is_timed_when_it_gets_a_device_and_once(
    run_search: RunSearch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = search(run_search, tmp_path / "run", measure_on=None).front
    assert before.target["measured_on"] is None
    assert {c.latency_ms.source for c in before} == {"predicted"}
    timed = search(run_search, tmp_path / "run").front
    assert {c.latency_ms.source for c in timed} == {"measured"}
    monkeypatch.setattr(timing, "time_on", None)
    again = search(run_search, tmp_path / "run").front
    assert [c.latency_ms for c in again] == [c.latency_ms for c in timed]
    assert search(run_search, tmp_path / "run", measure_on=None).front == again


def test_a_device_that_is_gone_in_the_end_costs_nothing_but_the_timing(
    run_search: RunSearch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timing_on = timing.time_on

    def gone(device: Device, *others: Any, **more: Any) -> Any:
        raise ConnectionLost("the board is gone")

    monkeypatch.setattr(timing, "time_on", gone)
    with pytest.raises(DeviceError, match=r"front\.json has predictions: the same command .*\(the board is gone\)"):
        search(run_search, tmp_path / "run")
    front = read_front(tmp_path / "run")
    assert front.complete
    assert front.target["measured_on"] is None
    assert {c.latency_ms.source for c in front} == {"predicted"}
    monkeypatch.setattr(timing, "time_on", timing_on)
    monkeypatch.setattr(engine, "evaluate", None)  # nothing is tried again
    found = search(run_search, tmp_path / "run").front
    assert {c.latency_ms.source for c in found} == {"measured"}
    assert {c.id for c in found} <= {path.name for path in (tmp_path / "run" / "candidates").iterdir()}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"measure_on": "usb://phone"}, "'usb://phone' is no device"),
        ({"target": "local"}, "--measure-on local with --target local, which is timed here"),
        ({"runtime": "openvino"}, "--measure-on local with --runtime openvino"),
    ],
)
def test_what_cannot_be_timed_is_refused_before_anything(
    run_search: RunSearch, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        search(run_search, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_a_device_is_asked_before_anything_is_trained(
    run_search: RunSearch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run.Engine, "run", None)
    health = SimpleNamespace(cores=0, onnxruntime="0.1")
    monkeypatch.setattr(timing, "health_of", lambda device: health)
    with pytest.raises(DeviceError, match=r"local has onnxruntime 0\.1, and here it is"):
        search(run_search, tmp_path / "run")
    monkeypatch.setattr(timing, "check_runtime", lambda *_: None)
    with pytest.raises(InputError, match="but local has 0 cores: give fewer"):
        search(run_search, tmp_path / "run")
