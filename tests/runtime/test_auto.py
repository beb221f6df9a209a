"""The runtime "auto" keeps whichever artifact is faster here, and runs it with the runtime that it is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autolite import registry
from autolite.architecture import shape_of
from autolite.errors import InputError, ModelError, PlanError
from autolite.measure import Timing, Workload
from autolite.runtime import auto
from autolite.runtime.auto import AutoRuntime
from autolite.techniques.base import Student
from autolite.testing import tiny_model

pytest.importorskip("openvino", reason="auto needs two runtimes; openvino is not installed")
INPUTS = {"input_ids": np.array([[5, 6, 7]]), "attention_mask": np.ones((1, 3), np.int64)}


def student() -> Student:
    model = tiny_model("bert")
    return Student(model, shape_of(model))


@pytest.mark.parametrize(("fast", "file"), [("onnxruntime", "model.onnx"), ("openvino", "model.xml")])
def test_the_faster_artifact_is_kept_and_nothing_else(
    fast: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed(runners: dict[str, Any], *_: Any, **__: Any) -> dict[str, Timing]:
        return {name: Timing(((1.0 if name == fast else 2.0,),)) for name in runners}

    monkeypatch.setattr(auto, "time_interleaved", timed)
    runtime = AutoRuntime()
    files = runtime.emit(student(), tmp_path, Workload(tokens=3), tuned=True)
    assert files[0] == tmp_path / file
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert runtime.of(files[0]).name == fast
    alone = registry.get("runtime", "onnxruntime")
    expected = alone.load(alone.emit(student(), tmp_path / "alone")[0]).run(INPUTS)["logits"]
    np.testing.assert_allclose(runtime.load(files[0]).run(INPUTS)["logits"], expected, atol=1e-4)


def test_what_one_runtime_cannot_read_is_left_to_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise ModelError("no such operator")

    runtime = AutoRuntime()
    monkeypatch.setattr(type(runtime.runtimes[".onnx"]), "load", refuse)
    files = runtime.emit(student(), tmp_path / "one", Workload(tokens=3), tuned=True)
    assert files[0] == tmp_path / "one" / "model.xml"
    assert sorted((tmp_path / "one").iterdir()) == sorted(files)
    monkeypatch.setattr(type(runtime.runtimes[".xml"]), "emit", refuse)
    with pytest.raises(ModelError, match="no such operator"):
        runtime.emit(student(), tmp_path / "none", Workload(tokens=3), tuned=True)


def test_a_format_that_no_runtime_has_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = AutoRuntime()
    for each in runtime.runtimes.values():
        monkeypatch.setattr(each, "formats", frozenset({"int8"}))
    with pytest.raises(PlanError, match="no installed runtime runs all of fp32"):
        runtime.emit(student(), tmp_path)


def test_it_times_on_this_machine_and_refuses_others(tmp_path: Path) -> None:
    import autolite

    with pytest.raises(InputError, match="use --target local"):
        autolite.search(target="pixel8", runtime="auto", out=tmp_path / "run")
