"""The shape of a transformer as numbers (ModelShape)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One transformer layer.

    `attention` and `feed_forward` are the identities of its weights: layers with equal numbers use one set of
    weights, stored once. The formats name the number format (`autolite.formats`) of each part's matrices.
    """

    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    attention: int
    feed_forward: int
    attention_format: str = "fp32"
    ffn_format: str = "fp32"


@dataclass(frozen=True, slots=True)
class Stack:
    """A named stack of layers ("encoder" or "decoder") of one hidden width."""

    name: str
    hidden: int
    layers: tuple[LayerShape, ...]
    gated: bool = False
    causal: bool = False


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A whole model in numbers: enough to price a plan, to rebuild a reshaped model, and to draw it.

    `embedding` is the width of the token embedding (ALBERT's is below `hidden`); `outputs` the width of the head
    (labels, or the vocabulary for a language model); `tied` says that the head reuses the embedding's matrix;
    `source_layers` gives, for each layer kept, the index of the teacher's layer it came from (one tuple a stack).
    """

    family: str
    stacks: tuple[Stack, ...]
    vocab: int
    embedding: int
    positions: int
    outputs: int
    tied: bool = False
    embedding_format: str = "fp32"
    head_format: str = "fp32"
    source_layers: tuple[tuple[int, ...], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the shape as plain JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ModelShape:
        """Rebuild a shape from `to_json`'s form."""
        stacks = tuple(
            Stack(**{**s, "layers": tuple(LayerShape(**layer) for layer in s["layers"])}) for s in data["stacks"]
        )
        source = tuple(tuple(s) for s in data["source_layers"])
        return cls(**{**data, "stacks": stacks, "source_layers": source})

    def with_layers(self, stack: int, layers: tuple[LayerShape, ...], **changes: Any) -> ModelShape:
        """Return a copy in which stack number `stack` has these layers (and the shape these other changes)."""
        stacks = list(self.stacks)
        stacks[stack] = replace(stacks[stack], layers=layers)
        return replace(self, stacks=tuple(stacks), **changes)


@dataclass(frozen=True, slots=True)
class MatMul:
    """A product of activations [rows, k] with a weight matrix [k, n]. Equal `weights` are one stored matrix."""

    part: str  # "attention", "ffn" or "head"
    layer: int
    k: int
    n: int
    format: str
    weights: str


def matmuls(shape: ModelShape) -> Iterator[MatMul]:
    """Yield every weight matrix product of one forward pass, in order (query, key and value merged into one)."""
    for stack in shape.stacks:
        for index, layer in enumerate(stack.layers):
            attention, ffn = f"{stack.name}.attention.{layer.attention}", f"{stack.name}.ffn.{layer.feed_forward}"
            width, kv = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
            form = layer.attention_format
            yield MatMul("attention", index, stack.hidden, width + 2 * kv, form, f"{attention}.qkv")
            yield MatMul("attention", index, width, stack.hidden, form, f"{attention}.out")
            form = layer.ffn_format
            yield MatMul("ffn", index, stack.hidden, layer.ffn * (2 if stack.gated else 1), form, f"{ffn}.in")
            yield MatMul("ffn", index, layer.ffn, stack.hidden, form, f"{ffn}.out")
    hidden = shape.stacks[-1].hidden
    if shape.outputs:
        yield MatMul("head", 0, hidden, shape.outputs, shape.head_format, "embedding" if shape.tied else "head")
