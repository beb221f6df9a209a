"""A model in the ORT format computes exactly what the ONNX model computes, and lists its operators."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from flatbuffers import encode, packer, table

import autolite
from autolite import registry
from autolite.cli import main
from autolite.contracts import tiny_context
from autolite.errors import ModelError
from autolite.files import sha256
from autolite.front import Result
from autolite.runtime import modelfile, ortformat
from autolite.runtime.onnxruntime import OnnxRuntime
from autolite.techniques.base import Student
from autolite.techniques.quantize import Quantize, QuantizeConfig
from autolite.testing import PAD, VOCAB

FORMS = ("fp32", "int8", "int8-static", "int7", "int4", "kmeans4")


def student(family: str, task: str, **formats: str) -> Student:
    context = tiny_context(family, registry.get("task", task))
    return Quantize().apply(context.teacher, QuantizeConfig(**formats), context)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    file = OnnxRuntime().emit(student("bert", "text-classification", attention="int8", ffn="int8"), folder)[0]
    return file, ortformat.convert(file, folder)[0]


def loaded(file: Path, folder: Path) -> onnx.ModelProto:
    """What a session makes of a model, as ONNX."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "loaded.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(file), options)
    return onnx.load(folder / "loaded.onnx")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("family", "task"),
    [("bert", "text-classification"), ("albert", "text-classification"), ("gpt2", "language-modeling")],
)
def test_results_are_those_of_the_onnx_model_to_the_bit(family: str, task: str, form: str, tmp_path: Path) -> None:
    table = form if form in ("int8", "int4", "int7") else "fp32"
    head = table if family == "gpt2" else form
    made = student(family, task, attention=form, ffn=form, embedding=table, head=head)
    (file,) = OnnxRuntime().emit(made, tmp_path)
    ort, _ = ortformat.convert(file, tmp_path)
    ids = np.random.default_rng(0).integers(4, VOCAB, (4, 17))
    ids[2, 9:] = PAD
    inputs = {"input_ids": ids, "attention_mask": (ids != PAD).astype(np.int64)}
    expected, found = (OnnxRuntime().load(f).run(inputs)["logits"] for f in (file, ort))
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found, expected)


def test_no_weight_has_a_sign_that_a_product_could_overflow_by(pair: tuple[Path, Path], tmp_path: Path) -> None:
    model = loaded(pair[1], tmp_path)
    assert any(node.op_type == "DynamicQuantizeMatMul" for node in model.graph.node)
    assert not any(tensor.data_type == onnx.TensorProto.INT8 for tensor in model.graph.initializer)


def test_the_operators_listed_are_those_of_the_model(pair: tuple[Path, Path], tmp_path: Path) -> None:
    text = (pair[1].parent / "required_operators.config").read_text()
    listed = {
        (domain, name)
        for domain, _, names in (line.split(";") for line in text.splitlines())
        for name in names.split(",")
    }
    assert listed == {(node.domain or "ai.onnx", node.op_type) for node in loaded(pair[1], tmp_path).graph.node}
    assert str(pair[1].parent) not in text


def test_nothing_local_is_in_the_file(pair: tuple[Path, Path]) -> None:
    assert str(pair[1].parent).encode() not in pair[1].read_bytes()


def test_a_model_above_the_limit_of_the_format_is_refused(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ortformat, "LARGEST", 10_000)
    with pytest.raises(ModelError, match=r"has [\d,]+ bytes, .* at most 10,000; keep ONNX"):
        ortformat.convert(pair[0], tmp_path)
    assert not list(tmp_path.iterdir())


def version_9(data: bytearray) -> None:
    root = table.Table(data, encode.Get(packer.uoffset, data, 0))
    place = root.Offset(4) + root.Pos
    place += encode.Get(packer.uoffset, data, place) + 4
    assert data[place : place + 2] == b"6\0"
    data[place] = ord("9")


def half(data: bytearray) -> None:
    del data[len(data) // 2 :]


def nonsense(data: bytearray) -> None:
    data[:] = b"%PDF-1.7"


@pytest.mark.parametrize("damage", [version_9, half, nonsense])
def test_damaged_files_and_those_of_another_version_are_refused_in_one_sentence(
    pair: tuple[Path, Path], tmp_path: Path, damage: Callable[[bytearray], None], capfd: pytest.CaptureFixture[str]
) -> None:
    data = bytearray(pair[1].read_bytes())
    damage(data)
    (tmp_path / "model.ort").write_bytes(data)
    with pytest.raises(
        ModelError, match="is damaged, or was made by another version of onnxruntime than this, "
    ) as caught:
        OnnxRuntime().load(tmp_path / "model.ort")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_a_file_of_a_newer_runtime_is_refused(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    made = onnxruntime.__version__
    monkeypatch.setattr(onnxruntime, "__version__", "1.24.1")
    with pytest.raises(ModelError, match=f"needs onnxruntime >= {made}, this is 1.24.1: pip install"):
        OnnxRuntime().load(pair[1])


def test_an_exported_folder_has_the_ort_file_instead_and_runs(finished: Result, tmp_path: Path) -> None:
    out = tmp_path / "deploy"
    done = CliRunner().invoke(main, ["export", str(finished.path), str(out), "--max-drop", "90%", "--format", "ort"])
    assert done.exit_code == 0, done.output
    assert f"{(out / 'model.ort').stat().st_size:,} bytes" in done.output
    assert not (out / "model.onnx").exists()
    manifest = json.loads((out / "autolite.json").read_text())
    (artifact,) = manifest["artifacts"]
    assert artifact["files"] == ["model.ort"]
    assert artifact["requires"] == {"onnxruntime": f">={onnxruntime.__version__}"}
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()} - {"autolite.json"}
    assert manifest["sha256"] == {name: sha256(out / name) for name in files}
    assert "model.onnx" not in (out / "README.md").read_text()
    plain = finished.pick(0.9).export(tmp_path / "plain")
    for text in ("w3 great w5", "awful w1"):
        assert autolite.pipeline(str(out))(text) == autolite.pipeline(str(plain))(text)


def test_a_data_file_goes_into_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = student("bert", "text-classification", ffn="int8")
    (inside,) = OnnxRuntime().emit(made, tmp_path / "inside")
    monkeypatch.setattr(modelfile, "MAX_PROTOBUF", 10_000)
    file, _ = OnnxRuntime().emit(made, tmp_path / "beside")
    ort, _ = ortformat.convert(file, tmp_path)
    ids = np.arange(4, 12).reshape(2, 4)
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    found, expected = (OnnxRuntime().load(f).run(inputs)["logits"] for f in (ort, inside))
    np.testing.assert_array_equal(found, expected)
