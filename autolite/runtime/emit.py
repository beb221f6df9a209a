"""Student -> ONNX, straight from the architecture map.

Activations are kept as [batch * tokens, width]: that lets a product and its bias be one node, and keeps ONNX Runtime
from turning every `Add` + `LayerNormalization` into its `SkipLayerNormalization`, which is 5.6 times slower.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from onnx import TensorProto

from autolite.errors import ModelError, unknown
from autolite.families import family_of
from autolite.formats import Encoded
from autolite.parts import EmbeddingParts, HeadParts, LayerParts, Norm, embeddings_of, head_of, layers_of
from autolite.runtime.graph import CONTRIB, Graph
from autolite.runtime.linear import linear, lookup
from autolite.techniques.base import Student

FILE = "model.onnx"
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


def emit(student: Student, folder: Path) -> list[Path]:
    """Write `model.onnx` (and, above 2 GiB, its data file) into `folder` and return the files.

    Raises:
        ModelError: if the model has a part that cannot be emitted: images, sliding windows that matter, positions
            that change with the length, or an unknown activation.
        StorageError: if the files cannot be written.
    """
    with torch.no_grad():
        return _Emitter.of(student).emit(folder / FILE)


@dataclass(frozen=True, eq=False)
class _Emitter:
    """One emission: the graph so far and what is read while it grows."""

    student: Student
    graph: Graph
    inputs: dict[str, list[str]]
    head: HeadParts
    layers: list[LayerParts]
    causal: bool
    pre_norm: bool
    activation: str

    @classmethod
    def of(cls, student: Student) -> _Emitter:
        model = student.model
        family = family_of(model.config)
        layers = layers_of(model)
        for layer in layers:
            if layer.window is not None and layer.window < student.shape.positions:
                raise ModelError(
                    f"layer {layer.index} attends to a sliding window of {layer.window} tokens, which cannot be "
                    "emitted; set use_sliding_window to false in the model's configuration if you can do without"
                )
        inputs = {name: ["batch", "tokens"] for name in ("input_ids", "attention_mask")}
        activation = str(getattr(model.config, family.activation))
        head = head_of(model)
        return cls(student, Graph(), inputs, head, layers, family.causal, family.pre_norm, activation)

    @property
    def encoded(self) -> Mapping[str, Encoded]:
        return self.student.encoded

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
        return self.graph.save(file, self.inputs, logits)

    def embedding(self, parts: EmbeddingParts) -> str:
        """Return the first hidden state, [batch * tokens, hidden]."""
        graph = self.graph
        if parts.word is None or parts.patch is not None:
            raise ModelError(f"{self.student.shape.family} models take images; this version emits text models only")
        x = lookup(graph, self.flat("input_ids"), parts.word, self.encoded)
        if parts.token_type is not None:
            types = parts.token_type
            if types.weight.shape[0] > 1:
                self.inputs["token_type_ids"] = ["batch", "tokens"]
                x = graph.op("Add", x, lookup(graph, self.flat("token_type_ids"), types, self.encoded))
            else:
                x = graph.op("Add", x, graph.constant(types.weight[0]))
        if parts.position is not None and parts.positions_after_padding:
            real = graph.op("Cast", graph.op("Equal", "input_ids", self.padding()), to=TensorProto.INT32)
            real = graph.op("Sub", graph.constant(torch.tensor(1, dtype=torch.int32)), real)
            count = graph.op("Mul", graph.op("CumSum", real, graph.constant(torch.tensor(1))), real)
            offset = graph.constant(torch.tensor(parts.position_offset - 1, dtype=torch.int32))
            ids = graph.op("Reshape", graph.op("Add", count, offset), graph.constant([-1]))
            x = graph.op("Add", x, lookup(graph, ids, parts.position, self.encoded))
        elif parts.position is not None:
            positions = lookup(graph, self.positions(), parts.position, self.encoded)
            x = self.flatten(graph.op("Add", self.per_sequence(x, parts.position.weight.shape[1]), positions))
        if parts.norm is not None:
            x = self.norm(x, parts.norm)
        return x if parts.projection is None else linear(graph, x, (parts.projection,), self.encoded)

    def layer(self, layer: LayerParts, x: str, first_only: bool) -> str:
        """Return the next hidden state: [batch * tokens, hidden], or [batch, hidden] with `first_only`."""
        with self.graph.scope("attention"):
            source = self.norm(x, layer.attention_norm) if self.pre_norm else x
            x = self.first(x) if first_only else x
            x = self.graph.op("Add", x, self.attention(layer, source, first_only))
            x = x if self.pre_norm else self.norm(x, layer.attention_norm)
        with self.graph.scope("ffn"):
            source = self.norm(x, layer.ffn_norm) if self.pre_norm else x
            x = self.graph.op("Add", x, self.feed_forward(layer, source))
            return x if self.pre_norm else self.norm(x, layer.ffn_norm)

    def attention(self, layer: LayerParts, x: str, first_only: bool) -> str:
        """Return the attention block's output; queries are those of the first tokens only with `first_only`."""
        graph, dim = self.graph, layer.head_dim
        width, kv = layer.heads * dim, layer.kv_heads * dim
        matrices = (layer.query, layer.key, layer.value) if layer.qkv is None else (layer.qkv,)
        if first_only:
            query = linear(graph, self.first(x), matrices, self.encoded, rows=(0, width))
            both = linear(graph, x, matrices, self.encoded, rows=(width, width + 2 * kv))
            key, value = graph.ops("Split", 2, both, axis=1, num_outputs=2)
        else:
            merged = linear(graph, x, matrices, self.encoded)
            query, key, value = graph.ops("Split", 3, merged, graph.constant([width, kv, kv]), axis=1)
        query, key = self.head_norm(query, layer.query_norm, width), self.head_norm(key, layer.key_norm, kv)
        query = graph.op("Unsqueeze", query, graph.constant([1])) if first_only else self.per_sequence(query, width)
        key, value = self.per_sequence(key, kv), self.per_sequence(value, kv)
        query, key = self.rotate(query), self.rotate(key)
        if layer.kv_heads != layer.heads:
            key, value = self.repeat(key, layer), self.repeat(value, layer)
        mask = graph.op("Cast", "attention_mask", to=TensorProto.INT32)
        settings = {"num_heads": layer.heads, "scale": layer.scale, "unidirectional": int(self.causal)}
        mixed = graph.op("MultiHeadAttention", query, key, value, "", mask, domain=CONTRIB, **settings)
        return linear(graph, self.flatten(mixed), (layer.out,), self.encoded)

    def feed_forward(self, layer: LayerParts, x: str) -> str:
        if layer.ffn_gate is None:
            inner = self.activate(linear(self.graph, x, (layer.ffn_in,), self.encoded), self.activation)
        else:
            both = linear(self.graph, x, (layer.ffn_gate, layer.ffn_in), self.encoded)
            gate, up = self.graph.ops("Split", 2, both, axis=1, num_outputs=2)
            inner = self.graph.op("Mul", self.activate(gate, self.activation), up)
        return linear(self.graph, inner, (layer.ffn_out,), self.encoded)

    def logits(self, x: str) -> tuple[str, str, list[str | int]]:
        """Return the output for `Graph.save`: [batch, labels] or [batch, tokens, vocab]."""
        head = self.head
        if not head.dense:
            raise ModelError(f"{type(self.student.model).__name__} has no head, so there are no logits to emit")
        if head.pooling == "last":
            x = self.last(x)
        if head.final_norm is not None:
            x = self.norm(x, head.final_norm)
        for matrix, activation in head.dense:
            table = head.tied and matrix is head.dense[-1][0]
            x = linear(self.graph, x, (matrix,), self.encoded, table=table)
            x = self.activate(x, activation) if activation else x
        outputs = self.student.shape.outputs
        if head.pooling == "none":
            return self.per_sequence(x, outputs), "logits", ["batch", "tokens", outputs]
        return x, "logits", ["batch", outputs]

    # Small pieces

    def norm(self, x: str, norm: Norm) -> str:
        weight = self.graph.constant(norm.weight)
        if norm.bias is None:
            return self.graph.op("RMSNormalization", x, weight, axis=-1, epsilon=norm.eps)
        return self.graph.op("LayerNormalization", x, weight, self.graph.constant(norm.bias), axis=-1, epsilon=norm.eps)

    def head_norm(self, x: str, norm: Norm | None, width: int) -> str:
        """Normalise each head of `x` [tokens, width] by itself (Qwen3)."""
        if norm is None:
            return x
        heads = self.graph.op("Reshape", x, self.graph.constant([-1, norm.weight.shape[0]]))
        return self.graph.op("Reshape", self.norm(heads, norm), self.graph.constant([-1, width]))

    def activate(self, x: str, name: str) -> str:
        if name not in ACTIVATIONS:
            raise ModelError(unknown("activation", name, ACTIVATIONS))
        kind, settings = ACTIVATIONS[name]
        return self.graph.op(kind, x, **settings)

    def rotate(self, x: str) -> str:
        """Turn the heads of `x` [batch, tokens, width] by their positions (RoPE, Su et al. 2021), if the model does.

        Sines are computed per call: tables for the longest input would outweigh a small model.
        """
        base = self.student.model.base_model
        path = family_of(self.student.model.config).rotary
        if not path:
            return x
        rotary: Any = base.get_submodule(path)
        kind = str(getattr(rotary, "rope_type", "default"))
        if kind in ("dynamic", "longrope"):
            raise ModelError(f"rotary positions of type '{kind}' change with the length and cannot be emitted")
        graph = self.graph
        positions = graph.op("Unsqueeze", graph.op("Cast", self.positions(), to=TensorProto.FLOAT), graph.constant([1]))
        angles = graph.op("Mul", positions, graph.constant(rotary.inv_freq.float()[None, :]))
        scaling = graph.constant(float(rotary.attention_scaling))
        cos, sin = (graph.op("Mul", graph.op(f, angles), scaling) for f in ("Cos", "Sin"))
        start = graph.constant([0])
        return graph.op("RotaryEmbedding", x, start, cos, sin, domain=CONTRIB, interleaved=0)

    def repeat(self, x: str, layer: LayerParts) -> str:
        """Repeat each key/value head of [batch, tokens, kv] for the query heads that read it."""
        graph, copies = self.graph, layer.heads // layer.kv_heads
        heads = graph.op("Reshape", x, self.dims(layer.kv_heads, 1, layer.head_dim))
        full = graph.op("Expand", heads, self.dims(layer.kv_heads, copies, layer.head_dim))
        return graph.op("Reshape", full, self.dims(layer.heads * layer.head_dim))

    def dims(self, *rest: int) -> str:
        """Return the shape [batch, tokens, *rest] as a value."""
        return self.graph.op("Concat", self.graph.op("Shape", "input_ids"), self.graph.constant(rest), axis=0)

    def positions(self) -> str:
        """Return 0, 1, ..., tokens - 1."""
        graph = self.graph
        tokens = graph.op("Squeeze", graph.op("Shape", "input_ids", start=1, end=2))
        zero, one = (graph.constant(torch.tensor(i)) for i in (0, 1))
        return graph.op("Range", zero, tokens, one)

    def padding(self) -> str:
        pad = self.student.model.config.pad_token_id
        if pad is None:
            raise ModelError(
                "the model's configuration has no pad_token_id, which finding its last token needs; set it"
            )
        return self.graph.constant(torch.tensor(int(pad)))

    def flat(self, ids: str) -> str:
        return self.graph.op("Reshape", ids, self.graph.constant([-1]))

    def flatten(self, x: str) -> str:
        """[batch, tokens, width] -> [batch * tokens, width]."""
        return self.graph.op("Flatten", x, axis=2)

    def per_sequence(self, x: str, width: int) -> str:
        """[batch * tokens, width] -> [batch, tokens, width]."""
        return self.graph.op("Reshape", x, self.dims(width))

    def first(self, x: str) -> str:
        """Return the first token of each sequence: [batch * tokens, hidden] -> [batch, hidden]."""
        hidden = self.per_sequence(x, self.student.shape.stacks[0].hidden)
        return self.graph.op("Gather", hidden, self.graph.constant(torch.tensor(0)), axis=1)

    def last(self, x: str) -> str:
        """Return the last token of each sequence that is not padding, as transformers finds it: by its id."""
        graph = self.graph
        pad = graph.op("Equal", "input_ids", self.padding())
        place = graph.op("Where", pad, graph.constant(torch.tensor(0)), self.positions())
        index = graph.op("ArgMax", place, axis=1, keepdims=1)
        return graph.op("GatherND", self.per_sequence(x, self.student.shape.stacks[0].hidden), index, batch_dims=1)
