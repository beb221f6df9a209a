"""`autolite profile` finds the model that is meant, calls it as the workload says, and refuses what it cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from click.testing import Result as Invoked
from onnx import TensorProto, helper

from autolite import registry
from autolite.artifact import Dims, check_positions, find, fitting, inputs_for
from autolite.cli import main
from autolite.contracts import tiny_context
from autolite.errors import InputError, ModelError
from autolite.front import Result
from autolite.inference import read_manifest
from autolite.machine import processors
from autolite.measure import Workload, time_interleaved
from autolite.runtime.onnxruntime import OnnxRuntime

PEAKS = {"fp32": 50.0, "int8": 100.0, "int4": 40.0}
IDS: dict[str, tuple[str, Dims]] = {
    "input_ids": ("tensor(int64)", ["batch", "tokens"]),
    "attention_mask": ("tensor(int64)", ["batch", "tokens"]),
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fewest calls, and no measuring of peaks."""
    monkeypatch.setattr("autolite.hardware.peaks.local_peaks", lambda threads, progress: PEAKS)
    monkeypatch.setattr(
        "autolite.runtime.operators.time_interleaved",
        lambda runners, feed, seconds, **how: time_interleaved(runners, feed, 0.0, warmup=0.01, **how),
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model.onnx and config.json of a tiny BERT with 64 positions."""
    folder = tmp_path_factory.mktemp("model")
    teacher = tiny_context("bert", registry.get("task", "text-classification")).teacher
    OnnxRuntime().emit(teacher, folder)
    teacher.model.config.save_pretrained(folder)
    return folder


def invoke(*words: object) -> Invoked:
    return CliRunner().invoke(main, ["profile", *map(str, words)])


def test_a_table_says_where_the_time_goes(model: Path) -> None:
    done = invoke(model, "--workload", "tokens=9", "--by", "layer")
    assert done.exit_code == 0, done.output
    for text in ("batch=1,tokens=9,threads=1", "input_ids int64[1,9]", "layer.0", "layer.2", "of peak"):
        assert text in done.stdout


def test_json_has_everything_for_the_workload_of_a_candidate(finished: Result) -> None:
    folder = finished.path / finished.front.candidates[0].path
    done = invoke(folder, "--json", "--workload", "batch=2")
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    made_for = Workload.parse(read_manifest(folder)["workload"])
    threads = min(made_for.threads, processors())
    assert data["workload"] == {"batch": 2, "tokens": made_for.tokens, "threads": threads}
    assert data["inputs"]["input_ids"] == f"int64[2,{made_for.tokens}]"
    assert data["operators"]
    assert data["nodes"]


def foreign(file: Path, dims: list[Any], name: str = "pixels") -> Path:
    """A model of one matrix, made by someone else."""
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, dims) for n in (name, "y")]
    graph = helper.make_graph([helper.make_node("Relu", [name], ["y"])], "g", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    file.parent.mkdir(parents=True, exist_ok=True)
    onnx.save_model(model, file)
    return file


def test_a_model_of_any_inputs_runs_and_its_nodes_are_other(tmp_path: Path) -> None:
    done = invoke(foreign(tmp_path / "any.onnx", ["batch", 3, 8, 8]), "--json")
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data["inputs"] == {"pixels": "float32[1,3,8,8]"}
    assert [row["layer"] for row in data["layers"]] == ["other"]
    assert data["call_ms"]["median"] > 0


def test_a_model_of_which_nothing_is_left_to_run(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    constant = helper.make_tensor("w", TensorProto.FLOAT, [2], [1.0, 2.0])
    graph = helper.make_graph([helper.make_node("Relu", ["w"], ["y"])], "g", [], [value], [constant])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save_model(model, tmp_path / "model.onnx")
    done = invoke(tmp_path, "--json")
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert (data["operators"], data["layers"], data["nodes"]) == ([], [], [])
    assert data["call_ms"]["operators"] == 0
    assert "0 nodes take 0 us" in invoke(tmp_path).stdout


# Finding the model


def test_the_only_model_of_a_folder_is_meant(tmp_path: Path, model: Path) -> None:
    assert find(model).file == model / "model.onnx"
    assert find(model / "model.onnx").file == model / "model.onnx"
    assert find(foreign(tmp_path / "one" / "net.onnx", [1, 2]).parent).file == tmp_path / "one" / "net.onnx"


def test_a_candidate_says_which_file_and_which_call_is_meant(finished: Result, tmp_path: Path) -> None:
    folder = finished.path / finished.front.candidates[0].path
    found = find(folder)
    assert found.file == folder / "model.onnx"
    assert (found.workload.batch, found.workload.generated) == (1, 0)
    assert found.workload.tokens == Workload.parse(read_manifest(folder)["workload"]).tokens
    manifest = read_manifest(folder)
    (tmp_path / "autolite.json").write_text(
        json.dumps({**manifest, "workload": f"batch=1,tokens=5,threads={10**6},generated=64"}), encoding="utf-8"
    )
    assert find(tmp_path).workload == Workload(1, 5, 10**6)


def test_no_more_threads_are_profiled_than_there_are_here(finished: Result, tmp_path: Path) -> None:
    shutil.copytree(finished.path / finished.front.candidates[0].path, tmp_path / "made")
    manifest = read_manifest(tmp_path / "made")
    text = json.dumps({**manifest, "workload": f"batch=1,tokens=5,threads={10**6}"})
    (tmp_path / "made" / "autolite.json").write_text(text, encoding="utf-8")
    done = json.loads(invoke(tmp_path / "made", "--json").stdout)
    assert done["workload"] == {"batch": 1, "tokens": 5, "threads": processors()}


@pytest.mark.parametrize("name", ["candidates", "teacher"])
def test_a_run_is_no_model_but_names_some(name: str, finished: Result) -> None:
    with pytest.raises(InputError, match=r"is a run; give one of its candidates, as in .*candidates"):
        find(finished.path)
    if name == "teacher":
        assert find(finished.path / "teacher").file.is_file()


def refused(words: tuple[object, ...], message: str) -> None:
    done = invoke(*words)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stdout == ""


def test_what_is_no_model_is_refused_in_one_sentence(tmp_path: Path, model: Path) -> None:
    refused((tmp_path / "nowhere",), "there is nothing at")
    (tmp_path / "empty").mkdir()
    refused((tmp_path / "empty",), "there is no model.onnx in")
    for name in ("a", "b"):
        foreign(tmp_path / "two" / f"{name}.onnx", [1, 2])
    refused((tmp_path / "two",), "has 2 models; give one of")
    whole = (model / "model.onnx").read_bytes()
    for i, content in enumerate((whole[: len(whole) // 2], b"", b"no model")):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "model.onnx").write_bytes(content)
        refused((tmp_path / str(i),), "cannot load")


def test_a_damaged_or_foreign_manifest_is_refused_in_one_sentence(tmp_path: Path, finished: Result) -> None:
    manifest = read_manifest(finished.path / finished.front.candidates[0].path)
    file = tmp_path / "autolite.json"
    for content, message in (
        ("{", "cannot be read as JSON"),
        (json.dumps({**manifest, "artifacts": [{"files": []}]}), "names no artifact that can be run"),
        (json.dumps({**manifest, "artifacts": [{"runtime": "openvino", "files": ["m.xml"]}]}), "is for openvino"),
        (json.dumps(manifest), "there is no model at"),
    ):
        file.write_text(content, encoding="utf-8")
        refused((tmp_path,), message)


# The workload


def test_a_workload_that_does_not_fit_is_refused_in_one_sentence(model: Path, tmp_path: Path) -> None:
    refused((model, "--workload", "tokens=65"), "tokens=65, but the model takes 64 at most; give fewer, as in")
    refused((model, "--workload", "tokens=0"), "tokens=0 must be a whole number of at least 1")
    refused((model, "--workload", "threads=1000000"), "threads=1000000, but this process may use")
    refused((model, "--workload", "generated=4"), "one call is meant; leave 'generated' out")
    alone = tmp_path / "model.onnx"  # without its configuration, only running it tells
    alone.write_bytes((model / "model.onnx").read_bytes())
    refused((alone, "--workload", "tokens=65"), "does not run with batch=1,tokens=65,threads=1; if it has fewer")
    fixed = foreign(tmp_path / "fixed" / "model.onnx", [4, 3])
    refused((fixed, "--workload", "batch=2"), "batch=2, but this model takes batch=4 only; leave it out")


def test_fixed_inputs_decide_unless_others_are_asked_for() -> None:
    fixed: dict[str, tuple[str, Dims]] = {"ids": ("tensor(int64)", [2, 16]), "mask": ("tensor(float)", ["batch", 16])}
    assert fitting(Workload(1, 128, 1), fixed) == Workload(2, 16, 1)
    assert fitting(Workload(1, 16, 3), fixed, asked=["tokens", "threads"]) == Workload(2, 16, 3)
    with pytest.raises(InputError, match="batch=1, but this model takes batch=2 only"):
        fitting(Workload(1, 16, 1), fixed, asked=["batch"])
    images: dict[str, tuple[str, Dims]] = {"pixel_values": ("tensor(float)", ["batch", 3, 8, 8])}
    assert fitting(Workload(4, 128, 1), images, asked=["batch"]) == Workload(4, 1, 1)
    assert fitting(Workload(1, 9, 1), IDS) == Workload(1, 9, 1)


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ({"model_type": "bert", "max_position_embeddings": 64}, 64),
        ({"model_type": "roberta", "max_position_embeddings": 66, "pad_token_id": 1}, 64),
    ],
)
def test_positions_that_padding_takes_do_not_count(config: dict[str, Any], limit: int) -> None:
    settings = SimpleNamespace(**config)
    check_positions(Workload(1, limit, 1), IDS, settings)
    with pytest.raises(InputError, match=f"--workload tokens={limit}"):
        check_positions(Workload(1, limit + 1, 1), IDS, settings)


def test_what_has_no_limit_or_no_tokens_takes_any_number() -> None:
    check_positions(Workload(1, 10**6, 1), IDS, None)
    check_positions(Workload(1, 10**6, 1), IDS, SimpleNamespace(model_type="bert", max_position_embeddings=None))
    images: dict[str, tuple[str, Dims]] = {"pixel_values": ("tensor(float)", ["batch", 3, 8, 8])}
    check_positions(Workload(), images, SimpleNamespace(model_type="bert", max_position_embeddings=8))


# The inputs


def test_inputs_have_the_types_and_sizes_that_the_model_takes() -> None:
    wide: dict[str, tuple[str, Dims]] = {
        **IDS,
        "token_type_ids": ("tensor(int32)", ["batch", "tokens"]),
        "position_ids": ("tensor(int64)", ["batch", "tokens"]),
        "past.0.key": ("tensor(float)", ["batch", 4, "past_sequence_length", 8]),
        "total_mask": ("tensor(int64)", ["batch", "past_sequence_length + sequence_length"]),
        "half": ("tensor(float16)", [None, 5]),
        "bool_mask": ("tensor(bool)", ["batch", 1, "s0", "s0"]),
        "use_cache_branch": ("tensor(bool)", [1]),
        "scalar": ("tensor(int32)", []),
    }
    found = inputs_for(wide, Workload(2, 7, 1), SimpleNamespace(vocab_size=50))
    assert {name: (str(array.dtype), array.shape) for name, array in found.items()} == {
        "input_ids": ("int64", (2, 7)),
        "attention_mask": ("int64", (2, 7)),
        "token_type_ids": ("int32", (2, 7)),
        "position_ids": ("int64", (2, 7)),
        "past.0.key": ("float32", (2, 4, 0, 8)),
        "total_mask": ("int64", (2, 7)),
        "half": ("float16", (2, 5)),
        "bool_mask": ("bool", (2, 1, 7, 7)),
        "use_cache_branch": ("bool", (1,)),
        "scalar": ("int32", ()),
    }
    assert 0 <= found["input_ids"].min() < found["input_ids"].max() < 50
    assert found["attention_mask"].all()
    assert not found["token_type_ids"].any()
    np.testing.assert_array_equal(found["position_ids"], [range(7)] * 2)
    assert found["bool_mask"].all()
    assert not found["use_cache_branch"].any()


def test_images_have_the_size_of_the_configuration() -> None:
    image: dict[str, tuple[str, Dims]] = {
        "pixel_values": ("tensor(float)", ["batch_size", "num_channels", "height", "width"])
    }
    config = SimpleNamespace(image_size=24, num_channels=3)
    assert inputs_for(image, Workload(2), config)["pixel_values"].shape == (2, 3, 24, 24)
    with pytest.raises(ModelError, match=r"leaves 'num_channels' of its input 'pixel_values' open.*config\.json"):
        inputs_for(image, Workload(2))


def test_inputs_that_cannot_be_made_up_are_refused() -> None:
    with pytest.raises(ModelError, match=r"input 'text' is a tensor\(string\), which cannot be made up"):
        inputs_for({"text": ("tensor(string)", ["batch"])}, Workload())
