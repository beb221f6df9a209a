"""The shape of a transformer as numbers (ModelShape), and how to read it off a live model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from autolite.families import DESCRIBED, family_of, head_for, is_mapped

SOURCE_LAYERS = "autolite_source_layers"  # the attribute by which a model remembers its teacher's layers


@dataclass(frozen=True, slots=True)
class CrossAttention:
    """Attention to the outputs of a model's first stack, in a layer of its second.

    `sources` is how many layers of that stack it reads, the last ones, one after the other.
    """

    heads: int
    head_dim: int
    sources: int = 1

    @property
    def width(self) -> int:
        """Width of its queries, keys and values."""
        return self.heads * self.head_dim


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One transformer layer.

    `attention` and `feed_forward` are the identities of its weights: layers with equal numbers use one set of
    weights, stored once. The formats name the number format (`autolite.formats`) of each part's matrices. A rank
    above 0 says that each matrix of the part has a difference of that rank, the layer's own (`autolite.delta`).
    `sparsity` is the pattern of the zeros in its matrices ("none", "2:4", "50%"; see `autolite.techniques.sparsity`).
    The matrices of `cross` are attention's: of its format, and shared where those of attention are.
    """

    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    attention: int
    feed_forward: int
    attention_format: str = "fp32"
    ffn_format: str = "fp32"
    attention_rank: int = 0
    ffn_rank: int = 0
    sparsity: str = "none"
    cross: CrossAttention | None = None


@dataclass(frozen=True, slots=True)
class Stack:
    """A named stack of layers ("encoder" or "decoder") of one hidden width."""

    name: str
    hidden: int
    layers: tuple[LayerShape, ...]
    gated: bool = False
    causal: bool = False


@dataclass(frozen=True, slots=True)
class Product:
    """A weight matrix [n, k] of a model that has no map: it multiplies `calls` times in one pass, for every token or,
    if `pooled`, for one vector a sequence. `part` is "attention", "ffn", "embedding" or "head", `weights` its name."""

    part: str
    weights: str
    n: int
    k: int
    calls: int = 1
    pooled: bool = False
    format: str = "fp32"


@dataclass(frozen=True, slots=True)
class Unmapped:
    """What stands for the layers of a model whose architecture the map does not have.

    Attributes:
        products: the matrices it multiplies with, in the order of its modules.
        layers: how many layers its configuration has, 0 if it does not say.
        heads: attention heads of a layer, 0 if it does not say.
        floats: values of all other parameters (norms, biases, positions), the token embedding aside.
    """

    products: tuple[Product, ...]
    layers: int
    heads: int
    floats: int


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A whole model in numbers: enough to price a plan, to rebuild a reshaped model, and to draw it.

    Of two stacks the first reads the input once, and the second, whose layers attend to it, generates token by token.
    A model that the map of architectures does not have has transformers' model type for its `family`, one stack
    without layers, and its matrices one by one in `unmapped`.

    `embedding` is the width of the token embedding (ALBERT's is below `hidden`); if its table is a product of two
    factors, `embedding_rank` is the width of the stored one, else 0; `positions` the rows of the position
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
    unmapped: Unmapped | None = None
    embedding_rank: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the shape as plain JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ModelShape:
        """Rebuild a shape from `to_json`'s form."""
        stacks = tuple(Stack(**{**s, "layers": tuple(map(_layer_from_json, s["layers"]))}) for s in data["stacks"])
        source = tuple(tuple(s) for s in data["source_layers"])
        other = data.get("unmapped")
        if other is not None:
            other = Unmapped(**{**other, "products": tuple(Product(**product) for product in other["products"])})
        return cls(**{**data, "stacks": stacks, "source_layers": source, "unmapped": other})

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

    def with_formats(
        self, attention: str | Sequence[str], ffn: str | Sequence[str], embedding: str, head: str
    ) -> ModelShape:
        """Return a copy with these number formats in its layers and around them; `attention` and `ffn` are one format
        for all layers, or a sequence of one for each (of the first stack, then of the next).

        Raises:
            ValueError: if there are not as many formats as layers, layers with the same weights differ in their format,
                or there are several for a model without a map.
        """
        other, formats = self.unmapped, {"attention": attention, "ffn": ffn, "embedding": embedding, "head": head}
        if other is not None:
            for part, given in formats.items():
                if not isinstance(given, str):
                    raise ValueError(f"{part}: one format is needed: which layer a matrix is in is not known")
            products = tuple(replace(p, format=str(formats[p.part])) for p in other.products)
            return replace(
                self, embedding_format=embedding, head_format=head, unmapped=replace(other, products=products)
            )
        count = sum(len(stack.layers) for stack in self.stacks)
        by_layer = [
            iter([given] * count if isinstance(given, str) else _as_many(part, given, count))
            for part, given in (("attention", attention), ("ffn", ffn))
        ]
        stacks = []
        for stack in self.stacks:
            layers = [
                replace(x, attention_format=next(by_layer[0]), ffn_format=next(by_layer[1])) for x in stack.layers
            ]
            for index, layer in enumerate(layers):
                first = layers[layer.attention], layers[layer.feed_forward]
                _agree("attention", layer.attention, index, first[0].attention_format, layer.attention_format)
                _agree("ffn", layer.feed_forward, index, first[1].ffn_format, layer.ffn_format)
            stacks.append(replace(stack, layers=tuple(layers)))
        return replace(self, stacks=tuple(stacks), embedding_format=embedding, head_format=head)

    def without_formats(self) -> ModelShape:
        """Return a copy in which every part is in "fp32" and dense: what the sizes of a model's weights show."""
        return self.with_sparsity("none").with_formats("fp32", "fp32", "fp32", "fp32")

    def with_sparsity(self, pattern: str) -> ModelShape:
        """Return a copy with this pattern of zeros in the matrices of all layers."""
        stacks = tuple(replace(s, layers=tuple(replace(x, sparsity=pattern) for x in s.layers)) for s in self.stacks)
        return replace(self, stacks=stacks)

    def with_hidden(self, stack: int, hidden: int) -> ModelShape:
        """Return a copy in which the residual stream of stack number `stack` is `hidden` wide, and the tables and
        norms of the embedding with it, where no projection lies between."""
        before = self.stacks[stack]
        family = DESCRIBED[self.family]
        apart = family.patch or family.embedding_projection or self.embedding != before.hidden
        stacks = list(self.stacks)
        stacks[stack] = replace(before, hidden=hidden)
        return replace(self, stacks=tuple(stacks), embedding=self.embedding if apart else hidden)

    @property
    def sparsity(self) -> frozenset[str]:
        """The patterns of zeros in its layers, "none" left out."""
        return frozenset(layer.sparsity for stack in self.stacks for layer in stack.layers) - {"none"}

    @property
    def formats(self) -> frozenset[str]:
        """The number formats that its parts are in."""
        layers = [layer for stack in self.stacks for layer in stack.layers]
        products = self.unmapped.products if self.unmapped is not None else ()
        parts = [form for layer in layers for form in (layer.attention_format, layer.ffn_format)]
        factor = (factor_format(self.embedding_format),) if self.embedding_rank else ()
        return frozenset({self.embedding_format, self.head_format, *factor, *parts, *(p.format for p in products)})


def _layer_from_json(data: dict[str, Any]) -> LayerShape:
    cross = data.get("cross")
    return LayerShape(**{**data, "cross": None if cross is None else CrossAttention(**cross)})


def factor_format(block: str) -> str:
    """Return the number format of the thin factors beside a matrix of format `block`: that itself if it is a
    floating-point one, else 8 bits that are decoded when the model is loaded. Few bits would save little of so little,
    and products so thin take no longer in floating point."""
    return block if block in ("fp32", "bf16") else "int8-weight"


def _as_many(part: str, formats: Sequence[str], layers: int) -> list[str]:
    if len(formats) != layers:
        raise ValueError(f"{part}: {len(formats)} formats for {layers} layers; give one, or one for each layer")
    return list(formats)


def _agree(part: str, first: int, index: int, theirs: str, ours: str) -> None:
    if ours != theirs:
        raise ValueError(
            f"{part}: layers {first} and {index} have the same weights, which cannot be both {theirs} and {ours}; give "
            "them the same format"
        )


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

    A model that the map of architectures does not have is run once on a few tokens.

    Raises:
        ModelError: if it is such a model and cannot be run on token ids alone.
    """
    if not is_mapped(model):
        return _shape_without_map(model)
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
        own = LayerShape(heads, kv_heads, dim, ffn, id(out.weight), id(ffn_out.weight))
        shapes.append(replace(own, attention_rank=getattr(out, "rank", 0), ffn_rank=getattr(ffn_out, "rank", 0)))
    head = head_for(family, type(model).__name__)
    last = model.get_submodule(head.dense[-1][0]) if head else None
    words = base.get_submodule(family.word) if family.word else None
    table = words.weight if words is not None else base.get_submodule(family.patch).weight.flatten(1)
    factor = getattr(words, "projection", None)
    stack = Stack(
        "decoder" if family.causal else "encoder",
        int(layers[0].get_submodule(family.attention_norm).weight.shape[0]),
        numbered(shapes),
        bool(family.ffn_gate),
        family.causal,
    )
    source = getattr(model, SOURCE_LAYERS, tuple(range(len(layers))))
    return ModelShape(
        family=family.name,
        stacks=(stack,),
        vocab=int(table.shape[0]) if words is not None else 0,
        embedding=int(table.shape[1] if factor is None else factor.weight.shape[0]),
        positions=_positions(base, config, family.position),
        outputs=int(last.weight.shape[0]) if last is not None else 0,
        tied=last is not None and words is not None and last.weight is words.weight,
        source_layers=(tuple(source),),
        embedding_rank=0 if factor is None else int(table.shape[1]),
    )


def _shape_without_map(model: Any) -> ModelShape:
    from autolite import unmapped  # with torch, which reading and pricing shapes does not need

    found = unmapped.look(model)
    config = model.config.get_text_config()
    table = unmapped.word_table(model)
    vocab, width = (0, 0) if table is None else table.weight.shape
    products = []
    for matrix in found.matrices:
        if matrix.calls:
            k, n = matrix.module.weight.shape[:: 1 if unmapped.is_conv1d(matrix.module) else -1]
            products.append(Product(matrix.group, matrix.key, int(n), int(k), matrix.calls, matrix.pooled))
    layers, heads = (int(getattr(config, f"num_{what}", 0) or 0) for what in ("hidden_layers", "attention_heads"))
    hidden = getattr(config, "hidden_size", None) or getattr(config, "d_model", None) or width
    return ModelShape(
        family=str(config.model_type),
        stacks=(Stack("decoder" if found.every_token else "encoder", int(hidden), (), causal=found.every_token),),
        vocab=int(vocab),
        embedding=int(width),
        positions=unmapped.positions_of(model),
        outputs=found.outputs,
        tied=found.tied,
        source_layers=((),),
        unmapped=Unmapped(tuple(products), layers, heads, found.floats),
    )


def _positions(base: Any, config: Any, path: str) -> int:
    """Rows of the position table, or the longest input of a model with rotary positions."""
    if not path:
        return int(config.max_position_embeddings)
    owner, _, name = path.rpartition(".")
    table = getattr(base.get_submodule(owner), name)
    return int(table.weight.shape[0] if hasattr(table, "weight") else table.shape[1])
