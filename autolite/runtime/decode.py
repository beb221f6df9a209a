"""Stored codes to float32 values, as ONNX nodes: of whole matrices when a model is loaded, or of rows looked up."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from onnx import TensorProto

from autolite.codebooks import Fixed, KMeans
from autolite.formats import Float, Layout
from autolite.linear_grids import Linear
from autolite.packing import PLANES
from autolite.runtime.graph import Graph


def values(graph: Graph, layout: Layout, stored: Mapping[str, str], k: int, unsigned: bool = False) -> str:
    """Return the float32 values [rows, k] of rows in a format.

    Args:
        graph: to add to.
        layout: of the format.
        stored: names in the graph of the format's tensors, for these rows; those of the whole matrix as they are.
        k: width of the matrix.
        unsigned: 128 was added to 8-bit codes with a sign.
    """
    if isinstance(layout, Float):
        exact = layout.type == torch.float32
        return stored["values"] if exact else graph.op("Cast", stored["values"], to=TensorProto.FLOAT)
    assert isinstance(layout, Linear | KMeans | Fixed)
    signed = isinstance(layout, Linear) and layout.signed
    codes = stored["codes"] if signed else unpacked(graph, stored["codes"], layout.bits, layout.padded(k))
    if isinstance(layout, Linear):
        steps = graph.op("Cast", codes, to=TensorProto.FLOAT)
    else:
        steps = _levels(graph, layout, stored, graph.op("Cast", codes, to=TensorProto.INT32))
    if layout.group:
        steps = graph.op("Reshape", steps, graph.constant([-1, layout.groups(k), layout.group]))
    if isinstance(layout, Linear) and (zero := _zero(graph, layout, stored, k, unsigned)):
        steps = graph.op("Sub", steps, zero)
    scales = _float(graph, layout, stored["scales"])
    if "scales" not in layout.shared:
        scales = graph.op("Unsqueeze", scales, graph.constant([2 if layout.group else 1]))
    found = graph.op("Mul", steps, scales)
    if not layout.group:
        return found
    found = graph.op("Flatten", found, axis=1)
    return found if k % layout.group == 0 else graph.slice(found, (0, k), 1)


def unpacked(graph: Graph, packed: str, bits: int, k: int) -> str:
    """Return the codes uint8 [n, k] of what `autolite.packing.pack` made of them."""
    planes, shift, start = [], 0, 0
    for width in PLANES[bits]:
        stop = start + -(-k * width // 8)
        plane = packed if len(PLANES[bits]) == 1 else graph.slice(packed, (start, stop), 1)
        if width < 8:
            plane = _split(graph, plane, width)
        if k * width % 8:
            plane = graph.slice(plane, (0, k), 1)
        planes.append(graph.op("BitShift", plane, _byte(graph, shift), direction="LEFT") if shift else plane)
        shift, start = shift + width, stop
    return planes[0] if len(planes) == 1 else graph.op("BitwiseOr", *planes)


def _split(graph: Graph, packed: str, width: int) -> str:
    """Return the codes of a plane, uint8 [n, m] -> [n, 8 m / width]."""
    shifts = graph.constant(torch.arange(0, 8, width, dtype=torch.uint8))
    shifted = graph.op("BitShift", graph.op("Unsqueeze", packed, graph.constant([2])), shifts, direction="RIGHT")
    return graph.op("Flatten", graph.op("BitwiseAnd", shifted, _byte(graph, 2**width - 1)), axis=1)


def _zero(graph: Graph, layout: Linear, stored: Mapping[str, str], k: int, unsigned: bool) -> str:
    """Return the zero points in float32, "" if they are zero."""
    if layout.symmetric:
        middle = 128 if unsigned else layout.middle
        return graph.constant(float(middle)) if middle else ""
    if not layout.group:  # 8 bits, one for each row
        zeros = graph.op("Unsqueeze", stored["zeros"], graph.constant([1]))
        return graph.op("Cast", zeros, to=TensorProto.FLOAT)
    zeros = graph.op("Cast", unpacked(graph, stored["zeros"], layout.bits, layout.groups(k)), to=TensorProto.FLOAT)
    return graph.op("Unsqueeze", zeros, graph.constant([2]))


def _levels(graph: Graph, layout: KMeans | Fixed, stored: Mapping[str, str], index: str) -> str:
    """Return the levels [n, k] of codes."""
    if isinstance(layout, Fixed):
        return graph.op("Gather", graph.constant(torch.tensor(layout.levels)), index)
    levels = graph.op("Cast", stored["codebook"], to=TensorProto.FLOAT)
    if layout.shared:
        return graph.op("Gather", graph.op("Reshape", levels, graph.constant([-1])), index)
    return graph.op("GatherElements", levels, index, axis=1)


def _float(graph: Graph, layout: Linear | KMeans | Fixed, scales: str) -> str:
    return scales if layout.scale == torch.float32 else graph.op("Cast", scales, to=TensorProto.FLOAT)


def _byte(graph: Graph, value: int) -> str:
    return graph.constant(torch.tensor(value, dtype=torch.uint8))
