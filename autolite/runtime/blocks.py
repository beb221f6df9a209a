"""Pieces of a transformer as ONNX nodes, each with the options that `autolite.runtime.variants` lists.

Activations are [rows, width], rows = batch * tokens. Attention is in `autolite.runtime.attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autolite.errors import ModelError, unknown
from autolite.parts import Norm
from autolite.runtime.graph import CONTRIB, Graph
from autolite.runtime.linear import Weights, product

_TANH_GELU = ("Gelu", {"approximate": "tanh"})
# Names as in transformers.activations; each is one node. Swish is QuickGelu with alpha 1.
ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "gelu": ("Gelu", {}),
    "gelu_python": ("Gelu", {}),
    "gelu_new": _TANH_GELU,
    "gelu_fast": _TANH_GELU,
    "gelu_pytorch_tanh": _TANH_GELU,
    "gelu_python_tanh": _TANH_GELU,
    "relu": ("Relu", {}),
    "sigmoid": ("Sigmoid", {}),
    "tanh": ("Tanh", {}),
    "silu": ("QuickGelu", {"domain": CONTRIB, "alpha": 1.0}),
    "swish": ("QuickGelu", {"domain": CONTRIB, "alpha": 1.0}),
    "quick_gelu": ("QuickGelu", {"domain": CONTRIB, "alpha": 1.702}),
}


class BeyondError(ModelError):
    """A part of the model that these pieces cannot express; torch's exporter may."""


def activate(graph: Graph, x: str, name: str, gelu: str = "erf") -> str:
    """Apply the activation function that transformers calls `name`; `gelu` is the option for the exact Gelu.

    Raises:
        BeyondError: if it is not known.
    """
    if name not in ACTIVATIONS:
        raise BeyondError(unknown("activation", name, ACTIVATIONS))
    kind, settings = ACTIVATIONS[name]
    if kind == "Gelu" and gelu == "tanh":
        kind, settings = _TANH_GELU
    return graph.op(kind, x, **settings)


def normalize(graph: Graph, x: str, norm: Norm) -> str:
    """LayerNorm, or RMSNorm where there is no bias, over the last axis."""
    weight = graph.constant(norm.weight)
    if norm.bias is None:
        return graph.op("RMSNormalization", x, weight, axis=-1, epsilon=norm.eps)
    return graph.op("LayerNormalization", x, weight, graph.constant(norm.bias), axis=-1, epsilon=norm.eps)


def add_and_normalize(graph: Graph, x: str, y: str, norm: Norm, option: str) -> str:
    """Normalise x + y, both [rows, width].

    Of two-dimensional values ONNX Runtime does not make its SkipLayerNormalization by itself, which can be several
    times slower than the two nodes.
    """
    if option == "add" or norm.bias is None:
        return normalize(graph, graph.op("Add", x, y), norm)
    inputs = (x, y, graph.constant(norm.weight), graph.constant(norm.bias))
    return graph.op("SkipLayerNormalization", *inputs, domain=CONTRIB, epsilon=norm.eps)


def project(graph: Graph, x: str, weights: Weights, kernel: str, widths: Sequence[int]) -> list[str]:
    """One product with merged matrices, split into what each gives."""
    merged = product(graph, x, weights, kernel)
    if len(widths) == 1:
        return [merged]
    return graph.ops("Split", len(widths), merged, graph.constant(list(widths)), axis=1)
