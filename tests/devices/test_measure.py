"""`autolite measure`: models of the user's on a device, with what was predicted beside what is measured."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from click.testing import Result as Invoked

from autolite.cli import main
from autolite.cli.terminal import numbers
from autolite.devices import measure as measuring
from autolite.devices.base import Device, Health, health_of
from autolite.devices.measure import measure_models
from autolite.devices.timing import Session
from autolite.errors import InputError, TargetError
from autolite.front import Result
from autolite.measure import Timing, Workload


def invoke(*words: object) -> Invoked:
    return CliRunner().invoke(main, ["measure", *map(str, words), "--profile", "pixel8", "--seconds", "0"])


def test_a_run_is_its_teacher_and_its_candidates(finished: Result) -> None:
    found = measure_models([finished.path], profile="pixel8", seconds=0.0)
    candidates = finished.front.candidates
    assert [Path(row.path).name for row in found.rows] == ["teacher", *(c.id for c in candidates)]
    teacher, *rest = found.rows
    assert set(teacher.measured) >= {"latency_ms", "p90_ms"}
    assert not teacher.predicted
    assert "only a candidate's folder" in teacher.unpredicted
    for row, candidate in zip(rest, candidates, strict=True):
        assert row.size_bytes == candidate.size_bytes.value
        assert row.measured["faster"].source == "measured"
        assert row.predicted["latency_ms"].source == "predicted"
    assert found.workload.tokens == Workload.parse(candidates[0].latency_ms.workload).tokens
    assert json.loads(json.dumps(found.to_json()))["profile"] == "pixel8"


def test_the_table_has_both_and_the_notes_say_what_is_missing(finished: Result) -> None:
    done = invoke(finished.path)
    assert done.exit_code == 0, done.output
    assert "predicted by pixel8" in done.stdout
    assert "not predicted" in done.stdout
    assert "teacher" in done.stdout
    assert "timing" in done.stderr


def test_json_is_for_scripts(finished: Result) -> None:
    folder = finished.path / finished.front.candidates[0].path
    done = json.loads(invoke(folder, "--workload", "tokens=5", "--json").stdout)
    assert done["workload"]["tokens"] == 5
    (row,) = done["rows"]
    assert row["measured"]["latency_ms"]["value"] > 0
    assert row["measured"]["latency_ms"]["runtime"].startswith("onnxruntime ")


# Times that are known


@pytest.fixture
def timed(finished: Result, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Measure the teacher and a candidate on a device whose times and name are made up."""

    def measured(milliseconds: dict[str, list[float]], model: str = "nothing", **how: Any) -> measuring.Measured:
        paths = [finished.path / "teacher", finished.path / finished.front.candidates[0].path]

        def session(device: Device, artifacts: dict[str, object], threads: int, seconds: float, **how: Any) -> Session:
            timings = {
                path: Timing(tuple((ms,) for ms in each))
                for path, each in zip(artifacts, milliseconds.values(), strict=True)
            }
            return Session(timings, dict.fromkeys(artifacts), (), "onnxruntime 9")

        def health(device: Device) -> Health:
            return replace(health_of(device), model=model)

        monkeypatch.setattr(measuring, "time_on", session)
        monkeypatch.setattr(measuring, "health_of", health)
        return measure_models(paths, **how)

    return measured


def test_faster_is_against_the_first(timed: Any) -> None:
    found = timed({"teacher": [6.0] * 9, "small": [2.0] * 9}, profile="pixel8")
    assert found.rows[1].measured["faster"].value == pytest.approx(3)
    assert "faster" not in found.rows[0].measured
    assert found.rows[1].measured["latency_ms"].value == 2


def test_a_model_that_became_slower_is_told(timed: Any) -> None:
    from rich.console import Console

    from autolite.report.tables import measured_table

    console = Console(width=200)
    with console.capture() as shown:
        console.print(measured_table(timed({"teacher": [6.0] * 9, "small": [2.0] * 6 + [3.0] * 3}, profile="pixel8")))
    assert "was 50% slower in the end" in shown.get()


def test_a_device_says_which_target_it_is(timed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "LOCAL", "this one is not it")  # else it would be measured
    times = {"teacher": [6.0] * 9, "small": [2.0] * 9}
    assert timed(times, "Raspberry Pi 5 Model B Rev 1.0", device="local").profile == "raspberry-pi-5"
    assert timed(times, "NVIDIA Jetson Orin Nano Developer Kit", device="local").profile == "jetson-orin-nano"
    assert timed(times, "Google Pixel 8", device="local").profile == "pixel8"
    assert timed(times, "Google Pixel 8 Pro", device="local").profile == "pixel8-pro"
    unknown = timed(times, "Raspberry Pi 4 Model B", device="local")
    assert unknown.profile is None
    assert "name the nearest with --profile" in unknown.rows[1].unpredicted


@pytest.mark.usefixtures("phone")
def test_a_phone_is_measured_beside_what_was_predicted_of_it(finished: Result) -> None:
    folder = finished.path / finished.front.candidates[0].path
    words = ["measure", str(folder), "--target", "adb://", "--workload", "threads=1", "--seconds", "0"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert "Google Pixel 8, batch=1," in done.stdout
    assert "predicted by pixel8" in done.stdout
    assert "off by" in done.stdout


# What cannot be


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("/nowhere",), "there is nothing at /nowhere"),
        (("{run}", "--workload", "tokens=0"), "tokens=0 must be"),
        (("{run}", "--workload", "threads=4000"), "threads=4000, but local has"),
        (("{run}", "--workload", "generated=3"), "leave 'generated' out"),
        (("{run}", "--cores", "1-x"), "'1-x' does not name cores"),
        (("{run}", "--target", "board"), "'board' is no device"),
    ],
)
def test_nonsense_is_told_in_a_sentence(words: tuple[str, ...], message: str, finished: Result) -> None:
    done = invoke(*(word.replace("{run}", str(finished.path)) for word in words))
    assert done.exit_code == 2
    assert message in done.stderr


def test_an_unknown_profile_is_told_before_anything_is_timed(finished: Result) -> None:
    with pytest.raises(TargetError, match="unknown target 'pixle8': did you mean 'pixel8'"):
        measure_models([finished.path], "ssh://no-host.invalid", profile="pixle8")


def test_weights_beside_a_model_go_with_it(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from autolite.artifact import find
    from autolite.errors import ModelError

    weights = numpy_helper.from_array(np.ones((4, 4), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    assert find(tmp_path).files == [tmp_path / "m.onnx", tmp_path / "w.bin"]
    assert len(measure_models([tmp_path], profile="pixel8", seconds=0.0).rows) == 1
    (tmp_path / "w.bin").unlink()
    with pytest.raises(ModelError, match=r"has weights in .*w\.bin, which is not there"):
        _ = find(tmp_path).files


@pytest.mark.parametrize(
    ("text", "found"), [(None, []), ("3", [3]), ("0,2", [0, 2]), ("4-7", [4, 5, 6, 7]), ("0, 6-7", [0, 6, 7])]
)
def test_cores_are_numbers_and_ranges(text: str | None, found: list[int]) -> None:
    assert numbers(text) == found


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "1,,2", "1-2-3", "7-4"])
def test_other_text_names_no_cores(text: str) -> None:
    with pytest.raises(InputError, match="does not name cores"):
        numbers(text)


def test_two_ways_to_one_model_are_two_rows(finished: Result, tmp_path: Path) -> None:
    first = finished.path / finished.front.candidates[0].path
    shutil.copytree(first, tmp_path / "copy")
    assert len(measure_models([first, tmp_path / "copy"], profile="pixel8", seconds=0.0).rows) == 2


@pytest.mark.parametrize("address", ["local", "ssh://board", "adb://"])
def test_a_device_is_checked(address: str, request: pytest.FixtureRequest) -> None:
    if address != "local":
        request.getfixturevalue({"ssh://board": "board", "adb://": "phone"}[address])
    shown = CliRunner().invoke(main, ["device", "check", address])
    assert shown.exit_code == 0, shown.output
    assert "free on disk" in shown.stdout
    told = json.loads(CliRunner().invoke(main, ["device", "check", address, "--json"]).stdout)
    assert Health(**told).onnxruntime
    ready = CliRunner().invoke(main, ["device", "setup", address])
    assert ready.exit_code == 0, ready.output
    assert f"next: autolite measure DIR --target {address}" in ready.stdout
