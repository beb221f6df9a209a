"""Models say what they need of ONNX Runtime, and what cannot be loaded or called is refused in one clear sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from autolite.architecture import shape_of
from autolite.errors import ModelError
from autolite.runtime import modelfile, session
from autolite.runtime.emit import emit
from autolite.runtime.graph import CONTRIB, OPSET, Graph
from autolite.runtime.onnxruntime import OnnxRuntime
from autolite.runtime.requirements import CODES, REQUIRES, first_release, metadata_of, required
from autolite.saturation import saturates
from autolite.techniques.base import Student
from autolite.techniques.quantize import Quantize, QuantizeConfig
from autolite.testing import tiny_model

INPUTS = {
    "input_ids": np.array([[5, 6, 7, 8], [9, 10, 1, 1]], np.int64),
    "attention_mask": np.array([[1, 1, 1, 1], [1, 1, 0, 0]], np.int64),
}
IDS = INPUTS["input_ids"]


def student(family: str = "bert", **formats: str) -> Student:
    model = tiny_model(family)
    plain = Student(model, shape_of(model))
    return Quantize().apply(plain, QuantizeConfig(**formats), None) if formats else plain  # type: ignore[arg-type]


def load(file: Path) -> Any:
    return OnnxRuntime().load(file)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emit(student(), tmp_path_factory.mktemp("model"))[0]


# What a model needs


def test_a_model_says_what_it_needs(tmp_path: Path) -> None:
    (file,) = emit(student(attention="int8", ffn="int4"), tmp_path)
    loaded = onnx.load(file)
    metadata = {entry.key: entry.value for entry in loaded.metadata_props}
    said = json.loads(metadata[REQUIRES])
    assert said["opset"] == loaded.opset_import[0].version == OPSET
    used = {(node.domain or "ai.onnx", node.op_type) for node in loaded.graph.node}
    assert {(domain, name) for domain, names in said["operators"].items() for name in names} == used
    assert required(file) == {"onnxruntime": f">={said['onnxruntime']}", "opset": OPSET}
    load(file)  # and this runtime has it


def node(kind: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, ["x"], ["y"], domain=CONTRIB, **attributes)


@pytest.mark.parametrize(
    ("opset", "nodes", "release"),
    [
        (17, [], "1.16.0"),
        (21, [], "1.18.0"),
        (23, [], "1.23.0"),
        (23, [node("MultiHeadAttention")], "1.23.0"),
        (23, [node("Attention"), node("MatMulNBits", bits=4)], "1.23.1"),
        (21, [node("MatMulNBits", bits=4)], "1.19.0"),
        (21, [node("MatMulNBits", bits=8)], "1.22.0"),
        (24, [], "1.24.1"),
        (27, [], "1.32.0"),
    ],
)
def test_the_first_release_is_that_of_the_newest_part(opset: int, nodes: list[onnx.NodeProto], release: str) -> None:
    assert first_release(opset, nodes) == release


def test_an_older_runtime_is_told_to_be_renewed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = json.loads(metadata_of(model)[REQUIRES])["onnxruntime"]
    monkeypatch.setattr(onnxruntime, "__version__", "1.22.1")
    with pytest.raises(ModelError, match=f"needs onnxruntime >= {needs}, this is 1.22.1: pip install 'onnxruntime>="):
        load(model)
    monkeypatch.setattr(onnxruntime, "__version__", f"{needs}.dev20260101+cpu")
    load(model)


# Sums of 8-bit products, which x86 processors without VNNI cut to 16 bits if weights have a sign


def made_of(codes: np.ndarray, uses: Callable[[Graph, str], list[str]], folder: Path) -> tuple[Path, np.ndarray]:
    """A model whose inputs 0, 1, 2 are rows of whole numbers up to 255, multiplied with what `uses` makes of codes
    [64, 8]; and these rows, which quantization to 8 bits leaves as they are."""
    rows = np.random.default_rng(0).integers(100, 256, (3, 64)).astype(np.float32)
    rows[:, 0], rows[:, 1] = 0, 255
    graph = Graph()
    x = graph.op("Gather", graph.constant(rows), graph.op("Reshape", "ids", graph.constant([-1])))
    scales = graph.constant(np.ones(8, np.float32))
    made = [
        graph.op("DynamicQuantizeMatMul", x, weight, scales, domain=CONTRIB)
        for weight in uses(graph, graph.constant(codes))
    ]
    value = made[0] if len(made) == 1 else graph.op("Concat", *made, axis=1)
    ids = (np.dtype(np.int64), ["batch", "tokens"])
    (file,) = graph.save(folder / "model.onnx", {"ids": ids}, (value, "y", ["rows", "n"]))
    return file, rows


def transposed_twice(graph: Graph, codes: str) -> list[str]:
    return [graph.op("Transpose", graph.op("Transpose", codes, perm=(1, 0)), perm=(1, 0))]


def sliced(graph: Graph, codes: str) -> list[str]:
    return [graph.slice(codes, (0, 8), 1)]


USES = {
    "direct": lambda graph, codes: [codes],
    "transposed": transposed_twice,
    "sliced": sliced,
    "distinct": lambda graph, codes: [graph.distinct(codes, 1), graph.distinct(codes, 1)],
    "shared": lambda graph, codes: [codes, graph.op("Identity", codes)],
}


def codes_of(largest: int) -> np.ndarray:
    found = np.random.default_rng(1).integers(largest // 2, largest, (64, 8)).astype(np.int8)
    found[0] = -largest
    return found


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("largest", [127, 64])
def test_products_of_8_bit_weights_are_exact_on_every_processor(use: str, largest: int, tmp_path: Path) -> None:
    codes = codes_of(largest)
    file, rows = made_of(codes, USES[use], tmp_path)
    runner = load(file)
    found = runner.run({"ids": np.arange(3)[None]})["y"]
    if runner.overflow:  # ONNX Runtime converts no weights that are shared
        assert use == "shared"
        assert saturates()
        assert largest == 127
    else:
        np.testing.assert_array_equal(found[:, :8], rows @ codes.astype(np.float32))
        np.testing.assert_array_equal(found[:, -8:], rows @ codes.astype(np.float32))


@pytest.mark.parametrize("overflows", [True, False])
def test_weights_are_converted_only_where_their_products_would_overflow(
    overflows: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "saturates", lambda: overflows)
    file, _ = made_of(codes_of(127), USES["direct"], tmp_path)
    made, overflow = session.opened(str(file), 1)
    asked = made.get_session_options().get_session_config_entry("session.x64quantprecision")
    assert (asked, overflow) == ("1" if overflows else "0", False)


@pytest.mark.parametrize("use", USES)
def test_a_model_tells_whether_its_weights_can_overflow(use: str, tmp_path: Path) -> None:
    assert metadata_of(made_of(codes_of(65), USES[use], tmp_path)[0])[CODES] == "s8"
    assert CODES not in metadata_of(made_of(codes_of(64), USES[use], tmp_path)[0])


def test_weights_that_are_looked_up_or_have_no_sign_do_not_overflow(tmp_path: Path) -> None:
    graph = Graph()
    ids = graph.op("Reshape", "ids", graph.constant([-1]))
    x = graph.op("Cast", graph.op("Gather", graph.constant(codes_of(127)), ids), to=TensorProto.FLOAT)
    unsigned = graph.constant(np.full((8, 4), 255, np.uint8))
    y = graph.op("DynamicQuantizeMatMul", x, unsigned, graph.constant(np.ones(4, np.float32)), domain=CONTRIB)
    inputs = {"ids": (np.dtype(np.int64), ["batch", "tokens"])}
    (file,) = graph.save(tmp_path / "model.onnx", inputs, (y, "y", ["rows", 4]))
    assert CODES not in metadata_of(file)


def test_an_emitted_model_runs_in_plain_onnx_runtime(tmp_path: Path) -> None:
    (file,) = emit(student(attention="int8", ffn="int4", embedding="int8", head="kmeans4"), tmp_path)
    options = onnxruntime.SessionOptions()
    if metadata_of(file).get(CODES) == "s8" and saturates():  # as the README says
        options.add_session_config_entry("session.x64quantprecision", "1")
    plain = onnxruntime.InferenceSession(str(file), options)
    feed = INPUTS | {"token_type_ids": np.zeros_like(IDS)}
    np.testing.assert_array_equal(plain.run(["logits"], feed)[0], load(file).run(feed)["logits"])


# Files that cannot be loaded


def operator(domain: str, kind: str, **attributes: Any) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
        made = helper.make_node(kind, ["x"], ["y"], domain=domain, **attributes)
        opsets = [helper.make_opsetid(d, v) for d, v in (("", 20), ("elsewhere", 1), (CONTRIB, 1))]
        graph = helper.make_graph([made], "g", values[:1], values[1:])
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), file)

    return write


def without_kernel(file: Path) -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.STRING, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "g", values[:1], values[1:])
    file.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]).SerializeToString())


def cut(share: float) -> Callable[[Path], None]:
    return lambda file: (data := file.read_bytes()) and file.write_bytes(data[: int(share * len(data))]) and None


def content(data: bytes) -> Callable[[Path], None]:
    return lambda file: file.write_bytes(data) and None


def broken_inside(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2 :] = bytes(range(256)) * 1000
    file.write_bytes(data[: file.stat().st_size])


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (operator("elsewhere", "Secret"), "has no operator elsewhere:Secret .*pip install -U onnxruntime"),
        (operator(CONTRIB, "MatMulDreams"), "has no operator com.microsoft:MatMulDreams"),
        (operator("", "Dream"), "has no operator Dream"),
        (operator("", "Gelu", exactness=3), "has no operator Gelu as it is used there"),
        (cut(0.5), r"truncated, [\d,]+ of at least [\d,]+ bytes; export or copy it again"),
        (cut(0.99), "truncated"),
        (content(b""), "not an ONNX model"),
        (content(b"%PDF-1.7 not a model"), "not an ONNX model"),
        (content(b'{"fake": 2}'), "not an ONNX model"),
        (content(bytes(1000)), "not an ONNX model"),
        (broken_inside, "it is damaged, or not a model that onnxruntime"),
        (Path.unlink, "there is no model at"),
        (folder, "is a folder; give the model in it, as in .*model.onnx"),
    ],
)
def test_damaged_and_foreign_files_are_refused_in_one_sentence(
    model: Path, tmp_path: Path, damage: Callable[[Path], None], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(model.read_bytes())
    damage(file)
    with pytest.raises(ModelError, match=message) as caught:
        load(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


# Calls that do not fit

LONG = np.array([[2**40, 1, 1, 1], [1, 1, 1, 1]], np.uint64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"attention_mask": None},
            r"attention_mask is missing: .* attention_mask int64 \[batch, tokens\].* input_ids$",
        ),
        ({"input_ids": None, "ids": IDS}, "input_ids is missing: .* was given attention_mask, ids"),
        ({"input_ids": IDS.astype(np.float32)}, "input_ids is float32, but the model takes int64"),
        ({"attention_mask": LONG * 2**23}, "attention_mask is uint64, but the model takes int64"),
        ({"input_ids": IDS[0]}, r"input_ids has rank 1, \[4\], but the model takes input_ids int64 \[batch, tokens\]"),
        ({"attention_mask": IDS[:, :3]}, r"attention_mask is \[2, 3\], .* with tokens = 4 as in the inputs before it"),
        ({"input_ids": IDS + 1000}, r"failed on input_ids \[2, 4\].*out of data bounds"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_in_one_sentence(
    model: Path, changes: dict[str, np.ndarray | None], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    inputs = {name: array for name, array in (INPUTS | changes).items() if array is not None}
    with pytest.raises(ModelError, match=message) as caught:
        load(model).run(inputs)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.uint64])
def test_whole_numbers_of_another_width_are_converted(model: Path, dtype: Any) -> None:
    runner = load(model)
    narrow = {name: array.astype(dtype) for name, array in INPUTS.items()}
    np.testing.assert_array_equal(runner.run(narrow)["logits"], runner.run(INPUTS)["logits"])
    masked = INPUTS | {"attention_mask": INPUTS["attention_mask"].astype(bool), "unknown": IDS}
    np.testing.assert_array_equal(runner.run(masked)["logits"], runner.run(INPUTS)["logits"])


# Weights beside the model


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    monkeypatch.setattr(modelfile, "MAX_PROTOBUF", 10_000)
    file, data = emit(student(), tmp_path)
    return file, data


def test_weights_beside_the_model_are_those_of_the_model(large: tuple[Path, Path], model: Path) -> None:
    file, _ = large
    np.testing.assert_array_equal(load(file).run(INPUTS)["logits"], load(model).run(INPUTS)["logits"])
    inside, beside = (
        {t.name: numpy_helper.to_array(t, str(f.parent)) for t in onnx.load(f).graph.initializer} for f in (model, file)
    )
    assert inside.keys() == beside.keys()
    assert all((inside[name] == beside[name]).all() for name in inside)
    onnx.checker.check_model(str(file))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, r"its weights are in model\.onnx\.data \([\d,]+ bytes\), which is not beside it; copy both"),
        (cut(0.5), r"model\.onnx\.data is truncated, [\d,]+ of [\d,]+ bytes"),
    ],
)
def test_missing_weights_are_refused_in_one_sentence(
    large: tuple[Path, Path], damage: Callable[[Path], None], message: str
) -> None:
    file, data = large
    size = f"{data.stat().st_size:,}"
    damage(data)
    with pytest.raises(ModelError, match=message) as caught:
        load(file)
    assert size in str(caught.value)
