"""The products of activations with weight matrices that a shape stands for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from autolite.architecture import LayerShape, ModelShape, Stack, factor_format
from autolite.families import DESCRIBED


@dataclass(frozen=True, slots=True)
class MatMul:
    """A product of activations [rows, k] with a weight matrix [k, n]. Equal `weights` are one stored matrix; `delta`
    says that it is one of a layer's own low-rank differences."""

    part: str  # "attention", "ffn" or "head"; without a map also "embedding"
    layer: int
    k: int
    n: int
    format: str
    weights: str
    pooled: bool = False  # with one vector a sequence; only said of models without a map
    delta: bool = False


def matmuls(shape: ModelShape) -> Iterator[MatMul]:
    """Yield every weight matrix product of one forward pass (query, key and value merged into one), in order but for
    low-rank differences, which follow the other products of their layer in pairs."""
    if shape.unmapped is not None:
        for p in shape.unmapped.products:
            for _ in range(p.calls):
                yield MatMul(p.part, _layer(p.weights), p.k, p.n, p.format, p.weights, p.pooled)
        return
    for stack in shape.stacks:
        for index, layer in enumerate(stack.layers):
            attention, ffn = f"{stack.name}.attention.{layer.attention}", f"{stack.name}.ffn.{layer.feed_forward}"
            width, kv = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
            form = layer.attention_format
            yield MatMul("attention", index, stack.hidden, width + 2 * kv, form, f"{attention}.qkv")
            yield MatMul("attention", index, width, stack.hidden, form, f"{attention}.out")
            if layer.cross is not None:
                source, inner = shape.stacks[0].hidden, layer.cross.width
                yield MatMul("attention", index, source, 2 * inner, form, f"{attention}.cross.kv")
                yield MatMul("attention", index, stack.hidden, inner, form, f"{attention}.cross.query")
                yield MatMul("attention", index, inner, stack.hidden, form, f"{attention}.cross.out")
            form = layer.ffn_format
            yield MatMul("ffn", index, stack.hidden, layer.ffn * (2 if stack.gated else 1), form, f"{ffn}.in")
            yield MatMul("ffn", index, layer.ffn, stack.hidden, form, f"{ffn}.out")
            yield from _deltas(shape.family, stack, index)
    hidden = (shape.tied and shape.embedding_rank) or shape.stacks[-1].hidden
    if shape.outputs:
        yield MatMul("head", 0, hidden, shape.outputs, shape.head_format, "embedding" if shape.tied else "head")


def _deltas(family: str, stack: Stack, index: int) -> Iterator[MatMul]:
    """Yield for each product of layer `index` the two of its difference, if it has one: down, then up."""
    name = f"{stack.name}.delta.{index}"
    fused = bool(DESCRIBED[family].fused_qkv)
    for part, side, k, n, form in differences(stack.layers[index], stack.hidden, stack.gated, fused):
        yield MatMul(part, index, k, n, form, f"{name}.{part}.{side}", delta=True)


def differences(layer: LayerShape, hidden: int, gated: bool, fused: bool) -> Iterator[tuple[str, str, int, int, str]]:
    """Yield part, side, k, n and number format of the products [rows, k] x [k, n] of a layer's low-rank differences, in
    pairs; `fused` says that query, key and value are one matrix of the original."""
    if not layer.attention_rank and not layer.ffn_rank:
        return
    width, kv = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
    inputs, gates = 1 if fused else 3, 2 if gated else 1
    attention, ffn = factor_format(layer.attention_format), factor_format(layer.ffn_format)
    for part, side, rank, k, n, merged, form in (
        ("attention", "qkv", layer.attention_rank, hidden, width + 2 * kv, inputs, attention),
        ("attention", "out", layer.attention_rank, width, hidden, 1, attention),
        ("ffn", "in", layer.ffn_rank, hidden, layer.ffn * gates, gates, ffn),
        ("ffn", "out", layer.ffn_rank, layer.ffn, hidden, 1, ffn),
    ):
        if rank:
            yield part, f"{side}.down", k, merged * rank, form
            yield part, f"{side}.up", rank, n, form


def _layer(name: str) -> int:
    """The first number in a dotted name, which is that of the layer wherever there are layers; else 0."""
    return next((int(word) for word in name.split(".") if word.isdigit()), 0)
