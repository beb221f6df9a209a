"""Floating-point (or integer) operations of ONNX Runtime's products, from the shapes that its trace reports.

A multiply-add counts as two operations: a product [m, k] x [k, n] has 2 m k n. Attention is counted dense, its masked
half included, and without its softmax. A weight that the runtime packed is missing from the reported inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

MATMULS = frozenset(
    [
        *("Gemm", "FusedGemm", "MatMul", "FusedMatMul", "MatMulInteger", "MatMulIntegerToFloat"),
        *("DynamicQuantizeMatMul", "QLinearMatMul", "QGemm", "MatMulNBits", "MatMulBnb4"),
    ]
)
CONVOLUTIONS = frozenset(["Conv", "FusedConv", "NhwcFusedConv", "ConvInteger", "QLinearConv"])
ATTENTIONS = frozenset(["Attention", "QAttention", "MultiHeadAttention", "GroupQueryAttention"])
_INT8 = ("int8", "uint8")


@dataclass(frozen=True, slots=True)
class Tensor:
    """Type, as in "float" or "uint8", and dimensions of one value."""

    type: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.type}[{','.join(map(str, self.shape))}]"


def needs_weight(operator: str, inputs: Sequence[Tensor]) -> bool:
    """Say whether `flops` needs the shape of a weight that the runtime packed, which `inputs` do not show."""
    if operator in ("Attention", "QAttention"):
        return not _is_onnx_attention(inputs) and _bias(inputs) is None
    return operator in CONVOLUTIONS and _kernel_of(inputs) is None


def flops(
    operator: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], weight: tuple[int, ...] | None = None
) -> int | None:
    """Return the operations of one run of an operator; None for what is no product or cannot be told.

    Args:
        operator: its type.
        inputs: as reported, in order; those that were left out or packed are missing.
        outputs: as reported.
        weight: shape of the weight, where `needs_weight` asks for it.
    """
    if not inputs or not outputs or not inputs[0].shape:
        return None
    x, y = inputs[0].shape, outputs[0].shape
    if operator in MATMULS:
        return 2 * prod(y) * _depth(x, y)
    if operator in CONVOLUTIONS:
        filters = _kernel_of(inputs) or weight
        return None if filters is None else 2 * prod(y) * prod(filters[1:])
    if operator not in ATTENTIONS:
        return None
    if operator in ("Attention", "QAttention") and not _is_onnx_attention(inputs):
        return _projected_attention(inputs, outputs, weight)
    present = outputs[1].shape if len(outputs) > 1 else inputs[1].shape if len(inputs) > 1 else ()
    if len(present) < 3:
        return None
    scores = prod(y) if operator == "GroupQueryAttention" else prod(x)  # its queries may come with keys and values
    return 2 * present[-2] * (scores + prod(y))


def kernel_class(operator: str, inputs: Sequence[Tensor], bits: int | None) -> str | None:
    """Return the kernel class whose peak a product is compared with: "fp32", "int8", "int4", or None.

    `bits` is the width of the codes of a MatMulNBits.
    """
    if operator == "MatMulNBits":
        return "int4" if bits == 4 else None
    if operator == "DynamicQuantizeMatMul" or inputs[0].type in _INT8:
        return "int8"
    return "fp32" if inputs[0].type == "float" else None


def _depth(x: tuple[int, ...], y: tuple[int, ...]) -> int:
    """The depth k of a product x * w = y; x is transposed if only then its rows are those of y."""
    if len(x) >= 2 and len(y) >= len(x) and x[-2] != y[-2] and x[-1] == y[-2]:
        # FusedMatMul can also swap the first of three axes with the second: then the others do not match.
        batches = zip(x[-3::-1], y[-3::-1], strict=False)
        if all(own in (1, of_y) for own, of_y in batches):
            return x[-2]
    return x[-1]


def _kernel_of(inputs: Sequence[Tensor]) -> tuple[int, ...] | None:
    """The filters [out, in / groups, ...] of a convolution, if they are among the inputs."""
    images = [value.shape for value in inputs if len(value.shape) >= 3]
    return images[1] if len(images) > 1 else None


def _is_onnx_attention(inputs: Sequence[Tensor]) -> bool:
    """Whether "Attention" is ONNX's, of queries, keys and values, and not Microsoft's, which projects them itself."""
    return len(inputs) >= 3 and all(len(v.shape) == len(inputs[0].shape) for v in inputs[:3]) and _bias(inputs) is None


def _bias(inputs: Sequence[Tensor]) -> int | None:
    """Width of the merged projection, from its bias or its weight."""
    for value in inputs[1:3]:
        if value.type != "int32" and len(value.shape) in (1, 2):
            return value.shape[-1]
    return None


def _projected_attention(
    inputs: Sequence[Tensor], outputs: Sequence[Tensor], weight: tuple[int, ...] | None
) -> int | None:
    """Microsoft's Attention: [batch, tokens, hidden] is projected to queries, keys and values first."""
    merged = _bias(inputs) or (weight[-1] if weight else None)
    x, y = inputs[0].shape, outputs[0].shape
    if merged is None or len(x) != 3:
        return None
    value = y[-1]
    key = (merged - value) // 2
    context = outputs[1].shape[3] if len(outputs) > 1 else x[1]
    return 2 * x[0] * x[1] * (x[2] * merged + context * (key + value))
