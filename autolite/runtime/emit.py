"""Student -> ONNX, straight from the architecture map; what the map does not have is exported by torch
(`autolite.runtime.exported`).

Decoders take keys and values of earlier calls and give them back with those of the new tokens, so that one graph reads
a prompt (with nothing before it) and goes on from there token by token. Their names are those that optimum,
transformers.js and onnxruntime-genai use.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from onnx import TensorProto

from autolite.errors import ModelError
from autolite.families import family_of
from autolite.formats import Float
from autolite.measure import Workload
from autolite.parts import (
    EmbeddingParts,
    HeadParts,
    LayerParts,
    Matrix,
    Norm,
    embeddings_of,
    head_of,
    layers_of,
)
from autolite.runtime import exported
from autolite.runtime.attention import Heads, Part, attend, attend_cached, attend_first, rotate
from autolite.runtime.blocks import BeyondError, activate, add_and_normalize, normalize, project
from autolite.runtime.graph import Graph, Output
from autolite.runtime.linear import Weights, decoded, encoded_of, lookup, product, products, weights_of
from autolite.runtime.sequences import PRESENT, Sequences
from autolite.runtime.variants import Choices, Place, usual
from autolite.techniques.base import Student

FILE = "model.onnx"


def emit(
    student: Student,
    folder: Path,
    workload: Workload | None = None,
    choices: Choices = usual,
    cache: bool = True,
) -> list[Path]:
    """Write `model.onnx` (and, above 2 GiB, its data file) into `folder` and return the files.

    Args:
        student: what to emit.
        folder: where to; made if it is not there.
        workload: the call that the graph should be fast at; any other is computed as well.
        choices: which option to take at each place where equivalent nodes can stand.
        cache: whether a decoder of the map goes on from the keys and values of earlier calls.

    Raises:
        ModelError: if the model has a part that cannot be emitted, such as positions that change with the length.
        StorageError: if the files cannot be written.
    """
    if student.shape.unmapped is None:
        with suppress(BeyondError), torch.no_grad():
            return _Emitter.of(student, workload or Workload(), choices, cache).emit(folder / FILE)
    return exported.emit(student, folder / FILE, workload, choices)


@dataclass(frozen=True, eq=False)
class _Emitter:
    """One emission: the graph so far and what is read while it grows."""

    student: Student
    graph: Graph
    sequences: Sequences
    head: HeadParts
    layers: list[LayerParts]
    causal: bool
    pre_norm: bool
    activation: str
    generated: int
    choices: Choices
    unsigned: bool
    presents: list[Output]

    @classmethod
    def of(cls, student: Student, workload: Workload, choices: Choices, cache: bool) -> _Emitter:
        model = student.model
        family = family_of(model.config)
        layers, head = layers_of(model), head_of(model)
        for layer in layers:
            if layer.window is not None and layer.window < student.shape.positions:
                raise BeyondError(f"layer {layer.index} attends to a sliding window of {layer.window} tokens")
        graph = Graph()
        tokens = student.shape.positions if family.patch else workload.tokens
        generates = family.causal and head.pooling == "none"
        return cls(
            student=student,
            graph=graph,
            sequences=Sequences(graph, workload.batch, tokens, cached=cache and generates),
            head=head,
            layers=layers,
            causal=family.causal,
            pre_norm=family.pre_norm,
            activation=str(getattr(model.config, family.activation)),
            generated=workload.generated,
            choices=choices,
            unsigned=choices(Place("int8")) == "uint8",
            presents=[],
        )

    @property
    def batch(self) -> int:
        return self.sequences.batch

    @property
    def rows(self) -> int:
        return self.sequences.rows

    def emit(self, file: Path) -> list[Path]:
        with self.graph.scope("embedding"):
            x = self.embedding(embeddings_of(self.student.model))
        for layer in self.layers:
            # Only [CLS] is read after the last layer: of the others, just keys and values are needed there.
            first_only = self.head.pooling == "first" and layer.index == len(self.layers) - 1
            with self.graph.scope(f"layer.{layer.index}"):
                x = self.layer(layer, x, first_only)
        with self.graph.scope("head"):
            logits = self.logits(x)
        return self.graph.save(file, self.sequences.inputs, logits, *self.presents)

    def embedding(self, parts: EmbeddingParts) -> str:
        """Return the first hidden state, [batch * tokens, hidden]."""
        graph = self.graph
        if parts.patch is not None:
            return self.patches(parts, parts.patch)
        assert parts.word is not None
        x = self.lookup(self.sequences.take_text(), parts.word)
        if parts.factor is not None:
            x = self.thin(x, parts.factor)
        if parts.token_type is not None:
            types = parts.token_type
            if types.weight.shape[0] > 1:
                x = graph.op("Add", x, self.lookup(self.sequences.take_types(), types))
            else:
                x = graph.op("Add", x, graph.constant(types.weight[0]))
        if parts.position is not None and parts.positions_after_padding:
            real = graph.op("Cast", graph.op("Equal", "input_ids", self.padding()), to=TensorProto.INT32)
            real = graph.op("Sub", graph.constant(torch.tensor(1, dtype=torch.int32)), real)
            count = graph.op("Mul", graph.op("CumSum", real, graph.constant(torch.tensor(1))), real)
            offset = graph.constant(torch.tensor(parts.position_offset - 1, dtype=torch.int32))
            ids = graph.op("Reshape", graph.op("Add", count, offset), graph.constant([-1]))
            x = graph.op("Add", x, self.lookup_positions(ids, parts.position))
        elif parts.position is not None:
            positions = self.lookup_positions(self.sequences.positions(), parts.position)
            apart = self.sequences.apart(x, parts.position.weight.shape[1])
            x = self.sequences.flatten(graph.op("Add", apart, positions))
        if parts.norm is not None:
            x = normalize(graph, x, parts.norm)
        return x if parts.projection is None else self.product(x, (parts.projection,), self.rows)

    def patches(self, parts: EmbeddingParts, patch: Matrix) -> str:
        """Return the first hidden state of images: a product with each patch, the class token before them."""
        graph, config = self.graph, self.student.model.config
        side, channels, size = config.image_size, config.num_channels, config.patch_size
        count = side // size
        images = self.sequences.take_images(channels, side)
        x = graph.op("Reshape", images, graph.constant([-1, channels, count, size, count, size]))
        x = graph.op("Transpose", x, perm=(0, 2, 4, 1, 3, 5))
        x = graph.op("Reshape", x, graph.constant([-1, channels * size * size]))
        x = self.product(x, (patch,), self.batch * count * count)
        hidden = patch.weight.shape[0]
        x = graph.op("Reshape", x, graph.constant([-1, count * count, hidden]))
        if parts.class_token is not None:
            batch = graph.op("Shape", images, start=0, end=1)
            shape = graph.op("Concat", batch, graph.constant([1, hidden]), axis=0)
            x = graph.op("Concat", graph.op("Expand", graph.constant(parts.class_token), shape), x, axis=1)
        if parts.position is not None:
            x = graph.op("Add", x, graph.constant(parts.position.weight))
        return self.sequences.flatten(x)

    def layer(self, layer: LayerParts, x: str, first_only: bool) -> str:
        """Return the next hidden state: [batch * tokens, hidden], or [batch, hidden] with `first_only`."""
        graph = self.graph
        with graph.scope("attention"):
            source = normalize(graph, x, layer.attention_norm) if self.pre_norm else x
            x = self.sequences.first(x, self.hidden) if first_only else x
            mixed = self.attention(layer, source, first_only)
            x = graph.op("Add", x, mixed) if self.pre_norm else self.add_norm(x, mixed, layer.attention_norm)
        with graph.scope("ffn"):
            source = normalize(graph, x, layer.ffn_norm) if self.pre_norm else x
            inner = self.feed_forward(layer, source, self.batch if first_only else self.rows)
            return graph.op("Add", x, inner) if self.pre_norm else self.add_norm(x, inner, layer.ffn_norm)

    def attention(self, layer: LayerParts, x: str, first_only: bool) -> str:
        """Return the attention block's output; queries are those of the first tokens only with `first_only`."""
        graph, dim = self.graph, layer.head_dim
        heads = Heads(layer.heads, layer.kv_heads, dim, layer.scale, self.causal, first_only)
        width, kv = layer.heads * dim, layer.kv_heads * dim
        if first_only:
            mixed = self.attention_of_first(layer, x, heads)
            return self.product(mixed, (layer.out,), self.batch)
        query, key, value = self.query_key_value(layer, x, width, kv)
        query, key = self.head_norm(query, layer.query_norm, width), self.head_norm(key, layer.key_norm, kv)
        query, key = self.rotate(query), self.rotate(key)
        mixed = (self.attend_cached if self.sequences.cached else self.attend)(layer.index, query, key, value, heads)
        # Not Flatten: what shape inference makes of the operator Attention is no use to it.
        return self.product(graph.op("Reshape", mixed, graph.constant([-1, width])), (layer.out,), self.rows)

    def attend(self, layer: int, query: str, key: str, value: str, heads: Heads) -> str:
        sizes = (self.batch, self.sequences.tokens, heads.heads, heads.kv_heads, heads.dim, int(heads.causal))
        option = self.choices(Place("attention", sizes=sizes))
        return attend(self.graph, query, key, value, self.sequences.mask, heads, option)

    def attend_cached(self, layer: int, query: str, key: str, value: str, heads: Heads) -> str:
        past = self.sequences.take_past(layer, heads.kv_heads, heads.dim)
        # One option for all layers, that of the widest: whoever calls the model has one way to keep what it gives.
        widest = max(self.layers, key=lambda each: (each.heads, each.kv_heads))
        sizes = (self.batch, self.sequences.tokens, self.generated, widest.heads, widest.kv_heads, widest.head_dim)
        option = self.choices(Place("cached", sizes=sizes))
        mask, tokens = self.sequences.mask, self.sequences.count()
        mixed, *presents = attend_cached(self.graph, query, key, value, mask, tokens, past, heads, option)
        dims: list[str | int] = ["batch", heads.kv_heads, "past + tokens", heads.dim]
        self.presents.extend(
            (each, f"{PRESENT}{layer}.{part}", dims) for part, each in zip(("key", "value"), presents, strict=True)
        )
        return mixed

    def query_key_value(self, layer: LayerParts, x: str, width: int, kv: int) -> tuple[str, str, str]:
        """Project [rows, hidden] to queries [batch, tokens, width], keys and values [batch, tokens, kv]."""
        if not self.separate(layer):
            merged = self.merged(layer)
            found = project(self.graph, x, merged, self.kernel(merged, self.rows), (width, kv, kv))
        else:
            parts = [self.weights((m,)) for m in (layer.query, layer.key, layer.value)]
            kernel = self.choices(Place("product", parts[0].format, (self.rows, parts[0].k, width + 2 * kv)))
            whole = kernel != "float" and parts[0].delta is None
            found = products(self.graph, self.sequences.apart(x, parts[0].k) if whole else x, parts, kernel)
            if whole:
                return found[0], found[1], found[2]
        query, key, value = (self.sequences.apart(x, n) for x, n in zip(found, (width, kv, kv), strict=True))
        return query, key, value

    def separate(self, layer: LayerParts) -> bool:
        """Whether query, key and value are products of their own: because that is faster, or because each has a
        low-rank difference. Layers that share them agree in this."""
        if layer.qkv is None and layer.query.delta is not None:
            return True
        form, (width, hidden) = encoded_of(self.student.encoded, layer.query).format, layer.query.weight.shape
        sizes = (self.rows, hidden, width, layer.key.weight.shape[0])
        return self.choices(Place("qkv", form, sizes)) != "merged"

    def merged(self, layer: LayerParts) -> Weights:
        return self.weights((layer.query, layer.key, layer.value) if layer.qkv is None else (layer.qkv,))

    def attention_of_first(self, layer: LayerParts, x: str, heads: Heads) -> str:
        """Return what the first token of each sequence attends to, [batch, width]."""
        graph, width, hidden = self.graph, layer.heads * layer.head_dim, layer.query.weight.shape[1]
        separate = self.separate(layer)
        q = self.weights((layer.query,)) if separate else self.merged(layer)
        one = self.sequences.first(x, hidden)
        query = product(graph, one, q, self.kernel(q, self.batch), None if separate else (0, width))
        keys: Part = (self.weights((layer.key,)), None) if separate else (self.merged(layer), (width, 2 * width))
        values: Part = (
            (self.weights((layer.value,)), None) if separate else (self.merged(layer), (2 * width, 3 * width))
        )
        tokens = self.sequences.tokens
        sizes = (self.batch, tokens, layer.heads, layer.head_dim, hidden)
        option = self.choices(Place("first", q.format, sizes))
        place = Place("attention", sizes=(self.batch, tokens, layer.heads, layer.kv_heads, layer.head_dim, 0))
        kernels = self.kernel(keys[0], self.rows), self.choices(place)
        whole, mask = self.sequences.apart(x, hidden), self.sequences.mask
        return attend_first(graph, query, whole, keys, values, mask, heads, option, kernels)

    def feed_forward(self, layer: LayerParts, x: str, rows: int) -> str:
        down = self.weights((layer.ffn_out,))
        gelu = self.choices(Place("gelu", down.format, (rows, down.k)))
        if layer.ffn_gate is None:
            inner = activate(self.graph, self.product(x, (layer.ffn_in,), rows), self.activation, gelu)
        else:
            if layer.ffn_in.delta is None:
                up = self.weights((layer.ffn_gate, layer.ffn_in))
                gate, value = project(self.graph, x, up, self.kernel(up, rows), (down.k, down.k))
            else:
                parts = [self.weights((matrix,)) for matrix in (layer.ffn_gate, layer.ffn_in)]
                gate, value = products(self.graph, x, parts, self.kernel(parts[0], rows))
            inner = self.graph.op("Mul", activate(self.graph, gate, self.activation, gelu), value)
        return product(self.graph, inner, down, self.kernel(down, rows))

    def logits(self, x: str) -> Output:
        """Return the first output: [batch, labels], or [batch, tokens, vocab], of as many tokens as are asked for."""
        head = self.head
        if not head.dense:
            raise ModelError(f"{type(self.student.model).__name__} has no head, so there are no logits to emit")
        if head.pooling == "last":
            x = self.sequences.last(x, self.hidden, self.padding())
        elif self.sequences.cached:
            x = self.sequences.kept(x, self.hidden)
        if head.final_norm is not None:
            x = normalize(self.graph, x, head.final_norm)
        for matrix, activation in head.dense:
            table = head.tied and matrix is head.dense[-1][0]
            if table and head.factor is not None:
                x = self.thin(x, head.factor, transposed=True)
            x = self.product(x, (matrix,), self.rows if head.pooling == "none" else self.batch, table)
            x = activate(self.graph, x, activation) if activation else x
        outputs = self.student.shape.outputs
        if head.pooling == "none":
            tokens = "kept" if self.sequences.cached else "tokens"
            return self.sequences.logits(x, outputs), "logits", ["batch", tokens, outputs]
        return x, "logits", ["batch", outputs]

    # Small pieces

    @property
    def hidden(self) -> int:
        return self.student.shape.stacks[0].hidden

    def weights(self, matrices: Sequence[Matrix], table: bool = False) -> Weights:
        return weights_of(matrices, self.student.encoded, self.student.ranges, table, self.unsigned)

    def kernel(self, weights: Weights, rows: int) -> str:
        return self.choices(Place("product", weights.format, (rows, weights.k, weights.n)))

    def product(self, x: str, matrices: Sequence[Matrix], rows: int, table: bool = False) -> str:
        weights = self.weights(matrices, table)
        return product(self.graph, x, weights, self.kernel(weights, rows))

    def thin(self, x: str, factor: Matrix, transposed: bool = False) -> str:
        """Multiply `x` with a factor [n, k] in float32, or with its transpose, which is the same stored matrix."""
        value, by_rows = decoded(self.graph, self.weights((factor,)))
        return self.graph.op("Gemm", x, value, transB=int(by_rows != transposed))

    def lookup(self, ids: str, table: Matrix) -> str:
        unsigned = self.unsigned and self.head.tied
        return lookup(self.graph, ids, table, self.student.encoded, unsigned, self.lookup_option(table))

    def lookup_option(self, table: Matrix) -> str:
        form = encoded_of(self.student.encoded, table).format
        return self.choices(Place("lookup", form, (self.rows, table.weight.shape[1])))

    def lookup_positions(self, ids: str, table: Matrix) -> str:
        """Look up rows of a small table. In formats whose rows take several operators to decode, the whole table is
        decoded when the model is loaded: in 3 bits these took 8 % of a call of 1 ms."""
        weights = self.weights((table,), table=True)
        if weights.eight or isinstance(weights.layout, Float) or self.lookup_option(table) == "blocks":
            return self.lookup(ids, table)
        value, _ = decoded(self.graph, weights)
        return self.graph.op("Gather", value, ids)

    def add_norm(self, x: str, y: str, norm: Norm) -> str:
        place = Place("norm", sizes=(self.rows, norm.weight.shape[0]))
        return add_and_normalize(self.graph, x, y, norm, self.choices(place))

    def head_norm(self, x: str, norm: Norm | None, width: int) -> str:
        """Normalise each head of `x` [batch, tokens, width] by itself (Qwen3)."""
        if norm is None:
            return x
        heads = self.graph.op("Reshape", x, self.graph.constant([-1, norm.weight.shape[0]]))
        return self.sequences.apart(normalize(self.graph, heads, norm), width)

    def rotate(self, x: str) -> str:
        """Turn the heads of `x` [batch, tokens, width] by their positions, if the model does."""
        model = self.student.model
        path = family_of(model.config).rotary
        if not path:
            return x
        # All places, where ONNX Runtime would do with the first: OpenVINO reads that as the position of every token.
        rows = self.graph.op("Expand", self.sequences.places(), self.graph.op("Shape", "input_ids"))
        return rotate(self.graph, x, self.sequences.positions(), rows, model.base_model.get_submodule(path))

    def padding(self) -> str:
        pad = self.student.model.config.pad_token_id
        if pad is None:
            raise ModelError(
                "the model's configuration has no pad_token_id, which finding its last token needs; set it"
            )
        return self.graph.constant(torch.tensor(int(pad)))
