"""One product and one lookup in every format, in ONNX Runtime, against the reference arithmetic in numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from autolite.errors import ModelError
from autolite.formats import FORMATS, decode, encode
from autolite.linear_grids import Linear
from autolite.parts import Matrix
from autolite.runtime.graph import Graph
from autolite.runtime.linear import KERNELS, OVERFLOWING, blocks_lookup, lookup, product, products, weights_of
from autolite.runtime.onnxruntime import OnnxRuntime

widths = pytest.mark.parametrize("k", [64, 45, 7], ids="k={}".format)
kernels = pytest.mark.parametrize(("form", "kernel"), [(f, k) for f in FORMATS for k in KERNELS[f]])
SIGNS = {form: [False, True] if form in OVERFLOWING else [False] for form in FORMATS}  # stored without a sign too
SPAN = (-3.0, 4.0)  # a calibrated range that clips a little
IDS = {"ids": (np.dtype(np.int64), ["batch", "tokens"])}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def matrix(key: str, n: int, k: int, bias: bool = True, seed: int = 0) -> Matrix:
    return Matrix(key, normal(n, k, seed=seed), normal(n, seed=seed + 1) if bias else None)


def run(graph: Graph, value: str, ids: np.ndarray, folder: Path) -> np.ndarray:
    """Run a graph whose only input are ids [batch, tokens]."""
    (file,) = graph.save(folder / "model.onnx", IDS, (value, "y", ["rows", "n"]))
    return OnnxRuntime().load(file).run({"ids": ids})["y"]


def rows_of(graph: Graph, table: torch.Tensor) -> str:
    ids = graph.op("Reshape", "ids", graph.constant([-1]))
    return graph.op("Gather", graph.constant(table), ids)


def quantized_activations(x: torch.Tensor, form: str, kernel: str) -> torch.Tensor:
    """What the kernel multiplies with, by the definitions of ONNX and of MatMulNBits' accuracy level 4."""
    if kernel == "int8":  # 8 bits without sign over the whole tensor, zero included
        low, high = SPAN if form == "int8-static" else (min(float(x.min()), 0.0), max(float(x.max()), 0.0))
        scale = (high - low) / 255
        zero = round(-low / scale)
        return ((x / scale).round() + zero).clamp(0, 255).sub(zero) * scale
    if kernel == "blocks":  # 8 bits with sign for each row and group
        layout = FORMATS[form].layout
        assert isinstance(layout, Linear)
        padded = torch.nn.functional.pad(x, (0, -x.shape[1] % layout.group)).reshape(len(x), -1, layout.group)
        steps = padded.abs().amax(dim=2, keepdim=True) / 127
        rounded: torch.Tensor = torch.where(steps > 0, (padded / steps).round() * steps, padded)
        return rounded.flatten(1)[:, : x.shape[1]]
    return x


def multiplied(weight: torch.Tensor, form: str, kernel: str) -> torch.Tensor:
    """The matrix that the kernel multiplies with: 4 bits are rounded once more, to 7, for the int8 kernel."""
    return decode(encode(weight, "int7")) if kernel == "int8" and FORMATS[form].bits < 8 else weight


@pytest.mark.parametrize(
    ("form", "kernel", "unsigned"), [(f, k, u) for f in FORMATS for k in KERNELS[f] for u in SIGNS[f]]
)
@widths
def test_merged_products_compute_with_the_decoded_matrices(
    form: str, kernel: str, unsigned: bool, k: int, tmp_path: Path
) -> None:
    parts = [matrix("q", 16, k), matrix("k", 8, k, bias=False, seed=2), matrix("v", 8, k, seed=4)]
    encoded = {m.key: encode(m.weight, form) for m in parts}
    table, ids = normal(50, k, seed=9), np.arange(12, dtype=np.int64).reshape(3, 4)
    graph = Graph()
    weights = weights_of(parts, encoded, {"q": SPAN}, unsigned=unsigned)
    x = rows_of(graph, table)
    both = [product(graph, x, weights, kernel, rows) for rows in (None, (8, 24))]
    found = run(graph, graph.op("Concat", *both, axis=1), ids, tmp_path)
    weight = multiplied(torch.cat([decode(encoded[m.key]) for m in parts]), form, kernel)
    bias = torch.cat([torch.zeros(len(m.weight)) if m.bias is None else m.bias for m in parts])
    expected = quantized_activations(table[:12], form, kernel) @ weight.T + bias
    np.testing.assert_allclose(found, torch.cat((expected, expected[:, 8:24]), 1), atol=2e-5 * k)


@kernels
def test_products_apart_are_the_merged_product_split(form: str, kernel: str, tmp_path: Path) -> None:
    parts = [matrix("q", 16, 64), matrix("k", 8, 64, bias=False, seed=2), matrix("v", 8, 64, seed=4)]
    encoded = {m.key: encode(m.weight, form) for m in parts}
    ranges = {m.key: SPAN for m in parts}
    ids = np.arange(12, dtype=np.int64).reshape(3, 4)
    graph = Graph()
    x = rows_of(graph, normal(50, 64, seed=9))
    apart = products(graph, x, [weights_of([m], encoded, ranges, unsigned=True) for m in parts], kernel)
    merged = product(graph, x, weights_of(parts, encoded, ranges, unsigned=True), kernel)
    both = graph.op("Concat", graph.op("Concat", *apart, axis=1), merged, axis=1)
    found = run(graph, both, ids, tmp_path)
    np.testing.assert_allclose(found[:, :32], found[:, 32:], atol=1e-4)
    quantizers = {"DynamicQuantizeLinear", "QuantizeLinear"}
    nodes = [n.op_type for n in onnx.load(tmp_path / "model.onnx").graph.node]
    assert sum(node in quantizers for node in nodes) <= 2  # one for all three, one more for the merged


@kernels
def test_layers_that_use_other_rows_of_a_matrix_store_it_once(form: str, kernel: str, tmp_path: Path) -> None:
    m, k = matrix("m", 64, 64, bias=False), 64
    encoded = {"m": encode(m.weight, form)}
    graph = Graph()
    x = rows_of(graph, normal(5, k))
    weights = weights_of([m], encoded, {"m": SPAN})
    value = product(graph, x, weights, kernel)
    for rows in ((0, 64), (0, 64)):
        value = graph.op("Add", product(graph, x, weights, kernel, rows), value)
    (file,) = graph.save(tmp_path / "model.onnx", IDS, (value, "y", ["rows", 64]))
    stored = sum(len(t.raw_data) for t in onnx.load(file).graph.initializer)
    assert stored < encoded["m"].nbytes + 5 * k * 4 + 256  # the small rest are shapes


LOOKUPS = [
    (name, option, unsigned)
    for name, form in FORMATS.items()
    if form.embedding
    for option in (("blocks", "plain") if blocks_lookup(form) else ("plain",))
    for unsigned in SIGNS[name]
]


@pytest.mark.parametrize(("form", "option", "unsigned"), LOOKUPS)
@widths
def test_a_lookup_decodes_the_rows_asked_for(form: str, option: str, unsigned: bool, k: int, tmp_path: Path) -> None:
    m = Matrix("words", normal(40, k))
    ids = np.array([[0, 39, 7], [7, 7, 1]], np.int64)
    graph = Graph()
    encoded = {"words": encode(m.weight, form)}
    value = lookup(graph, graph.op("Reshape", "ids", graph.constant([-1])), m, encoded, unsigned, option)
    found = run(graph, value, ids, tmp_path)
    np.testing.assert_allclose(found, decode(encoded["words"])[ids.reshape(-1)], rtol=1e-6)


@pytest.mark.parametrize(("form", "kernel"), [(f, k) for f in FORMATS for k in KERNELS[f] if FORMATS[f].embedding])
def test_a_table_that_is_also_the_head_is_stored_once(form: str, kernel: str, tmp_path: Path) -> None:
    m, norm = Matrix("words", normal(40, 64)), normal(64, seed=1)
    encoded = {"words": encode(m.weight, form)}
    ids = np.array([[3, 5, 39]], np.int64)
    for unsigned in SIGNS[form]:
        graph = Graph()
        x = lookup(graph, graph.op("Reshape", "ids", graph.constant([-1])), m, encoded, unsigned)
        x = graph.op("Mul", x, graph.constant(norm))
        value = product(graph, x, weights_of([m], encoded, table=True, unsigned=unsigned), kernel)
        found = run(graph, value, ids, tmp_path)
        weight = decode(encoded["words"])
        expected = quantized_activations(weight[ids[0]] * norm, form, kernel) @ multiplied(weight, form, kernel).T
        np.testing.assert_allclose(found, expected, atol=1e-3)
        stored = sum(len(t.raw_data) for t in onnx.load(tmp_path / "model.onnx").graph.initializer)
        assert stored - encoded["words"].nbytes - 4 * 64 < 200  # shapes, and levels that are the format's


@pytest.mark.parametrize(("kernel", "operator"), [("float", "Gemm"), ("int8", "DynamicQuantizeMatMul")])
def test_a_codebook_is_decoded_when_the_model_is_loaded_and_not_again(
    kernel: str, operator: str, tmp_path: Path
) -> None:
    m = matrix("m", 64, 64)
    graph = Graph()
    weights = weights_of([m], {"m": encode(m.weight, "kmeans4")})
    value = product(graph, rows_of(graph, normal(5, 64)), weights, kernel, rows=(0, 32))
    (file,) = graph.save(tmp_path / "model.onnx", IDS, (value, "y", ["rows", 32]))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(file), options)
    assert {n.op_type for n in onnx.load(tmp_path / "loaded.onnx").graph.node} <= {"Reshape", "Gather", operator}


def test_what_cannot_be_multiplied_or_looked_up_is_refused_by_name() -> None:
    first, second = matrix("a", 8, 32), matrix("b", 8, 32)
    codes = {"a": encode(first.weight, "int8")}
    with pytest.raises(ModelError, match=r"a, b .* one number format, got \['fp32', 'int8'\]"):
        weights_of([first, second], codes)
    with pytest.raises(ModelError, match=r"'int8-static' cannot be looked up; use one of fp32, .* kmeans4"):
        lookup(Graph(), "ids", first, {"a": encode(first.weight, "int8-static")})
    with pytest.raises(ModelError, match=r"a was encoded as \(8, 32\)"):
        weights_of([matrix("a", 4, 32)], codes)
    with pytest.raises(ModelError, match="'blocks' cannot multiply the format 'int8'"):
        product(Graph(), "x", weights_of([first], codes), "blocks")
    with pytest.raises(ModelError, match="a are in int8-static but have no calibrated range"):
        weights_of([first], {"a": encode(first.weight, "int8-static")})
