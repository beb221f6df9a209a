"""Weights in their number formats as ONNX nodes: products with a matrix, and rows looked up in a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from onnx import TensorProto

from autolite.errors import ModelError
from autolite.formats import GROUP, Encoded, encode
from autolite.parts import Matrix
from autolite.runtime.graph import CONTRIB, Graph

Rows = tuple[int, int]


def linear(
    graph: Graph,
    x: str,
    matrices: Sequence[Matrix],
    encoded: Mapping[str, Encoded],
    rows: Rows | None = None,
    table: bool = False,
) -> str:
    """Multiply `x` [tokens, k] with matrices [n, k] of one format, merged along n, and add their biases.

    Merging joins the codes that each matrix already has. `rows` keeps only these rows of the merged matrix; the slice
    is of a constant, which runtimes compute once when they load the model, so that layers which share the matrix but
    use other rows of it still store it once. `table` says that the matrix is also looked up as an embedding table,
    and is stored as one.
    """
    parts = [_encoded(m, encoded) for m in matrices]
    formats = {p.format for p in parts}
    if len(formats) > 1:
        names = ", ".join(m.key for m in matrices)
        raise ModelError(f"{names} are merged into one product and need one number format, got {sorted(formats)}")
    n, k = sum(p.shape[0] for p in parts), parts[0].shape[1]
    merged = {name: torch.cat([p.tensors[name] for p in parts]) for name in parts[0].tensors}
    bias = ""
    if any(m.bias is not None for m in matrices):
        bias = graph.constant(
            torch.cat([torch.zeros(m.weight.shape[0]) if m.bias is None else m.bias for m in matrices])
        )

    def some(value: str, axis: int = 0) -> str:
        return value if rows is None or not value else _slice(graph, value, rows, axis)

    match formats.pop():
        case "fp32":
            weight = some(graph.constant(merged["values"]))
        case "kmeans4":
            weight = some(_codebook(graph, merged, k))
        case "int8":
            codes = merged["codes"]
            stored = graph.constant(codes if table else codes.T)
            inner_first = graph.op("Transpose", stored, perm=(1, 0)) if table else stored
            scales = some(graph.constant(merged["scales"]))
            return graph.op("DynamicQuantizeMatMul", x, some(inner_first, 1), scales, "", some(bias), domain=CONTRIB)
        case "int4":
            groups = merged["scales"].shape[1]
            stored = graph.constant(merged["codes"])
            blocks = graph.op("Reshape", stored, graph.constant([n, groups, GROUP // 2]))
            scales = some(graph.constant(merged["scales"]))
            settings = {"K": k, "N": n if rows is None else rows[1] - rows[0], "bits": 4, "block_size": GROUP}
            # Level 4 quantizes the activations to 8 bits: the only one that is faster than float32 products.
            inputs = (x, some(blocks), scales, "", "", some(bias))
            return graph.op("MatMulNBits", *inputs, domain=CONTRIB, accuracy_level=4, **settings)
        case other:
            raise ModelError(f"ONNX Runtime has no product with a matrix in the format '{other}'")
    return graph.op("Gemm", x, weight, *([some(bias)] if bias else []), transB=1)


def lookup(graph: Graph, ids: str, table: Matrix, encoded: Mapping[str, Encoded]) -> str:
    """Look up `ids` [tokens] in a table [rows, width]: float32 [tokens, width]. Only the rows asked for are decoded."""
    stored = _encoded(table, encoded)
    tensors, width = stored.tensors, stored.shape[1]
    match stored.format:
        case "fp32":
            return graph.op("Gather", graph.constant(tensors["values"]), ids)
        case "int8":
            codes = graph.op("Cast", graph.op("Gather", graph.constant(tensors["codes"]), ids), to=TensorProto.FLOAT)
            scales = graph.op("Gather", graph.constant(tensors["scales"]), ids)
            return graph.op("Mul", codes, graph.op("Unsqueeze", scales, graph.constant([1])))
        case "int4":
            # With uint8 codes this takes 26 us for 64 rows of 384; with the uint4 type 187 us.
            inputs = (graph.constant(tensors["codes"]), ids, graph.constant(tensors["scales"]))
            settings = {"bits": 4, "block_size": GROUP, "gather_axis": 0, "quantize_axis": 1}
            found = graph.op("GatherBlockQuantized", *inputs, domain=CONTRIB, **settings)
            return found if width % GROUP == 0 else _slice(graph, found, (0, width), 1)
        case other:
            raise ModelError(f"rows of a table in the format '{other}' cannot be looked up; use fp32, int8 or int4")


def _encoded(matrix: Matrix, encoded: Mapping[str, Encoded]) -> Encoded:
    """Return what stands for the matrix: its entry in `encoded` (its rows of it), or itself in float32."""
    found = encoded.get(matrix.key)
    if found is None:
        return encode(matrix.weight, "fp32")
    if matrix.rows is not None:  # part of a fused matrix: decoding row ranges is exact, every format works by rows
        start, stop = matrix.rows
        found = Encoded(
            found.format, (stop - start, found.shape[1]), {k: t[start:stop] for k, t in found.tensors.items()}
        )
    if found.shape != tuple(matrix.weight.shape):
        raise ModelError(
            f"{matrix.key} was encoded as {found.shape}, but the model's is {tuple(matrix.weight.shape)}; "
            "quantize after the model has its final shape"
        )
    return found


def _codebook(graph: Graph, tensors: Mapping[str, torch.Tensor], k: int) -> str:
    """Decode kmeans4 to [n, k] with constant inputs only, so that runtimes fold it when they load the model."""
    codes = graph.op("Cast", graph.constant(tensors["codes"], uint4=True), to=TensorProto.INT32)
    levels = graph.op("Cast", graph.constant(tensors["codebook"]), to=TensorProto.FLOAT)
    scales = graph.op("Unsqueeze", graph.constant(tensors["scales"]), graph.constant([1]))
    weight = graph.op("Mul", graph.op("GatherElements", levels, codes, axis=1), scales)
    return weight if k % 2 == 0 else _slice(graph, weight, (0, k), 1)


def _slice(graph: Graph, value: str, rows: Rows, axis: int) -> str:
    start, stop = (graph.constant([edge]) for edge in rows)
    return graph.op("Slice", value, start, stop, graph.constant([axis]))
