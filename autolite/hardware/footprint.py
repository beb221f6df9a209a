"""What a shape takes up: bytes of its file, of its matrices as the kernels read them, and of its activations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from autolite import formats
from autolite.architecture import CrossAttention, LayerShape, ModelShape, factor_format
from autolite.families import DESCRIBED, Head
from autolite.hardware import without_map
from autolite.measure import Workload
from autolite.packing import PLANES
from autolite.products import differences, matmuls

BYTES = 4  # activations, norms and biases are fp32
# Names, shapes and attributes of the operators in the file. Of those that make a matrix in floating point of its codes,
# and then 8-bit codes of it; and that unpack codes in two planes, or zero points.
_GRAPH_BYTES = {"layer": 2500, "around": 2300, "decoding": 700, "coding": 800, "plane": 900, "zeros": 550}
# A "thin" product is one of a low-rank difference, "codes" what decodes its 8-bit factor; "factor" is the second one of
# an embedding table; "heads" are the norms of queries and keys by head.
_GRAPH_BYTES |= {"heads": 750, "thin": 110, "codes": 140, "factor": 250}
_STORED = {form: form for form in formats.FORMATS}  # each format is read as it is stored


def head_of_shape(shape: ModelShape) -> Head | None:
    """Return the head that a model of this shape has, None if it is a bare encoder."""
    family = DESCRIBED[shape.family]
    if not shape.outputs:
        return None
    generates = family.causal and shape.outputs == shape.vocab
    return next((head for head in family.heads if (head.pooling == "none") == generates), None)


def square_layers(head: Head | None) -> int:
    """Return the number of [hidden, hidden] matrices between the last layer and the head's own (BERT's pooler)."""
    return len(head.dense) - 1 if head else 0


@lru_cache(maxsize=1 << 16)
def read_as(form: str, kernel: str, n: int, k: int) -> int:
    """Return the bytes of a matrix [n, k] of a number format as a kernel class reads it.

    A format that another one's kernel computes with is decoded to it when the model is loaded (kmeans4 to int8); the
    kernel of int4 reads codes in groups as they are stored.
    """
    return formats.nbytes(kernel if kernel in formats.FORMATS and kernel != "int4" else form, n, k)


class Kernels(NamedTuple):
    """How a layer is computed: the kernel classes of its matrices and of the factors of its low-rank differences, and
    what of its stack decides their sizes; `zeros` is the time of a product with its zeros as a part of the dense's, and
    `source` the width of what cross-attention reads."""

    hidden: int
    gated: bool
    fused: bool
    attention: str
    ffn: str
    attention_factor: str = ""
    ffn_factor: str = ""
    zeros: float = 1.0
    source: int = 0


def head_width(shape: ModelShape) -> int:
    """Return the width of what the head's last matrix multiplies."""
    return (shape.tied and shape.embedding_rank) or shape.stacks[-1].hidden


class Attention(NamedTuple):
    """The attention of a layer in numbers, without the identity of its weights: equal ones are priced once, whatever
    feed-forward network is behind them. Named tuples are looked up in half the time of dataclasses."""

    heads: int
    kv_heads: int
    head_dim: int
    form: str
    rank: int
    cross: CrossAttention | None

    @classmethod
    def of(cls, layer: LayerShape) -> Attention:
        """Return that of a layer."""
        rank, form = layer.attention_rank, layer.attention_format
        return cls(layer.heads, layer.kv_heads, layer.head_dim, form, rank, layer.cross)

    def differences(self, kernels: Kernels) -> Iterator[tuple[str, str, int, int, str]]:
        """Yield the products of its low-rank differences, as `autolite.products.differences`."""
        form, rank = self.form, self.rank
        alone = LayerShape(
            self.heads, self.kv_heads, self.head_dim, 0, 0, 0, attention_format=form, attention_rank=rank
        )
        return differences(alone, kernels.hidden, kernels.gated, kernels.fused)


class FeedForward(NamedTuple):
    """The same of the feed-forward network of a layer."""

    ffn: int
    form: str
    rank: int

    @classmethod
    def of(cls, layer: LayerShape) -> FeedForward:
        """Return that of a layer."""
        return cls(layer.ffn, layer.ffn_format, layer.ffn_rank)

    def differences(self, kernels: Kernels) -> Iterator[tuple[str, str, int, int, str]]:
        """Yield the products of its low-rank differences, as `autolite.products.differences`."""
        alone = LayerShape(0, 0, 0, self.ffn, 0, 0, ffn_format=self.form, ffn_rank=self.rank)
        return differences(alone, kernels.hidden, kernels.gated, kernels.fused)


class Layer(NamedTuple):
    """A layer of a shape: its stack's place, the identities of its weights, its two halves, and its zeros."""

    stack: int
    attention_weights: int
    ffn_weights: int
    attention: Attention
    ffn: FeedForward
    sparsity: str


def layers_of(shape: ModelShape) -> list[Layer]:
    """Return all layers of a shape, in order."""
    return [
        Layer(place, each.attention, each.feed_forward, Attention.of(each), FeedForward.of(each), each.sparsity)
        for place, stack in enumerate(shape.stacks)
        for each in stack.layers
    ]


@dataclass(frozen=True, eq=False, slots=True)
class Computed:
    """A shape and how it is computed: the kernel classes of number formats, and of each layer."""

    shape: ModelShape
    chosen: Mapping[str, str]
    layers: list[tuple[Layer, Kernels]]

    @classmethod
    def by(
        cls, shape: ModelShape, layers: Sequence[Layer], chosen: Mapping[str, str], sparsity: Mapping[str, float]
    ) -> Computed:
        """Choose kernel classes.

        Args:
            shape: of the model.
            layers: its `layers_of`.
            chosen: the kernel class that computes with each number format.
            sparsity: the time of a product with such zeros, as a part of the dense one's.
        """
        fused = bool(layers and DESCRIBED[shape.family].fused_qkv)
        known: dict[tuple[object, ...], Kernels] = {}
        found = []
        for layer in layers:
            attention, ffn = layer.attention, layer.ffn
            crosses = attention.cross is not None
            key = (layer.stack, attention.form, ffn.form, attention.rank > 0, ffn.rank > 0, layer.sparsity, crosses)
            if key not in known:
                stack = shape.stacks[layer.stack]
                known[key] = Kernels(
                    stack.hidden,
                    stack.gated,
                    fused,
                    chosen[attention.form],
                    chosen[ffn.form],
                    chosen[factor_format(attention.form)] if attention.rank else "",
                    chosen[factor_format(ffn.form)] if ffn.rank else "",
                    sparsity.get(layer.sparsity, 1.0),
                    shape.stacks[0].hidden if crosses else 0,
                )
            found.append((layer, known[key]))
        return cls(shape, chosen, found)


@lru_cache(maxsize=1 << 16)
def attention_read(part: Attention, kernels: Kernels) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the bytes of the matrices of attention as the kernels read them, and of its low-rank differences."""
    query, kv, hidden = part.heads * part.head_dim, part.kv_heads * part.head_dim, kernels.hidden
    matrices = [(query + 2 * kv, hidden), (hidden, query)]
    if (cross := part.cross) is not None:
        matrices += [(2 * cross.width, kernels.source), (cross.width, hidden), (hidden, cross.width)]
    own = (read_as(form, kernels.attention_factor, n, k) for _, _, k, n, form in part.differences(kernels))
    return tuple(read_as(part.form, kernels.attention, n, k) for n, k in matrices), tuple(own)


@lru_cache(maxsize=1 << 16)
def ffn_read(part: FeedForward, kernels: Kernels) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the same of a feed-forward network."""
    inner, hidden = part.ffn * (2 if kernels.gated else 1), kernels.hidden
    matrices = [(inner, hidden), (hidden, part.ffn)]
    own = (read_as(form, kernels.ffn_factor, n, k) for _, _, k, n, form in part.differences(kernels))
    return tuple(read_as(part.form, kernels.ffn, n, k) for n, k in matrices), tuple(own)


def reads(computed: Computed) -> list[int]:
    """Return the bytes of the matrix of each product as its kernel reads it, in order; shared ones for each use."""
    shape, chosen = computed.shape, computed.chosen
    if shape.unmapped is not None:
        return [read_as(p.format, chosen[p.format], p.n, p.k) for p in matmuls(shape)]
    found: list[int] = []
    for layer, kernels in computed.layers:
        for shared, own in (attention_read(layer.attention, kernels), ffn_read(layer.ffn, kernels)):
            found += shared + own
    return found + ([_head_read(computed)] if shape.outputs else [])


def weights_read(computed: Computed, stack: int | None = None) -> int:
    """Return the bytes of all matrices of products, or of the head's and one stack's, as the kernels read them; what
    several layers share counts once."""
    shape, chosen = computed.shape, computed.chosen
    if shape.unmapped is not None:
        return sum({p.weights: read_as(p.format, chosen[p.format], p.n, p.k) for p in matmuls(shape)}.values())
    total = _head_read(computed) if shape.outputs else 0
    attentions: set[tuple[int, int]] = set()
    ffns: set[tuple[int, int]] = set()
    for layer, kernels in computed.layers:
        if stack in (None, layer.stack):
            attention, own = attention_read(layer.attention, kernels)
            ffn, further = ffn_read(layer.ffn, kernels)
            total += sum(own) + sum(further)
            if (key := (layer.stack, layer.attention_weights)) not in attentions:
                attentions.add(key)
                total += sum(attention)
            if (key := (layer.stack, layer.ffn_weights)) not in ffns:
                ffns.add(key)
                total += sum(ffn)
    return total


def _head_read(computed: Computed) -> int:
    shape = computed.shape
    return read_as(shape.head_format, computed.chosen[shape.head_format], shape.outputs, head_width(shape))


def file_size(shape: ModelShape) -> int:
    """Return the bytes of the artifact: matrices and tables in their formats, everything else in fp32, the graph."""
    total = weights_read(Computed.by(shape, layers_of(shape), _STORED, {}))
    if shape.unmapped is not None:
        return without_map.file_size(shape, total)
    family = DESCRIBED[shape.family]
    hidden = shape.stacks[0].hidden
    norm = 1 if family.rms_norm else 2
    floats = graph = 0
    tied_head = bool(shape.outputs) and shape.tied  # whose matrix is the embedding's
    if family.patch:
        floats += shape.positions * hidden
    elif family.position:
        total += formats.nbytes(shape.embedding_format, shape.positions, shape.embedding)
    if family.token_type:
        floats += (1 if family.positions_after_padding else 2) * shape.embedding
    if family.embedding_norm:
        floats += norm * shape.embedding
    if family.embedding_projection or family.patch:
        total += formats.nbytes(shape.embedding_format, hidden, shape.embedding)
        floats += hidden * (2 if family.class_token else 1)
    if shape.vocab and not tied_head:
        total += formats.nbytes(shape.embedding_format, shape.vocab, shape.embedding_rank or shape.embedding)
    if shape.embedding_rank:
        form = factor_format(shape.embedding_format)
        total += formats.nbytes(form, shape.embedding, shape.embedding_rank) + _GRAPH_BYTES["factor"]
    seen: set[tuple[str, str, int]] = set()
    for stack in shape.stacks:
        norms = 2 * norm * stack.hidden + (2 * stack.layers[0].head_dim if family.query_norm else 0)
        floats += norms * (1 if family.repeated else len(stack.layers))
        floats += sum(norm * stack.hidden for layer in stack.layers if layer.cross is not None)
        for layer in stack.layers:
            # With low-rank differences each layer has its own biases.
            is_new = (name := (stack.name, "attention", layer.attention)) not in seen
            graph += 2 * is_new * _decoding(layer.attention_format)
            if is_new or layer.attention_rank:
                seen.add(name)
                qkv = (layer.heads + 2 * layer.kv_heads) * layer.head_dim
                floats += qkv if not family.rms_norm or family.name == "qwen2" else 0
                floats += 0 if family.rms_norm else stack.hidden
                floats += 3 * layer.cross.width + stack.hidden if layer.cross is not None else 0
            is_new = (name := (stack.name, "ffn", layer.feed_forward)) not in seen
            graph += 2 * is_new * _decoding(layer.ffn_format)
            if is_new or layer.ffn_rank:
                seen.add(name)
                floats += 0 if family.rms_norm else layer.ffn + stack.hidden
    hidden = shape.stacks[-1].hidden
    floats += norm * hidden if family.final_norm else 0
    square = square_layers(head_of_shape(shape))
    total += square * formats.nbytes(shape.head_format, hidden, hidden)
    floats += square * hidden + (shape.outputs if not family.causal else 0)
    layers = sum(len(stack.layers) for stack in shape.stacks)
    looked_up = (bool(shape.vocab) and not tied_head) + bool(family.position and not family.patch)
    graph += layers * (_GRAPH_BYTES["layer"] + bool(family.query_norm) * _GRAPH_BYTES["heads"]) + _GRAPH_BYTES["around"]
    graph += bool(shape.outputs) * _decoding(shape.head_format)
    graph += bool(family.embedding_projection or family.patch) * _decoding(shape.embedding_format)
    graph += looked_up * _decoding(shape.embedding_format, coded=False)
    return total + BYTES * floats + graph + _graph_of_deltas(shape)


def _graph_of_deltas(shape: ModelShape) -> int:
    """Two thin products for each matrix of a block with low-rank differences. Matrices that are else merged into one
    product stand apart there, and are decoded one by one."""
    total = 0
    decoded: set[tuple[str, int]] = set()
    for stack in shape.stacks:
        inputs, gates = 1 if DESCRIBED[shape.family].fused_qkv else 3, 2 if stack.gated else 1
        for layer in stack.layers:
            attention = (f"{stack.name}.attention", layer.attention, layer.attention_rank, layer.attention_format)
            ffn = (f"{stack.name}.ffn", layer.feed_forward, layer.ffn_rank, layer.ffn_format)
            for (name, number, rank, form), merged in ((attention, inputs), (ffn, gates)):
                if not rank:
                    continue
                codes = 0 if factor_format(form) in ("fp32", "bf16") else _GRAPH_BYTES["codes"]
                total += 2 * (merged + 1) * (_GRAPH_BYTES["thin"] + codes)
                if (name, number) not in decoded:
                    decoded.add((name, number))
                    total += (merged - 1) * _decoding(form)
    return total


@lru_cache
def _decoding(form: str, coded: bool = True) -> int:
    """Return the bytes of the operators that decode a matrix in this format; `coded` if to 8 bits where it can be
    multiplied so, which tables are not."""
    layout, activations = formats.get(form).layout, formats.get(form).activations
    if isinstance(layout, formats.Float) or (layout.linear and layout.bits == 8):
        return 0
    planes = len(PLANES[layout.bits]) - 1
    total = _GRAPH_BYTES["decoding"] + planes * _GRAPH_BYTES["plane"]
    total += _GRAPH_BYTES["coding"] if coded and activations == "any" else 0
    return total + (0 if getattr(layout, "symmetric", True) else _GRAPH_BYTES["zeros"] + planes * _GRAPH_BYTES["plane"])


def activations(shape: ModelShape, workload: Workload) -> float:
    """Return the most bytes of activations alive at once, and the keys and values of a language model's context."""
    if shape.unmapped is not None:
        return without_map.activations(shape, workload)
    rows = workload.batch * workload.tokens
    context = workload.tokens + workload.generated
    alive = cached = 0
    for stack in shape.stacks:
        for layer in stack.layers:
            width, kv = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
            scores = workload.batch * layer.heads * workload.tokens**2
            inner = max(rows * (width + 2 * kv) + 2 * scores, 2 * rows * layer.ffn)
            alive = max(alive, 2 * rows * stack.hidden + inner)
            cached += 2 * kv * workload.batch * context if stack.causal else 0
            if (cross := layer.cross) is not None:
                cached += 2 * cross.width * workload.batch * workload.tokens * cross.sources
    logits = rows * shape.outputs if shape.stacks[-1].causal else 0
    return BYTES * (max(alive, logits) + cached)
