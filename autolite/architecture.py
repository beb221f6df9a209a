"""The shape of a transformer as numbers (ModelShape), and how to read it off a live model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from autolite.families import family_of, head_for

SOURCE_LAYERS = "autolite_source_layers"  # the attribute by which a model remembers its teacher's layers


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

    `embedding` is the width of the token embedding (ALBERT's is below `hidden`); `positions` the rows of the position
    table, of which not every one need be usable (`autolite.families.usable_positions`); `outputs` the width of the
    head (labels, or the vocabulary for a language model); `tied` says that the head reuses the embedding's matrix;
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

    def keep_layers(self, stack: int, indices: Sequence[int]) -> ModelShape:
        """Return a copy in which stack number `stack` keeps only the layers at `indices`, in that order.

        Weight identities are numbered again (see `numbered`) and `source_layers` follows.
        """
        layers = self.stacks[stack].layers
        source = self.source_layers or tuple(tuple(range(len(s.layers))) for s in self.stacks)
        kept = tuple(tuple(s[i] for i in indices) if n == stack else s for n, s in enumerate(source))
        return self.with_layers(stack, numbered(layers[i] for i in indices), source_layers=kept)

    def without_formats(self) -> ModelShape:
        """Return a copy in which every part is in "fp32": what the weights of a model show."""
        stacks = tuple(
            replace(s, layers=tuple(replace(x, attention_format="fp32", ffn_format="fp32") for x in s.layers))
            for s in self.stacks
        )
        return replace(self, stacks=stacks, embedding_format="fp32", head_format="fp32")


def numbered(layers: Iterable[LayerShape]) -> tuple[LayerShape, ...]:
    """Return the layers with each weight identity replaced by the index of the first layer that has it."""
    attention: dict[int, int] = {}
    ffn: dict[int, int] = {}
    return tuple(
        replace(x, attention=attention.setdefault(x.attention, i), feed_forward=ffn.setdefault(x.feed_forward, i))
        for i, x in enumerate(layers)
    )


def shape_of(model: Any) -> ModelShape:
    """Read the shape of a transformers model off its weights; it may have been cut or shared.

    Weight identities are the index of the first layer that uses them (ALBERT's are all 0); formats are "fp32". For
    images, `vocab` is 0 and `embedding` is the size of a flattened patch.

    Raises:
        ModelError: if the model's family or head is not known.
    """
    config = model.config
    family = family_of(config)
    base = model.base_model
    layers = list(base.get_submodule(family.layers))
    if family.repeated:
        layers *= int(config.num_hidden_layers)
    shapes = []
    for layer in layers:
        attention, out, ffn_out = (layer.get_submodule(p) for p in (family.attention, family.out, family.ffn_out))
        dim = int(getattr(attention, family.head_width))
        inner = 0 if family.transposed else 1
        heads = out.weight.shape[inner] // dim
        kv_heads = heads if family.fused_qkv else layer.get_submodule(family.key).weight.shape[0] // dim
        ffn = int(ffn_out.weight.shape[inner])
        shapes.append(LayerShape(heads, kv_heads, dim, ffn, id(out.weight), id(ffn_out.weight)))
    head = head_for(family, type(model).__name__)
    last = model.get_submodule(head.dense[-1][0]) if head else None
    words = base.get_submodule(family.word) if family.word else None
    table = words.weight if words is not None else base.get_submodule(family.patch).weight.flatten(1)
    stack = Stack(
        "decoder" if family.causal else "encoder",
        int(config.hidden_size),
        numbered(shapes),
        bool(family.ffn_gate),
        family.causal,
    )
    source = getattr(model, SOURCE_LAYERS, tuple(range(len(layers))))
    return ModelShape(
        family=family.name,
        stacks=(stack,),
        vocab=int(table.shape[0]) if words is not None else 0,
        embedding=int(table.shape[1]),
        positions=_positions(base, config, family.position),
        outputs=int(last.weight.shape[0]) if last is not None else 0,
        tied=last is not None and words is not None and last.weight is words.weight,
        source_layers=(tuple(source),),
    )


def _positions(base: Any, config: Any, path: str) -> int:
    """Rows of the position table, or the longest input of a model with rotary positions."""
    if not path:
        return int(config.max_position_embeddings)
    owner, _, name = path.rpartition(".")
    table = getattr(base.get_submodule(owner), name)
    return int(table.weight.shape[0] if hasattr(table, "weight") else table.shape[1])


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
