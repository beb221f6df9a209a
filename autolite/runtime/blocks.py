"""Pieces of a transformer as ONNX nodes, each with the options that `autolite.runtime.variants` lists.

Activations are [rows, width], rows = batch * tokens, and [batch, tokens, width] around attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from onnx import TensorProto

from autolite.errors import ModelError, unknown
from autolite.parts import Norm
from autolite.runtime.graph import CONTRIB, Graph
from autolite.runtime.linear import Rows, Weights, decoded, product

MASKED = -1e9  # added to the scores of positions that are not attended to

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


@dataclass(frozen=True)
class Heads:
    """How a projection divides into heads: `heads` of width `dim`, read by them `kv_heads` of keys and values; with
    `one_query` only one token of each sequence attends."""

    heads: int
    kv_heads: int
    dim: int
    scale: float
    causal: bool = False
    one_query: bool = False


def attend(graph: Graph, query: str, key: str, value: str, mask: str, heads: Heads, option: str) -> str:
    """Scaled dot-product attention (Vaswani et al. 2017) of [batch, tokens, heads * dim].

    Args:
        graph: to add to.
        query: [batch, queries, heads * dim].
        key: [batch, tokens, kv_heads * dim].
        value: as the keys.
        mask: int64 [batch, tokens], 0 for padding; "" if there is none.
        heads: the division into heads.
        option: "Attention", "MultiHeadAttention" or "plain".
    """
    if option == "Attention":
        inputs = (query, key, value, *([additive(graph, mask, heads.one_query)] if mask else []))
        return graph.op(
            "Attention",
            *inputs,
            is_causal=int(heads.causal),
            scale=heads.scale,
            q_num_heads=heads.heads,
            kv_num_heads=heads.kv_heads,
        )
    if heads.kv_heads != heads.heads:
        key, value = (_repeated(graph, x, heads) for x in (key, value))
    if option == "MultiHeadAttention":
        settings = {"num_heads": heads.heads, "scale": heads.scale, "unidirectional": int(heads.causal)}
        inputs = (query, key, value, "", graph.op("Cast", mask, to=TensorProto.INT32)) if mask else (query, key, value)
        return graph.op("MultiHeadAttention", *inputs, domain=CONTRIB, **settings)
    split = graph.constant([0, 0, heads.heads, heads.dim])
    queries, keys, values = (graph.op("Reshape", x, split) for x in (query, key, value))
    queries = graph.op("Mul", graph.op("Transpose", queries, perm=(0, 2, 1, 3)), graph.constant(heads.scale))
    scores = graph.op("MatMul", queries, graph.op("Transpose", keys, perm=(0, 2, 3, 1)))
    scores = graph.op("Add", scores, additive(graph, mask, heads.one_query)) if mask else scores
    if heads.causal:
        ahead = graph.op(
            "Trilu",
            graph.op("Expand", graph.constant(MASKED), _square(graph, key)),
            graph.constant(torch.tensor(1)),
            upper=1,
        )
        scores = graph.op("Add", scores, ahead)
    mixed = graph.op("MatMul", graph.op("Softmax", scores, axis=-1), graph.op("Transpose", values, perm=(0, 2, 1, 3)))
    together = graph.constant([0, 0, heads.heads * heads.dim])
    return graph.op("Reshape", graph.op("Transpose", mixed, perm=(0, 2, 1, 3)), together)


def additive(graph: Graph, mask: str, one_query: bool) -> str:
    """Return what a mask [batch, tokens] adds to scores: [batch, 1, tokens or 1, tokens]. ONNX Runtime's Attention
    does not repeat it for the queries itself; layers share it."""
    there = graph.op("Cast", graph.op("Unsqueeze", mask, graph.constant([1, 2])), to=TensorProto.BOOL)
    row = graph.op("Where", there, graph.constant(0.0), graph.constant(MASKED))
    if one_query:
        return row
    shape, one = graph.op("Shape", mask), graph.constant([1])
    batch, tokens = graph.slice(shape, (0, 1), 0), graph.slice(shape, (1, 2), 0)
    return graph.op("Expand", row, graph.op("Concat", batch, one, tokens, tokens, axis=0))


def _square(graph: Graph, key: str) -> str:
    tokens = graph.op("Shape", key, start=1, end=2)
    return graph.op("Concat", tokens, tokens, axis=0)


def _repeated(graph: Graph, x: str, heads: Heads) -> str:
    """Repeat each key/value head of [batch, tokens, kv_heads * dim] for the query heads that read it."""
    copies = heads.heads // heads.kv_heads
    shape = graph.op("Shape", x, start=0, end=2)

    def to(*rest: int) -> str:
        return graph.op("Concat", shape, graph.constant(rest), axis=0)

    single = graph.op("Reshape", x, to(heads.kv_heads, 1, heads.dim))
    return graph.op(
        "Reshape", graph.op("Expand", single, to(heads.kv_heads, copies, heads.dim)), to(heads.heads * heads.dim)
    )


Part = tuple[Weights, Rows | None]  # rows of merged matrices, None for all


def attend_first(
    graph: Graph,
    query: str,
    x: str,
    keys: Part,
    values: Part,
    mask: str,
    heads: Heads,
    option: str,
    kernels: tuple[str, str],
) -> str:
    """Attention of one query a sequence, [batch, heads * dim], over `x` [batch, tokens, hidden].

    Args:
        graph: to add to.
        query: the projected queries.
        x: what keys and values are projections of.
        keys: their projection, as many as query heads.
        values: their projection.
        mask: int64 [batch, tokens], 0 for padding.
        heads: the division into heads.
        option: "absorbed" or "products".
        kernels: for "products", what multiplies with keys and values, and the option of `attend`.
    """
    if option == "absorbed":
        return attend_absorbed(graph, query, x, keys, values, mask, heads)
    kernel, attention = kernels
    width = heads.heads * heads.dim
    flat = graph.op("Flatten", x, axis=2)
    shape = graph.op("Concat", graph.op("Shape", x, end=2), graph.constant([width]), axis=0)
    key, value = (graph.op("Reshape", product(graph, flat, w, kernel, r), shape) for w, r in (keys, values))
    mixed = attend(graph, graph.op("Unsqueeze", query, graph.constant([1])), key, value, mask, heads, attention)
    return graph.op("Reshape", mixed, graph.constant([-1, width]))


def attend_absorbed(graph: Graph, query: str, x: str, keys: Part, values: Part, mask: str, heads: Heads) -> str:
    """As `attend_first`: the projections of keys and values move to the other side of the products with the scores,
    where they meet one row and not every token: q (x K)' = (q K') x' and p (x V) = (p x) V. The keys' bias adds the
    same to every score of a query, which softmax ignores; the values' bias passes through, since the probabilities
    add up to 1."""
    key, value = _per_head(graph, keys, heads), graph.op("Transpose", _per_head(graph, values, heads), perm=(0, 2, 1))
    by_head = graph.op("Reshape", query, graph.constant([-1, heads.heads, heads.dim]))
    by_head = graph.op("Transpose", graph.op("Mul", by_head, graph.constant(heads.scale)), perm=(1, 0, 2))
    absorbed = graph.op("Transpose", graph.op("MatMul", by_head, key), perm=(1, 0, 2))
    scores = graph.op("MatMul", absorbed, graph.op("Transpose", x, perm=(0, 2, 1)))
    if mask:
        there = graph.op("Cast", graph.op("Unsqueeze", mask, graph.constant([1])), to=TensorProto.BOOL)
        scores = graph.op("Add", scores, graph.op("Where", there, graph.constant(0.0), graph.constant(MASKED)))
    mixed = graph.op("Transpose", graph.op("MatMul", graph.op("Softmax", scores, axis=-1), x), perm=(1, 0, 2))
    out = graph.op("Transpose", graph.op("MatMul", mixed, value), perm=(1, 0, 2))
    out = graph.op("Reshape", out, graph.constant([-1, heads.heads * heads.dim]))
    weights, rows = values
    if weights.bias is None:
        return out
    bias = graph.constant(weights.bias)
    return graph.op("Add", out, bias if rows is None else graph.slice(bias, rows, 0))


def _per_head(graph: Graph, part: Part, heads: Heads) -> str:
    """Return these rows of a matrix in float32 as [heads, dim, hidden]."""
    value = _by_rows(graph, *part)
    if (delta := part[0].delta) is not None:  # two constants, so that their product is one as well
        down, up = delta
        value = graph.op("Add", value, graph.op("MatMul", _by_rows(graph, up, part[1]), _by_rows(graph, down, None)))
    return graph.op("Reshape", value, graph.constant([heads.heads, heads.dim, part[0].k]))


def _by_rows(graph: Graph, weights: Weights, rows: Rows | None) -> str:
    value, by_rows = decoded(graph, weights, rows)
    return value if by_rows else graph.op("Transpose", value, perm=(1, 0))


def rotate(graph: Graph, x: str, positions: str, rotary: Any) -> str:
    """Turn the heads of `x` [batch, tokens, width] by their `positions` [tokens] (RoPE, Su et al. 2021).

    Sines are computed per call: tables for the longest input would outweigh a small model.

    Args:
        graph: to add to.
        x: queries or keys.
        positions: int64.
        rotary: the model's rotary embedding, a module of transformers.

    Raises:
        ModelError: if its angles change with the length.
    """
    kind = str(getattr(rotary, "rope_type", "default"))
    if kind in ("dynamic", "longrope"):
        raise ModelError(f"rotary positions of type '{kind}' change with the length and cannot be emitted")
    column = graph.op("Unsqueeze", graph.op("Cast", positions, to=TensorProto.FLOAT), graph.constant([1]))
    angles = graph.op("Mul", column, graph.constant(rotary.inv_freq.float()[None, :]))
    scaling = graph.constant(float(rotary.attention_scaling))
    cos, sin = (graph.op("Mul", graph.op(f, angles), scaling) for f in ("Cos", "Sin"))
    # All positions, where ONNX Runtime would do with the first: OpenVINO reads that as the position of every token.
    ids = graph.op("Expand", positions, graph.op("Shape", "input_ids"))
    return graph.op("RotaryEmbedding", x, ids, cos, sin, domain=CONTRIB, interleaved=0)


def project(graph: Graph, x: str, weights: Weights, kernel: str, widths: Sequence[int]) -> list[str]:
    """One product with merged matrices, split into what each gives."""
    merged = product(graph, x, weights, kernel)
    if len(widths) == 1:
        return [merged]
    return graph.ops("Split", len(widths), merged, graph.constant(list(widths)), axis=1)
