"""A model's operators: what they multiply, by closed forms, and how their times are read off ONNX Runtime's trace."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from rich.console import Console

from autolite import registry
from autolite.contracts import tiny_context
from autolite.errors import ModelError
from autolite.formats import FORMATS
from autolite.measure import Timing, Workload
from autolite.report.operators import operators_table
from autolite.runtime.onnxruntime import OnnxRuntime
from autolite.runtime.operators import OTHER, Node, OperatorProfile, collect, nodes_of, within
from autolite.runtime.trace import Event, read_trace
from autolite.techniques.quantize import Quantize, QuantizeConfig

SCHEMA = Path(__file__).parents[2] / "docs" / "profile.schema.json"
PEAKS = {"fp32": 50.0, "int8": 100.0, "int4": 40.0}
BATCH, TOKENS = 2, 7
RNG = np.random.default_rng(0)


def emitted(folder: Path, family: str = "bert", task: str = "text-classification", **formats: str) -> Path:
    context = tiny_context(family, registry.get("task", task))
    student = Quantize().apply(context.teacher, QuantizeConfig(**formats), context) if formats else context.teacher
    return OnnxRuntime().emit(student, folder)[0]


def tokens(batch: int = BATCH, count: int = TOKENS) -> dict[str, np.ndarray]:
    return {"input_ids": np.full((batch, count), 5, np.int64), "attention_mask": np.ones((batch, count), np.int64)}


def traced(file: Path, inputs: Mapping[str, np.ndarray]) -> list[Node]:
    """The nodes of a single call."""
    runner = OnnxRuntime().load(file, trace=file.parent)
    runner.run(inputs)
    return list(nodes_of(read_trace(runner.end_trace()), 0.0, file))


def layer_of(rows: int, queries: int, context: int) -> int:
    """Operations of a layer of hidden width 32 whose keys and values are made for `rows` tokens, all else for
    `queries`, each of which attends to `context` tokens."""
    keys_and_values, query_and_output = 2 * rows * 32 * 64, 2 * 2 * queries * 32 * 32
    return keys_and_values + query_and_output + 2 * 2 * queries * context * 32 + 2 * 2 * queries * 32 * 64


def single_query_layer(queries: int, context: int) -> int:
    """The same where a query is multiplied with the matrix of the keys, head by head, instead of all tokens with it;
    and their mixture with the matrix of the values."""
    projections, per_head = 2 * 4 * queries * 32 * 32, 2 * 2 * queries * 4 * context * 32
    return projections + per_head + 2 * 2 * queries * 32 * 64


@pytest.mark.parametrize("form", FORMATS)
def test_a_model_in_any_format_has_the_operations_of_its_shape(form: str, tmp_path: Path) -> None:
    found = traced(emitted(tmp_path, attention=form, ffn=form), tokens())
    by_layer = {
        layer: sum(node.flops or 0 for node in found if node.layer == layer)
        for layer in ("layer.0", "layer.1", "layer.2", "head", "embedding", OTHER)
    }
    rows = BATCH * TOKENS
    # The last layer needs its first token only, for which there are two ways.
    assert by_layer.pop("layer.2") in (layer_of(rows, BATCH, TOKENS), single_query_layer(BATCH, TOKENS))
    usual, head = layer_of(rows, rows, TOKENS), 2 * BATCH * 32 * 32 + 2 * BATCH * 32 * 3
    assert by_layer == {"layer.0": usual, "layer.1": usual, "head": head, "embedding": 0, OTHER: 0}


def test_a_causal_model_has_operations_for_every_token_and_word(tmp_path: Path) -> None:
    found = traced(emitted(tmp_path, "gpt2", "language-modeling"), tokens())
    rows = BATCH * TOKENS
    assert sum(node.flops or 0 for node in found) == 3 * layer_of(rows, rows, TOKENS) + 2 * rows * 32 * 96


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def bytes_(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def codes(*shape: int) -> np.ndarray:
    return RNG.integers(-60, 61, shape, dtype=np.int8)


ONE, ZERO, CODE = np.float32(0.1), np.uint8(3), np.int8(0)
MASK = np.ones((2, 9), np.int32)
X, WEIGHT, BIAS = floats(7, 32), floats(32, 48), floats(48)
FOUR_BITS = {"K": 45, "N": 48, "bits": 4, "block_size": 32}
CASES: dict[str, tuple[str, list[np.ndarray], list[np.ndarray | None], dict[str, Any], int, str | None]] = {
    # name: operator, inputs, weights behind them, attributes, operations, peak
    "gemm": ("Gemm", [X], [WEIGHT, BIAS], {}, 2 * 7 * 32 * 48, "fp32"),
    "gemm, transposed": ("Gemm", [floats(32, 7)], [WEIGHT, BIAS], {"transA": 1}, 2 * 7 * 32 * 48, "fp32"),
    "gemm, square": ("Gemm", [floats(32, 32)], [WEIGHT, BIAS], {"transA": 1}, 2 * 32 * 32 * 48, "fp32"),
    "matmul, batched": ("MatMul", [floats(2, 7, 32)], [WEIGHT], {}, 2 * 2 * 7 * 32 * 48, "fp32"),
    "matmul, vector": ("MatMul", [floats(32)], [WEIGHT], {}, 2 * 32 * 48, "fp32"),
    "matmul of activations": ("MatMul", [floats(2, 4, 7, 8), floats(2, 4, 8, 9)], [], {}, 2 * 8 * 7 * 8 * 9, "fp32"),
    "swapped axes": (
        *("FusedMatMul", [floats(8, 4, 8)], [floats(4, 8, 32)], {"transBatchA": 1}, 2 * 4 * 8 * 8 * 32, "fp32"),
    ),
    "half precision": ("MatMul", [X.astype(np.float16)], [WEIGHT.astype(np.float16)], {}, 2 * 7 * 32 * 48, "fp32"),
    "dynamic": ("DynamicQuantizeMatMul", [X], [codes(32, 48), floats(48)], {}, 2 * 7 * 32 * 48, "int8"),
    "integers": ("MatMulInteger", [bytes_(7, 32)], [codes(32, 48), ZERO], {}, 2 * 7 * 32 * 48, "int8"),
    "integers to float": (
        *("MatMulIntegerToFloat", [bytes_(7, 32)], [codes(32, 48), ONE, ONE, ZERO, CODE, BIAS], {}),
        *(2 * 7 * 32 * 48, "int8"),
    ),
    "static": (
        *("QLinearMatMul", [bytes_(7, 32)], [ONE, ZERO, codes(32, 48), ONE, CODE, ONE, ZERO], {}),
        *(2 * 7 * 32 * 48, "int8"),
    ),
    "static gemm": (
        *("QGemm", [bytes_(7, 32)], [ONE, ZERO, codes(48, 32), ONE, CODE, np.zeros(48, np.int32), ONE, ZERO]),
        *({"transB": 1}, 2 * 7 * 32 * 48, "int8"),
    ),
    "4 bits": (
        *("MatMulNBits", [floats(2, 7, 45)], [bytes_(48, 2, 16), floats(48, 2)], FOUR_BITS),
        *(2 * 2 * 7 * 45 * 48, "int4"),
    ),
    "2 bits": (  # no peak is measured for them
        *("MatMulNBits", [floats(2, 7, 45)], [bytes_(48, 2, 8), floats(48, 2)], {**FOUR_BITS, "bits": 2}),
        *(2 * 2 * 7 * 45 * 48, None),
    ),
    "attention": (
        *("MultiHeadAttention", [floats(2, 7, 32), floats(2, 9, 32), floats(2, 9, 32)], [None, MASK], {"num_heads": 4}),
        *(2 * 2 * 7 * 9 * (32 + 32), "fp32"),
    ),
    "attention by heads": (
        *("MultiHeadAttention", [floats(2, 7, 32), floats(2, 4, 9, 8), floats(2, 4, 9, 8)], [], {"num_heads": 4}),
        *(2 * 2 * 7 * 9 * (32 + 32), "fp32"),
    ),
    "onnx attention": (
        *("onnx:Attention", [floats(2, 7, 32), floats(2, 9, 16), floats(2, 9, 16)], []),
        *({"q_num_heads": 4, "kv_num_heads": 2}, 2 * 2 * 7 * 9 * (32 + 32), "fp32"),
    ),
    "attention with projections": (
        *("Attention", [floats(2, 7, 32)], [floats(32, 96), floats(96)], {"num_heads": 4}),
        *(2 * 2 * 7 * (32 * 96 + 7 * (32 + 32)), "fp32"),
    ),
    "attention with projections, without a bias": (
        *("Attention", [floats(2, 7, 32)], [floats(32, 96)], {"num_heads": 4}),
        *(2 * 2 * 7 * (32 * 96 + 7 * (32 + 32)), "fp32"),
    ),
    "attention with narrow queries": (
        *("Attention", [floats(2, 7, 32)], [floats(32, 64), floats(64)]),
        *({"num_heads": 4, "qkv_hidden_sizes": [16, 16, 32]}, 2 * 2 * 7 * (32 * 64 + 7 * (16 + 32)), "fp32"),
    ),
    "8-bit attention": (
        *("QAttention", [bytes_(2, 7, 32)], [codes(32, 96), floats(96), ONE, ONE, None, ZERO, CODE], {"num_heads": 4}),
        *(2 * 2 * 7 * (32 * 96 + 7 * (32 + 32)), "int8"),
    ),
    "convolution": (
        *("Conv", [floats(2, 3, 16, 16)], [floats(32, 3, 4, 4), floats(32)], {"strides": [4, 4]}),
        *(2 * 2 * 32 * 4 * 4 * (3 * 4 * 4), "fp32"),
    ),
    "grouped convolution": (
        *("Conv", [floats(2, 16, 30)], [floats(32, 8, 3), floats(32)], {"group": 2}),
        *(2 * 2 * 32 * 28 * (8 * 3), "fp32"),
    ),
    "static convolution": (
        *("QLinearConv", [bytes_(2, 3, 16, 16)], [ONE, ZERO, codes(32, 3, 4, 4), ONE, CODE, ONE, ZERO]),
        *({"strides": [4, 4]}, 2 * 2 * 32 * 4 * 4 * (3 * 4 * 4), "int8"),
    ),
}
MICROSOFT = {
    "DynamicQuantizeMatMul",
    "MatMulIntegerToFloat",
    "QGemm",
    "MatMulNBits",
    "FusedMatMul",
    "MultiHeadAttention",
}
MICROSOFT |= {"Attention", "QAttention"}


def model_of(nodes: list[onnx.NodeProto], inputs: Mapping[str, np.ndarray], weights: Mapping[str, Any]) -> bytes:
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for n, a in inputs.items()
        ],
        [helper.make_empty_tensor_value_info("y")],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in weights.items()],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


@pytest.mark.parametrize("case", CASES)
def test_operations_of_one_product(case: str, tmp_path: Path) -> None:
    operator, arrays, stored, attributes, expected, peak = CASES[case]
    domain = "com.microsoft" if operator in MICROSOFT else ""
    inputs = {f"x{i}": array for i, array in enumerate(arrays)}
    weights = {f"w{i}": array for i, array in enumerate(stored) if array is not None}
    names = [*inputs, *("" if array is None else f"w{i}" for i, array in enumerate(stored))]
    node = helper.make_node(operator.removeprefix("onnx:"), names, ["y"], "layer.0/ffn/it", domain=domain, **attributes)
    file = tmp_path / "model.onnx"
    file.write_bytes(model_of([node], inputs, weights))
    counted = [node for node in traced(file, inputs) if node.flops is not None]
    assert [(node.flops, node.kernel) for node in counted] == [(expected, peak)]


def test_keys_and_values_of_the_past_count(tmp_path: Path) -> None:
    inputs = {"q": floats(1, 3, 32), "k": floats(1, 3, 16), "v": floats(1, 3, 16)}
    inputs |= {"pk": floats(1, 2, 5, 8), "pv": floats(1, 2, 5, 8)}
    inputs |= {"lengths": np.array([7], np.int32), "total": np.array(8, np.int32)}
    settings = {"num_heads": 4, "kv_num_heads": 2, "domain": "com.microsoft"}
    node = helper.make_node("GroupQueryAttention", [*inputs], ["y", "a", "b"], "gqa", **settings)
    file = tmp_path / "model.onnx"
    file.write_bytes(model_of([node], inputs, {}))
    (found,) = traced(file, inputs)
    assert found.flops == 2 * 3 * (5 + 3) * (32 + 32)


def test_nodes_that_the_runtime_renames_keep_their_layer_and_unknown_ones_are_other(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["t"], "layer.11/ffn/Gemm_3", transB=1),
        helper.make_node("Relu", ["t"], ["u"], "layer.11/ffn/Relu_4"),  # joins the product
        helper.make_node("MatMul", ["u", "v"], ["z"], "node_linear"),
        helper.make_node("Tanh", ["z"], ["y"], "lm_head/Tanh"),
    ]
    file = tmp_path / "model.onnx"
    file.write_bytes(model_of(nodes, {"x": X}, {"w": floats(48, 32), "b": BIAS, "v": floats(48, 5)}))
    found = {node.operator: (node.layer, node.part) for node in traced(file, {"x": X})}
    assert found == {"FusedGemm": ("layer.11", "ffn"), "MatMul": (OTHER, ""), "Tanh": (OTHER, "")}


# The trace


def event(name: str, operator: str, ts: int, dur: int, shape: Sequence[int] = (2, 3)) -> dict[str, Any]:
    args = {"op_name": operator, "input_type_shape": [{"float": [*shape]}], "output_type_shape": [{"float": [*shape]}]}
    return {"cat": "Node", "ts": ts, "dur": dur, "name": f"{name}_kernel_time", "args": args}


def trace_of(folder: Path, *calls: Sequence[dict[str, Any]]) -> list[list[Event]]:
    run = {"cat": "Session", "ts": 0, "dur": 1, "name": "model_run", "args": {}}
    (folder / "trace.json").write_text(json.dumps([e for call in calls for e in (*call, run)]), encoding="utf-8")
    return read_trace(folder / "trace.json")


def test_a_node_has_the_median_of_its_times_less_what_recording_costs(tmp_path: Path) -> None:
    durations = [[10, 3], [90, 3], [11, 3], [11, 3], [12, 3]]
    calls = trace_of(tmp_path, *([event("a", "Add", 0, a), event("b", "Relu", 200, b)] for a, b in durations))
    first, second = nodes_of(calls, 2.0, tmp_path / "none.onnx")
    # The trace rounds down: 3 us are 3 to 4. Of 10, 11, 11, 12 and 90, the two between 11 and 12 have the middle of
    # all, two and a half, three quarters of the way: one is below them.
    assert (first.name, first.microseconds) == ("a", pytest.approx(11.75 - 2))
    assert (second.name, second.microseconds) == ("b", pytest.approx(3.5 - 2))
    assert [node.microseconds for node in nodes_of(calls, 100.0, tmp_path / "none.onnx")] == [0, 0]


def test_nodes_do_not_take_longer_than_the_call() -> None:
    nodes = [node("Gemm", 100, None, None), replace(node("Add", 20, None, None), calls=3)]
    recording, found = within(80.0, 3.0, nodes)
    assert recording == 3 + 40 / 4
    assert [each.microseconds for each in found] == [100 - 10, 0]  # no time is negative
    assert within(130.0, 3.0, nodes) == (3, tuple(nodes))


def test_what_a_branch_runs_is_not_counted_twice(tmp_path: Path) -> None:
    inner = [event("before", "Add", 0, 5), event("a", "Add", 10, 30), event("b", "Mul", 45, 40)]
    nested = [event("inner", "If", 42, 50), event("outer", "If", 6, 100), event("after", "Add", 110, 7)]
    (call,) = trace_of(tmp_path, [*inner, *nested])
    own = {"before": 5, "a": 30, "b": 40, "inner": 50 - 40, "outer": 100 - 30 - 50, "after": 7}
    assert {e.name: e.microseconds for e in call} == own


def test_a_loop_adds_up(tmp_path: Path) -> None:
    body = [event("step", "Add", 2 + 10 * i, 5) for i in range(4)]
    calls = trace_of(tmp_path, *([[*body, event("loop", "Loop", 0, 60)]] * 3))
    loop, step = nodes_of(calls, 1.0, tmp_path / "none.onnx")
    assert (step.name, step.calls, step.microseconds) == ("step", 4, pytest.approx(4 * 5.5 - 4))
    assert (loop.name, loop.calls, loop.microseconds) == ("loop", 1, pytest.approx(60 - 20 + 0.5 - 1))


@pytest.mark.parametrize("content", ["", "{", '[{"cat": "Node"}]', "[1]"])
def test_a_trace_of_another_form_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "trace.json").write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match=r"a trace that this version of AutoLite cannot read"):
        read_trace(tmp_path / "trace.json")


# A whole profile


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> OperatorProfile:
    file = emitted(tmp_path_factory.mktemp("model"), attention="int8", ffn="int4")
    return collect(file, OnnxRuntime().load(file), tokens(), Workload(BATCH, TOKENS, 1), PEAKS, seconds=0.0)


def test_shares_of_operators_layers_and_nodes_add_up_to_one(profiled: OperatorProfile) -> None:
    data = profiled.to_json()
    for rows in (data["operators"], data["layers"], data["nodes"]):
        assert sum(row["share"] for row in rows) == pytest.approx(1)
        assert sum(row["microseconds"] for row in rows) == pytest.approx(1e3 * data["call_ms"]["operators"])
        assert sum(row["calls"] for row in rows) == len(data["nodes"])


def test_every_layer_is_there_with_its_parts(profiled: OperatorProfile) -> None:
    found = {row.name: (row, parts) for row, parts in profiled.layers()}
    assert [name for name in found if name != OTHER] == ["embedding", "layer.0", "layer.1", "layer.2", "head"]
    for name, (row, parts) in found.items():
        assert set(parts) == ({"attention", "ffn"} if name.startswith("layer.") else set())
        if parts:
            assert sum(parts.values()) == pytest.approx(row.microseconds)


def test_the_json_is_what_the_schema_promises(profiled: OperatorProfile) -> None:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads(json.dumps(profiled.to_json(), allow_nan=False)), schema)


def test_nothing_is_left_behind(profiled: OperatorProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    file = Path(profiled.model)
    collect(file, OnnxRuntime().load(file), tokens(), Workload(BATCH, TOKENS, 1), PEAKS, seconds=0.0)
    assert [path.name for path in tmp_path.iterdir()] == ["autolite-locks"]
    assert [path.name for path in file.parent.iterdir()] == ["model.onnx"]


def synthetic(*nodes: Node, calls: Sequence[float] = (0.1, 0.1), empty: float = 0.02) -> OperatorProfile:
    timing = Timing(tuple((ms,) for ms in calls))
    return OperatorProfile("m", "onnxruntime", "1", Workload(), {}, timing, timing, empty, 0.0, PEAKS, nodes)


def node(operator: str, microseconds: float, flops: int | None, kernel: str | None) -> Node:
    return Node(operator, operator, OTHER, "", 1, microseconds, flops, kernel, (), ())


def test_a_call_is_disturbed_if_its_times_differ_or_nothing_explains_them() -> None:
    alone = node("Add", 80, None, None)
    assert not synthetic(alone).disturbed
    assert synthetic(alone, calls=(0.1, 0.13) * 10).disturbed
    assert synthetic(alone, calls=(0.2, 0.2)).disturbed
    assert not synthetic(alone, calls=(0.2, 0.2), empty=0.12).disturbed  # what the runtime takes explains it


def test_rates_are_of_the_products_alone_and_each_is_held_against_its_own_peak() -> None:
    parts = [node("Gemm", 30, 600_000, "fp32"), node("QGemm", 10, 500_000, "int8"), node("Add", 60, None, None)]
    profile = synthetic(*parts)
    whole = profile.row("all", parts)
    assert (whole.microseconds, whole.share) == (100, 1)
    assert whole.gflops == pytest.approx((600_000 + 500_000) / 40e-6 / 1e9)
    # At best they take 600000 / 50e9 s = 12 us and 500000 / 100e9 s = 5 us.
    assert whole.peak_share == pytest.approx((12 + 5) / 40)
    gemm, add = profile.row("Gemm", parts[:1]), profile.row("Add", parts[2:])
    assert (gemm.gflops, gemm.peak_share) == (pytest.approx(20), pytest.approx(0.4))
    assert (add.gflops, add.peak_share) == (None, None)
    unknown = profile.row("f", [node("MatMulNBits", 10, 100_000, None)])
    assert (unknown.gflops, unknown.peak_share) == (pytest.approx(10), None)


def printed(profile: OperatorProfile, **how: Any) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(operators_table(profile, **how))
    return str(capture.get())


def test_the_table_adds_up_what_it_does_not_show() -> None:
    profile = synthetic(*(node(f"Op{i}", 10.0 * (5 - i), None, None) for i in range(5)))
    text = printed(profile, top=2)
    assert "Op0" in text
    assert "Op1" in text
    assert "Op2" not in text
    assert any(line.split() == ["3", "others", "60", "40.0%"] for line in text.splitlines())


def test_tables_by_layer_and_node(profiled: OperatorProfile) -> None:
    layers = printed(profiled, by="layer")
    for name in ("embedding", "layer.0", "layer.2", "head"):
        assert name in layers
    nodes = printed(profiled, by="node", top=500)
    for each in profiled.nodes:
        assert each.name in nodes
    assert f"float[{BATCH * TOKENS},32]" in nodes  # what a node gives
