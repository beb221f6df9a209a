"""Attention as ONNX nodes, each with the options that `autolite.runtime.variants` lists.

Queries, keys and values are [batch, tokens, width], and what is kept of earlier calls [batch, heads, tokens, width].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from onnx import TensorProto

from autolite.errors import ModelError
from autolite.runtime.graph import CONTRIB, Graph
from autolite.runtime.linear import Rows, Weights, decoded, product

MASKED = -1e9  # added to the scores of positions that are not attended to


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
        inputs = (query, key, value, *([_masked(graph, mask, heads)] if mask else []))
        return graph.op("Attention", *inputs, **_settings(heads))
    if heads.kv_heads != heads.heads:
        key, value = (_repeated(graph, x, heads) for x in (key, value))
    if option == "MultiHeadAttention":
        settings = {"num_heads": heads.heads, "scale": heads.scale, "unidirectional": int(heads.causal)}
        inputs = (query, key, value, "", graph.op("Cast", mask, to=TensorProto.INT32)) if mask else (query, key, value)
        return graph.op("MultiHeadAttention", *inputs, domain=CONTRIB, **settings)
    split = graph.constant([0, 0, heads.heads, heads.dim])
    keys, values = (graph.op("Reshape", x, split) for x in (key, value))
    masks = [_masked(graph, mask, heads)] if mask else []
    if heads.causal:
        tokens = graph.op("Shape", key, start=1, end=2)
        masks.append(_ahead(graph, tokens, tokens, graph.constant(torch.tensor(1))))
    by_head = graph.op("Transpose", keys, perm=(0, 2, 3, 1)), graph.op("Transpose", values, perm=(0, 2, 1, 3))
    return _mixed(graph, query, *by_head, masks, heads)


def attend_cached(
    graph: Graph,
    query: str,
    key: str,
    value: str,
    mask: str,
    tokens: str,
    past: tuple[str, str],
    heads: Heads,
    option: str,
) -> list[str]:
    """Causal attention of new tokens to those of earlier calls and to themselves.

    Args:
        graph: to add to.
        query: of the new tokens, [batch, tokens, heads * dim].
        key: of the new tokens, [batch, tokens, kv_heads * dim].
        value: as the keys.
        mask: int64 [batch, past + tokens], 0 for padding.
        tokens: how many are new, int64 [1].
        past: keys and values of the earlier calls, each [batch, kv_heads, past, dim].
        heads: the division into heads.
        option: "Attention", "GroupQueryAttention" or "plain".

    Returns:
        What is attended to, [batch, tokens, heads * dim], and keys and values with the new ones behind the past ones.
        "GroupQueryAttention" can write these where the past ones are: then `past` has room for more than there is.
    """
    total = graph.op("Shape", mask, start=1, end=2)
    if option == "Attention":
        inputs = (query, key, value, additive(graph, mask, tokens), *past)
        return graph.ops("Attention", 3, *inputs, **_settings(heads))
    if option == "GroupQueryAttention":
        length = graph.op("Cast", total, to=TensorProto.INT32)
        last = graph.op("Sub", length, graph.constant(torch.tensor(1, dtype=torch.int32)))
        # All sequences are of the whole length; padding is masked, wherever it is.
        lengths = graph.op("Expand", last, graph.op("Shape", mask, start=0, end=1)), graph.op("Squeeze", length)
        rest = ("", "", "", additive(graph, mask, tokens))  # no positions: queries and keys are turned already
        settings = {"num_heads": heads.heads, "kv_num_heads": heads.kv_heads, "scale": heads.scale}
        return graph.ops(option, 3, query, key, value, *past, *lengths, *rest, domain=CONTRIB, **settings)
    split = graph.constant([0, 0, heads.kv_heads, heads.dim])
    presents = []
    for before, new in zip(past, (key, value), strict=True):
        by_head = graph.op("Transpose", graph.op("Reshape", new, split), perm=(0, 2, 1, 3))
        presents.append(graph.op("Concat", before, by_head, axis=2))
    keys, values = presents
    if (copies := heads.heads // heads.kv_heads) > 1:
        apart, together = graph.constant([1, 1, copies, 1, 1]), graph.constant([0, heads.heads, -1, heads.dim])
        keys, values = (
            graph.op("Reshape", graph.op("Expand", graph.op("Unsqueeze", x, graph.constant([2])), apart), together)
            for x in presents
        )
    first_ahead = graph.op("Add", graph.op("Sub", total, tokens), graph.constant([1]))
    masks = [
        additive(graph, mask, tokens),
        _ahead(graph, tokens, total, graph.op("Squeeze", first_ahead)),
    ]
    return [_mixed(graph, query, graph.op("Transpose", keys, perm=(0, 1, 3, 2)), values, masks, heads), *presents]


def _settings(heads: Heads) -> dict[str, Any]:
    return {
        "is_causal": int(heads.causal),
        "scale": heads.scale,
        "q_num_heads": heads.heads,
        "kv_num_heads": heads.kv_heads,
    }


def _mixed(graph: Graph, query: str, keys: str, values: str, masks: Sequence[str], heads: Heads) -> str:
    """Attention of plain nodes: `keys` are [batch, heads, dim, tokens], `values` [batch, heads, tokens, dim]."""
    queries = graph.op("Reshape", query, graph.constant([0, 0, heads.heads, heads.dim]))
    queries = graph.op("Mul", graph.op("Transpose", queries, perm=(0, 2, 1, 3)), graph.constant(heads.scale))
    scores = graph.op("MatMul", queries, keys)
    for mask in masks:
        scores = graph.op("Add", scores, mask)
    mixed = graph.op("MatMul", graph.op("Softmax", scores, axis=-1), values)
    together = graph.constant([0, 0, heads.heads * heads.dim])
    return graph.op("Reshape", graph.op("Transpose", mixed, perm=(0, 2, 1, 3)), together)


def _masked(graph: Graph, mask: str, heads: Heads) -> str:
    return additive(graph, mask, "" if heads.one_query else graph.slice(graph.op("Shape", mask), (1, 2), 0))


def additive(graph: Graph, mask: str, queries: str) -> str:
    """Return what a mask [batch, tokens] adds to scores, [batch, 1, queries, tokens]; `queries` is their number, int64
    [1], or "" for one. ONNX Runtime's Attention does not repeat it for the queries itself; layers share it."""
    there = graph.op("Cast", graph.op("Unsqueeze", mask, graph.constant([1, 2])), to=TensorProto.BOOL)
    row = graph.op("Where", there, graph.constant(0.0), graph.constant(MASKED))
    if not queries:
        return row
    shape, one = graph.op("Shape", mask), graph.constant([1])
    batch, tokens = graph.slice(shape, (0, 1), 0), graph.slice(shape, (1, 2), 0)
    return graph.op("Expand", row, graph.op("Concat", batch, one, queries, tokens, axis=0))


def _ahead(graph: Graph, queries: str, tokens: str, first: str) -> str:
    """Return what is added to scores so that no query attends to what follows it, [queries, tokens]; `first` is the
    token that the first query must not attend to."""
    every = graph.op("Expand", graph.constant(MASKED), graph.op("Concat", queries, tokens, axis=0))
    return graph.op("Trilu", every, first, upper=1)


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


def rotate(graph: Graph, x: str, positions: str, rows: str, rotary: Any) -> str:
    """Turn the heads of `x` [batch, tokens, width] by their positions (RoPE, Su et al. 2021).

    Sines are computed per call: tables for the longest input would outweigh a small model.

    Args:
        graph: to add to.
        x: queries or keys.
        positions: int64 [tokens].
        rows: of each token its place among the positions, int64 [batch, tokens].
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
    return graph.op("RotaryEmbedding", x, rows, cos, sin, domain=CONTRIB, interleaved=0)
