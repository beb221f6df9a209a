"""Weights in their number formats as ONNX nodes: products with a matrix, and rows looked up in a table.

A format can be multiplied by several kernels (`KERNELS`), which agree within the format's own rounding:

    float   32-bit products; weights that are not in float32 are decoded once, when the runtime loads the model
    int8    8-bit integers: activations are quantized to unsigned codes, by the range of each call or by a calibrated
            one. Weights of 4 bits are decoded, when the model is loaded, to the 7-bit codes that overflow nowhere
    blocks  ONNX Runtime's MatMulNBits, which reads the codes as they are stored: fast for a few rows. Activations are
            quantized to 8 bits by row and group (its accuracy level 4)
    blocks-float  the same with activations in floating point (accuracy level 1)
    rounded what other runtimes recognise as a product of 8-bit integers and compute as one: "float" of inputs that were
            quantized and dequantized again
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from onnx import TensorProto

from autolite.errors import ModelError
from autolite.formats import FORMATS, GROUP, INT7, Encoded, encode
from autolite.parts import Matrix
from autolite.runtime.graph import CONTRIB, Graph
from autolite.techniques.calibrate import grid

Rows = tuple[int, int]

# By format: the kernels that can multiply it, the usual one first.
KERNELS: dict[str, tuple[str, ...]] = {
    "fp32": ("float",),
    "bf16": ("float",),
    "int8": ("int8",),
    "int8-static": ("int8",),
    "int8-weight": ("float",),
    "int7": ("int8",),
    "int4": ("blocks", "blocks-float", "int8", "float"),
    "kmeans4": ("int8", "float"),
}
# 8-bit codes of these formats fill their range: two products of such with 8-bit activations do not fit in 16 bits.
OVERFLOWING = ("int8", "int8-static")


@dataclass(frozen=True)
class Weights:
    """Matrices [n, k] of one format merged along n, as codes that are ready to be stored.

    `table` says that the matrix is also looked up as an embedding table, and is stored as one; `span` is the
    calibrated range of the inputs, for formats that have one; `unsigned` says that 128 was added to 8-bit codes.
    `delta` are the factors down [rank, k] and up [n, rank] whose product is added to the matrix: two thin products in
    float32, whatever kernel multiplies with the matrix itself. What a layer adds to the bias is in `bias`.
    """

    format: str
    n: int
    k: int
    tensors: Mapping[str, torch.Tensor]
    bias: torch.Tensor | None
    span: tuple[float, float] | None = None
    table: bool = False
    unsigned: bool = False
    delta: tuple[Weights, Weights] | None = None


def weights_of(
    matrices: Sequence[Matrix],
    encoded: Mapping[str, Encoded],
    ranges: Mapping[str, tuple[float, float]] | None = None,
    table: bool = False,
    unsigned: bool = False,
) -> Weights:
    """Merge matrices [n, k] of one format along n. `unsigned` stores 8-bit codes without a sign, for processors on
    which products of signed ones overflow; codes of 7 bits never do.

    Raises:
        ModelError: if their formats differ, an encoded matrix has not the model's shape, or several of them have
            low-rank differences, which do not merge.
    """
    parts = [encoded_of(encoded, m) for m in matrices]
    names = ", ".join(m.key for m in matrices)
    formats = {p.format for p in parts}
    if len(formats) > 1:
        raise ModelError(f"{names} are merged into one product and need one number format, got {sorted(formats)}")
    form = formats.pop()
    bias = None
    if any(m.bias is not None for m in matrices):
        bias = torch.cat([torch.zeros(len(m.weight)) if m.bias is None else m.bias.detach() for m in matrices])
    merged = {name: torch.cat([p.tensors[name] for p in parts]) for name in parts[0].tensors}
    span = None
    if FORMATS[form].activations == "static":
        spans = [ranges[m.key] for m in matrices if ranges and m.key in ranges]
        if not spans:
            raise ModelError(f"{names} are in {form} but have no calibrated range; quantize the model with AutoLite")
        span = (min(low for low, _ in spans), max(high for _, high in spans))
    unsigned = unsigned and form in OVERFLOWING
    if unsigned:
        merged["codes"] = without_sign(merged["codes"])
    if len(matrices) > 1 and any(m.delta is not None for m in matrices):
        raise ModelError(f"{names} have low-rank differences of their own and cannot be merged into one product")
    delta = None
    if (factors := matrices[0].delta) is not None:
        down, up = (weights_of((factor,), encoded) for factor in factors)
        bias = bias if bias is None or up.bias is None else bias + up.bias  # one sum, made here
        delta = (down, replace(up, bias=None))
    n, k = sum(p.shape[0] for p in parts), parts[0].shape[1]
    return Weights(form, n, k, merged, bias, span, table, unsigned, delta)


def product(graph: Graph, x: str, weights: Weights, kernel: str, rows: Rows | None = None) -> str:
    """Multiply `x` [..., k] with a matrix [n, k] and add its bias: [..., n]; with the kernels "float" and "rounded", or
    if the matrix has a low-rank difference, `x` is [rows, k].

    `rows` keeps only these rows of the matrix; the slice is of a constant, which runtimes compute once when they load
    the model, so that layers which share the matrix but use other rows of it still store it once.

    Raises:
        ModelError: if the kernel cannot multiply the format.
    """
    y = _product(graph, x, weights, kernel, rows)
    return y if weights.delta is None else _add_delta(graph, x, y, weights.delta, rows)


def _add_delta(graph: Graph, x: str, y: str, delta: tuple[Weights, Weights], rows: Rows | None) -> str:
    down, up = delta
    value, transposed = decoded(graph, up, rows)
    return graph.op("Gemm", _product(graph, x, down, "float", None), value, y, transB=int(transposed))


def _product(graph: Graph, x: str, weights: Weights, kernel: str, rows: Rows | None) -> str:
    bias = _bias(graph, weights, rows)
    match kernel:
        case "float" | "rounded":
            if kernel == "rounded":
                x = graph.op("DequantizeLinear", *quantized(graph, x, weights))
            value, transposed = decoded(graph, weights, rows)
            return graph.op("Gemm", x, value, *([bias] if bias else []), transB=int(transposed))
        case "blocks" | "blocks-float" if weights.format == "int4":
            n = weights.n if rows is None else rows[1] - rows[0]
            groups = weights.tensors["scales"].shape[1]
            codes = graph.op("Reshape", _stored(graph, weights), graph.constant([weights.n, groups, GROUP // 2]))
            scales = _some(graph, graph.constant(weights.tensors["scales"]), rows)
            settings = {"K": weights.k, "N": n, "bits": 4, "block_size": GROUP}
            level = 4 if kernel == "blocks" else 1
            inputs = (x, _some(graph, codes, rows), scales, "", "", bias)
            return graph.op("MatMulNBits", *inputs, domain=CONTRIB, accuracy_level=level, **settings)
        case "int8" if kernel in KERNELS[weights.format]:
            codes, scales, zero = _codes(graph, weights, rows)
            if weights.span is None:
                return graph.op("DynamicQuantizeMatMul", x, codes, scales, zero, bias, domain=CONTRIB)
            return _multiply(graph, quantized(graph, x, weights), codes, scales, zero, bias)
    raise ModelError(f"the kernel '{kernel}' cannot multiply the format '{weights.format}'")


def products(graph: Graph, x: str, parts: Sequence[Weights], kernel: str) -> list[str]:
    """Multiply `x`, as in `product`, with several matrices; where the kernel quantizes its input, it is quantized once
    for all."""
    if kernel != "int8":
        return [product(graph, x, part, kernel) for part in parts]
    found = []
    for part in parts:
        operands = _codes(graph, part, None)
        y = _multiply(graph, quantized(graph, x, part), *operands, _bias(graph, part, None))
        found.append(y if part.delta is None else _add_delta(graph, x, y, part.delta, None))
    return found


def quantized(graph: Graph, x: str, weights: Weights) -> tuple[str, str, str]:
    """Return `x` as unsigned 8-bit codes, their scale and their zero point."""
    if weights.span is None:
        codes, scale, zero = graph.ops("DynamicQuantizeLinear", 3, x)
        return codes, scale, zero
    step, middle = grid(*weights.span)
    scale, zero = graph.constant(step), graph.constant(torch.tensor(middle, dtype=torch.uint8))
    return graph.op("QuantizeLinear", x, scale, zero), scale, zero


def decoded(graph: Graph, weights: Weights, rows: Rows | None = None) -> tuple[str, bool]:
    """Return the float32 matrix, made when the model is loaded, and whether it is [n, k] (else [k, n])."""
    tensors = weights.tensors
    match weights.format:
        case "fp32":
            return _some(graph, _stored(graph, weights), rows), True
        case "bf16":
            return _some(graph, graph.op("Cast", _stored(graph, weights), to=TensorProto.FLOAT), rows), True
        case "int4":
            codes = graph.op("Cast", unpacked(graph, _stored(graph, weights)), to=TensorProto.FLOAT)
            groups = graph.constant([weights.n, tensors["scales"].shape[1], GROUP])
            steps = graph.op("Sub", graph.op("Reshape", codes, groups), graph.constant(8.0))
            scales = graph.op("Unsqueeze", graph.constant(tensors["scales"]), graph.constant([2]))
            value = graph.op("Reshape", graph.op("Mul", steps, scales), graph.constant([weights.n, -1]))
        case "kmeans4":
            codes = graph.op("Cast", unpacked(graph, _stored(graph, weights)), to=TensorProto.INT32)
            levels = graph.op("Cast", graph.constant(tensors["codebook"]), to=TensorProto.FLOAT)
            scales = graph.op("Unsqueeze", graph.constant(tensors["scales"]), graph.constant([1]))
            value = graph.op("Mul", graph.op("GatherElements", levels, codes, axis=1), scales)
        case _:
            codes = graph.op("Cast", _stored(graph, weights), to=TensorProto.FLOAT)
            codes = graph.op("Sub", codes, graph.constant(128.0)) if weights.unsigned else codes
            scales = graph.constant(tensors["scales"])
            scales = graph.op("Unsqueeze", scales, graph.constant([1])) if weights.table else scales
            value = graph.op("Mul", codes, scales)
            return _some(graph, value, rows, 0 if weights.table else 1), weights.table
    if weights.k % (GROUP if weights.format == "int4" else 2):
        value = graph.slice(value, (0, weights.k), 1)
    return _some(graph, value, rows), True


def lookup(
    graph: Graph,
    ids: str,
    table: Matrix,
    encoded: Mapping[str, Encoded],
    unsigned: bool = False,
    option: str = "blocks",
) -> str:
    """Look up `ids` [tokens] in a table [rows, width]: float32 [tokens, width]. Only the rows asked for are decoded.

    `unsigned` is as for `weights_of`: a table that is also a matrix is stored once. `option` is
    for 4 bits: "blocks" is ONNX Runtime's own operator, "plain" unpacks the rows that were found.
    """
    stored = encoded_of(encoded, table)
    tensors, width = stored.tensors, stored.shape[1]
    match stored.format:
        case "fp32":
            return graph.op("Gather", graph.constant(tensors["values"]), ids)
        case "bf16":
            return graph.op("Cast", graph.op("Gather", graph.constant(tensors["values"]), ids), to=TensorProto.FLOAT)
        case "int8" | "int7":
            unsigned = unsigned and stored.format in OVERFLOWING
            codes = graph.constant(without_sign(tensors["codes"]) if unsigned else tensors["codes"])
            found = graph.op("Cast", graph.op("Gather", codes, ids), to=TensorProto.FLOAT)
            found = graph.op("Sub", found, graph.constant(128.0)) if unsigned else found
            scales = graph.op("Gather", graph.constant(tensors["scales"]), ids)
            return graph.op("Mul", found, graph.op("Unsqueeze", scales, graph.constant([1])))
        case "int4" if option == "plain":
            rows = unpacked(graph, graph.op("Gather", graph.constant(tensors["codes"]), ids))
            groups = graph.op("Reshape", rows, graph.constant([-1, tensors["scales"].shape[1], GROUP]))
            steps = graph.op("Sub", graph.op("Cast", groups, to=TensorProto.FLOAT), graph.constant(8.0))
            scales = graph.op("Gather", graph.constant(tensors["scales"]), ids)
            found = graph.op("Flatten", graph.op("Mul", steps, graph.op("Unsqueeze", scales, graph.constant([2]))))
            return found if width % GROUP == 0 else graph.slice(found, (0, width), 1)
        case "int4":
            # With uint8 codes this takes 26 us for 64 rows of 384; with the uint4 type 187 us.
            inputs = (graph.constant(tensors["codes"]), ids, graph.constant(tensors["scales"]))
            settings = {"bits": 4, "block_size": GROUP, "gather_axis": 0, "quantize_axis": 1}
            found = graph.op("GatherBlockQuantized", *inputs, domain=CONTRIB, **settings)
            return found if width % GROUP == 0 else graph.slice(found, (0, width), 1)
        case other:
            raise ModelError(f"rows of a table in the format '{other}' cannot be looked up; use fp32, int8 or int4")


def encoded_of(encoded: Mapping[str, Encoded], matrix: Matrix) -> Encoded:
    """Return what stands for the matrix: its entry in `encoded` (its rows of it), or itself in float32.

    Raises:
        ModelError: if the entry has another shape.
    """
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


def unpacked(graph: Graph, codes: str) -> str:
    """Return the 4-bit codes that uint8 [n, m] hold in pairs, the first in the low half: uint8 [n, 2 m]."""
    low = graph.op("BitwiseAnd", codes, graph.constant(torch.tensor(15, dtype=torch.uint8)))
    high = graph.op("BitShift", codes, graph.constant(torch.tensor(4, dtype=torch.uint8)), direction="RIGHT")
    last = graph.constant([2])
    pairs = graph.op("Concat", *(graph.op("Unsqueeze", half, last) for half in (low, high)), axis=2)
    return graph.op("Flatten", pairs, axis=1)


def _stored(graph: Graph, weights: Weights) -> str:
    """Store the matrix's codes or values. 8-bit ones are [k, n], as kernels read them, unless rows are looked up."""
    if "values" in weights.tensors:
        return graph.constant(weights.tensors["values"])
    codes = weights.tensors["codes"]
    return graph.constant(codes.T if FORMATS[weights.format].bits == 8 and not weights.table else codes)


def _codes(graph: Graph, weights: Weights, rows: Rows | None) -> tuple[str, str, str]:
    """Return 8-bit codes [k, n], their scales [n] and zero points [n] ("" for zero)."""
    if FORMATS[weights.format].bits < 8:
        value, _ = decoded(graph, weights, rows)
        largest = graph.op("ReduceMax", graph.op("Abs", value), graph.constant([1]), keepdims=1)
        scales = graph.op("Div", graph.op("Max", largest, graph.constant(1e-30)), graph.constant(float(INT7)))
        codes = graph.op("Cast", graph.op("Round", graph.op("Div", value, scales)), to=TensorProto.INT8)
        return graph.op("Transpose", codes, perm=(1, 0)), graph.op("Reshape", scales, graph.constant([-1])), ""
    codes = _stored(graph, weights)
    codes = graph.op("Transpose", codes, perm=(1, 0)) if weights.table else codes
    codes = _some(graph, codes, rows, 1)
    scales = _some(graph, graph.constant(weights.tensors["scales"]), rows)
    if not weights.unsigned:
        return graph.distinct(codes, 1), scales, ""
    count = weights.n if rows is None else rows[1] - rows[0]
    return codes, scales, graph.constant(torch.full((count,), 128, dtype=torch.uint8))


def _multiply(graph: Graph, x: tuple[str, str, str], codes: str, scales: str, zero: str, bias: str) -> str:
    quantities, scale, middle = x
    return graph.op("MatMulIntegerToFloat", quantities, codes, scale, scales, middle, zero, bias, domain=CONTRIB)


def without_sign(codes: torch.Tensor) -> torch.Tensor:
    """Return int8 codes as uint8 ones with a zero point of 128."""
    return (codes.to(torch.int16) + 128).to(torch.uint8)


def _bias(graph: Graph, weights: Weights, rows: Rows | None) -> str:
    return "" if weights.bias is None else _some(graph, graph.constant(weights.bias), rows)


def _some(graph: Graph, value: str, rows: Rows | None, axis: int = 0) -> str:
    return value if rows is None else graph.slice(value, rows, axis)
