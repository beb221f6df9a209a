"""Weights in their number formats as ONNX nodes: products with a matrix, and rows looked up in a table.

A format can be multiplied by several kernels (`KERNELS`), which agree within the format's own rounding:

    float   32-bit products; weights that are not in float32 are decoded once, when the runtime loads the model
    int8    8-bit integers: activations are quantized to unsigned codes, by the range of each call or by a calibrated
            one. Weights below 8 bits are decoded, when the model is loaded, to the 7-bit codes that overflow nowhere
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
from autolite.formats import FORMATS, INT7, Encoded, Format, Layout, encode
from autolite.linear_grids import Linear
from autolite.parts import Matrix
from autolite.runtime.decode import values
from autolite.runtime.graph import CONTRIB, Graph
from autolite.techniques.calibrate import grid

Rows = tuple[int, int]


def kernels(form: Format) -> tuple[str, ...]:
    """Return the kernels that can multiply a format, the usual one first.

    What is less exact than 7 bits is decoded to these for 8-bit products. MatMulNBits reads groups of 2 and 4 bits; of
    2 bits with activations in floating point it takes a hundred times what "float" does.
    """
    if form.activations != "any":
        return ("float",) if form.activations == "float" else ("int8",)
    layout = form.layout
    if not (isinstance(layout, Linear) and layout.group and layout.bits in (2, 4)):
        return "int8", "float"
    return ("blocks", "blocks-float", "int8", "float") if layout.bits == 4 else ("blocks", "int8", "float")


KERNELS: dict[str, tuple[str, ...]] = {name: kernels(form) for name, form in FORMATS.items()}
# 8-bit codes of these formats fill their range: two products of such with 8-bit activations do not fit in 16 bits.
OVERFLOWING = ("int8", "int8-static", "int8-tensor")


@dataclass(frozen=True)
class Weights:
    """Matrices [n, k] of one format merged along n, as codes that are ready to be stored.

    `table` says that the matrix is also looked up as an embedding table, and is stored as one; `span` is the
    calibrated range of the inputs, for formats that have one; `unsigned` says that 128 was added to 8-bit codes;
    `counts` are the rows of each matrix, if they are several that have a scale or codebook each for all their rows.
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
    counts: tuple[int, ...] = ()
    delta: tuple[Weights, Weights] | None = None

    @property
    def layout(self) -> Layout:
        """How the format is stored."""
        return FORMATS[self.format].layout

    @property
    def eight(self) -> bool:
        """Whether it is a format whose codes are multiplied as 8-bit integers as they are."""
        return isinstance(self.layout, Linear) and self.layout.bits == 8


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
    counts: tuple[int, ...] = ()
    for name in FORMATS[form].layout.shared:
        if torch.equal(merged[name], merged[name][:1].expand_as(merged[name])):
            merged[name] = merged[name][:1]
        else:
            counts = tuple(p.shape[0] for p in parts)
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
    return Weights(form, n, k, merged, bias, span, table, unsigned, counts, delta)


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
        case "blocks" | "blocks-float" if kernel in KERNELS[weights.format]:
            return _blocks(graph, x, weights, rows, bias, level=4 if kernel == "blocks" else 1)
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
    layout, stored = _constants(graph, weights)
    if not weights.eight or weights.table:
        return _some(graph, values(graph, layout, stored, weights.k, weights.unsigned), rows), True
    codes = graph.op("Cast", stored["codes"], to=TensorProto.FLOAT)
    if weights.unsigned:
        codes = graph.op("Sub", codes, graph.constant(128.0))
    elif "zeros" in stored:
        codes = graph.op("Sub", codes, graph.op("Cast", stored["zeros"], to=TensorProto.FLOAT))
    return _some(graph, graph.op("Mul", codes, stored["scales"]), rows, 1), False


def lookup(
    graph: Graph,
    ids: str,
    table: Matrix,
    encoded: Mapping[str, Encoded],
    unsigned: bool = False,
    option: str = "blocks",
) -> str:
    """Look up `ids` [tokens] in a table [rows, width]: float32 [tokens, width]. Only the rows asked for are decoded.

    `unsigned` is as for `weights_of`: a table that is also a matrix is stored once. `option` is for groups of 4 bits:
    "blocks" is ONNX Runtime's own operator, "plain" unpacks the rows that were found.
    """
    stored = encoded_of(encoded, table)
    form, tensors, width = FORMATS[stored.format], dict(stored.tensors), stored.shape[1]
    if not form.embedding:
        known = ", ".join(f.name for f in FORMATS.values() if f.embedding)
        raise ModelError(f"rows of a table in the format '{form.name}' cannot be looked up; use one of {known}")
    layout = form.layout
    if option == "blocks" and blocks_lookup(form):
        assert isinstance(layout, Linear)
        # With uint8 codes this takes 26 us for 64 rows of 384; with the uint4 type 187 us.
        scales = graph.constant(tensors["scales"])
        if layout.scale != torch.float32:
            scales = graph.op("Cast", scales, to=TensorProto.FLOAT)
        inputs = [graph.constant(tensors["codes"]), ids, scales]
        inputs += [graph.constant(tensors["zeros"])] if "zeros" in tensors else []
        settings = {"bits": 4, "block_size": layout.group, "gather_axis": 0, "quantize_axis": 1}
        found = graph.op("GatherBlockQuantized", *inputs, domain=CONTRIB, **settings)
        return found if width % layout.group == 0 else graph.slice(found, (0, width), 1)
    unsigned = unsigned and form.name in OVERFLOWING
    if unsigned:
        tensors["codes"] = without_sign(tensors["codes"])
    constants = {name: graph.constant(tensor) for name, tensor in tensors.items()}
    rows = {
        name: value if name in layout.shared else graph.op("Gather", value, ids) for name, value in constants.items()
    }
    return values(graph, layout, rows, width, unsigned)


def blocks_lookup(form: Format) -> bool:
    """Whether ONNX Runtime's GatherBlockQuantized looks rows up in a format."""
    return isinstance(form.layout, Linear) and form.layout.group > 0 and form.layout.bits == 4


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
        shared = FORMATS[found.format].layout.shared
        part = {name: t if name in shared else t[start:stop] for name, t in found.tensors.items()}
        found = Encoded(found.format, (stop - start, found.shape[1]), part)
    if found.shape != tuple(matrix.weight.shape):
        raise ModelError(
            f"{matrix.key} was encoded as {found.shape}, but the model's is {tuple(matrix.weight.shape)}; "
            "quantize after the model has its final shape"
        )
    return found


def _blocks(graph: Graph, x: str, weights: Weights, rows: Rows | None, bias: str, level: int) -> str:
    """Multiply with groups of codes as they are stored."""
    layout = weights.layout
    assert isinstance(layout, Linear)
    _, stored = _constants(graph, weights)
    shape = [weights.n, layout.groups(weights.k), layout.group * layout.bits // 8]
    codes = graph.op("Reshape", stored["codes"], graph.constant(shape))
    scales = stored["scales"]
    if layout.scale != torch.float32:
        scales = graph.op("Cast", scales, to=TensorProto.FLOAT)
    zeros = _some(graph, stored["zeros"], rows) if "zeros" in stored else ""
    n = weights.n if rows is None else rows[1] - rows[0]
    settings = {"K": weights.k, "N": n, "bits": layout.bits, "block_size": layout.group, "accuracy_level": level}
    inputs = (x, _some(graph, codes, rows), _some(graph, scales, rows), zeros, "", bias)
    return graph.op("MatMulNBits", *inputs, domain=CONTRIB, **settings)


def _constants(graph: Graph, weights: Weights) -> tuple[Layout, dict[str, str]]:
    """Store the tensors and return their names, and their layout.

    8-bit codes are [k, n], as kernels read them, unless rows are looked up. What each of several matrices has one of
    is repeated for its rows when the model is loaded.
    """
    tensors, layout = dict(weights.tensors), weights.layout
    if weights.eight and not weights.table:
        tensors["codes"] = tensors["codes"].T
    stored = {name: graph.constant(tensor) for name, tensor in tensors.items()}
    if weights.counts:
        for name in layout.shared:
            parts = []
            for i, count in enumerate(weights.counts):
                dims = graph.constant([count, *tensors[name].shape[1:]])
                parts.append(graph.op("Expand", graph.slice(stored[name], (i, i + 1), 0), dims))
            stored[name] = graph.op("Concat", *parts, axis=0)
        layout = layout.by_row()
    return layout, stored


def _codes(graph: Graph, weights: Weights, rows: Rows | None) -> tuple[str, str, str]:
    """Return 8-bit codes [k, n], their scales [n] and zero points [n] ("" for zero)."""
    if not weights.eight:
        value, _ = decoded(graph, weights, rows)
        largest = graph.op("ReduceMax", graph.op("Abs", value), graph.constant([1]), keepdims=1)
        scales = graph.op("Div", graph.op("Max", largest, graph.constant(1e-30)), graph.constant(float(INT7)))
        codes = graph.op("Cast", graph.op("Round", graph.op("Div", value, scales)), to=TensorProto.INT8)
        return graph.op("Transpose", codes, perm=(1, 0)), graph.op("Reshape", scales, graph.constant([-1])), ""
    layout, stored = _constants(graph, weights)
    codes = graph.op("Transpose", stored["codes"], perm=(1, 0)) if weights.table else stored["codes"]
    codes, scales = _some(graph, codes, rows, 1), stored["scales"]
    scales = scales if layout.shared else _some(graph, scales, rows)
    if "zeros" in stored:
        return codes, scales, _some(graph, stored["zeros"], rows)
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
