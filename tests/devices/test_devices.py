"""What holds of every device: it tells how it is, takes files, and times models; and what goes wrong is a sentence."""

from __future__ import annotations

import os
import platform
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from autolite.devices import device_at
from autolite.devices import timing as timings
from autolite.devices.base import Device, Health, health_of
from autolite.devices.timing import MIN_ROUNDS, Artifact, drift, time_on
from autolite.errors import DeviceError, InputError
from autolite.measure import Timing


def test_it_tells_what_it_is(device: Device) -> None:
    health = health_of(device)
    assert health.machine == platform.machine()
    assert health.onnxruntime == onnxruntime.__version__
    assert health.cores >= 1
    assert min(health.memory_bytes, health.free_bytes) > 1e6
    assert health.model


def test_models_are_timed_in_turn(device: Device, artifacts: dict[str, Artifact]) -> None:
    found = time_on(device, artifacts, threads=1, seconds=0.0, warmup=0.0)
    assert list(found.timings) == ["one", "two"]
    assert {len(timing.rounds) for timing in found.timings.values()} == {MIN_ROUNDS}
    assert all(min(calls) > 0 for timing in found.timings.values() for calls in timing.rounds)
    assert found.runtime == f"onnxruntime {onnxruntime.__version__}"
    assert found.states
    assert all(peak is None or 0 <= peak < 1e9 for peak in found.peak_bytes.values())


def test_more_time_is_more_rounds(device: Device, artifacts: dict[str, Artifact]) -> None:
    found = time_on(device, artifacts, threads=1, seconds=1.0, warmup=0.0)
    assert len(found.timings["one"].rounds) > MIN_ROUNDS


def test_it_runs_on_the_cores_that_are_named(device: Device, artifacts: dict[str, Artifact]) -> None:
    time_on(device, artifacts, threads=1, seconds=0.0, warmup=0.0, cores=[min(os.sched_getaffinity(0))])
    with pytest.raises(DeviceError, match="it has no cores 4000 that can be used"):
        time_on(device, artifacts, threads=1, seconds=0.0, warmup=0.0, cores=[4000])


def test_a_model_that_does_not_run_is_an_error_of_its_own(
    device: Device, artifacts: dict[str, Artifact], tmp_path: Path
) -> None:
    broken = tmp_path / "model.onnx"
    broken.write_bytes(artifacts["one"].files[0].read_bytes()[:1000])
    with pytest.raises(DeviceError, match=f"{device.address}: .*model.onnx"):
        time_on(device, {"broken": Artifact([broken], {})}, threads=1, seconds=0.0)


def test_a_decoder_is_given_that_there_were_no_earlier_calls(device: Device, decoder: Artifact) -> None:
    assert set(decoder.inputs) == {"input_ids", "attention_mask", "token_type_ids"}
    found = time_on(device, {"decoder": decoder}, threads=1, seconds=0.0, warmup=0.0)
    assert found.timings["decoder"].samples
    assert found.peak_bytes["decoder"]


def test_inputs_that_a_model_does_not_have_are_left_out(device: Device, artifacts: dict[str, Artifact]) -> None:
    one = artifacts["one"]
    more = replace(one, inputs={**one.inputs, "unheard": np.zeros(3)})
    assert time_on(device, {"one": more}, threads=1, seconds=0.0, warmup=0.0).timings


@pytest.mark.parametrize(
    "address", ["", "locale", "http://board", "ssh://", "ssh://a:b@c", "ssh://c:port", "ssh://c/d"]
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(InputError, match=r"ssh://\[user@\]host\[:port\]"):
        device_at(address)


# Warm devices


@pytest.mark.parametrize(("margin", "waits", "says"), [(20, 0, 0), (4, 1, 1), (-15, 2, 1), (-10_000, 36, 2)])
def test_a_hot_device_is_given_time(
    margin: float, waits: int, says: int, monkeypatch: pytest.MonkeyPatch, device: Device
) -> None:
    health, slept, said = health_of(device), list[float](), list[str]()

    def look(device: Device) -> Health:  # ten degrees less between two looks
        return replace(health, margin_celsius=margin + 10 * len(slept))

    monkeypatch.setattr(timings, "health_of", look)
    monkeypatch.setattr("time.sleep", slept.append)
    timings._cool(device, said.append)
    assert (len(slept), len(said)) == (waits, says)


def test_drift_is_the_end_against_the_beginning() -> None:
    assert drift(Timing(((1.0,), (1.0,), (5.0,), (1.0,), (1.1,), (1.1,)))) == pytest.approx(0.05, abs=0.06)
    assert drift(Timing(((2.0,), (3.0,), (4.0,)))) == pytest.approx(1.0)
    assert drift(Timing(((2.0,),))) == 0
