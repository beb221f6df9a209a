"""What a graph takes, and how the activations lie: of sequences of token ids, or of images.

Activations are kept as [batch * tokens, width]: that lets a product and its bias be one node, and keeps ONNX Runtime
from turning every `Add` + `LayerNormalization` into its `SkipLayerNormalization`, which is 5.6 times slower.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from autolite.runtime.graph import LARGEST, Graph, Input

KEEP = "logits_to_keep"  # an input with a default; the name in transformers
BEFORE, PRESENT = "past_key_values.", "present."  # what the names of keys and values begin with, going in and out


@dataclass(frozen=True, eq=False)
class Sequences:
    """The inputs of a graph that is growing, and what it computes of their sizes.

    Attributes:
        graph: to add to.
        batch: of the call that the graph is made for.
        tokens: of that call, in each sequence; of images, always.
        cached: the tokens follow those of earlier calls, whose keys and values are inputs.
        inputs: so far.
    """

    graph: Graph
    batch: int
    tokens: int
    cached: bool = False
    inputs: dict[str, Input] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Rows of the activations in the call that the graph is made for."""
        return self.batch * self.tokens

    @property
    def mask(self) -> str:
        """The input that tells padding from tokens; images have none."""
        return "attention_mask" if "attention_mask" in self.inputs else ""

    def take_text(self) -> str:
        """Take token ids and their mask, which covers earlier calls too; return the ids, [batch * tokens]."""
        self.inputs["input_ids"] = (np.dtype(np.int64), ["batch", "tokens"])
        self.inputs["attention_mask"] = (np.dtype(np.int64), ["batch", "past + tokens" if self.cached else "tokens"])
        return self.flat("input_ids")

    def take_types(self) -> str:
        """Take token types and return them, [batch * tokens]."""
        self.inputs["token_type_ids"] = self.inputs["input_ids"]
        return self.flat("token_type_ids")

    def take_images(self, channels: int, side: int) -> str:
        """Take images, [batch, channels, side, side]."""
        self.inputs["pixel_values"] = (np.dtype(np.float32), ["batch", channels, side, side])
        return "pixel_values"

    def take_past(self, layer: int, kv_heads: int, dim: int) -> tuple[str, str]:
        """Take what earlier calls left of the keys and values of a layer, each [batch, kv_heads, past, dim]."""
        key, value = (f"{BEFORE}{layer}.{part}" for part in ("key", "value"))
        self.inputs[key] = self.inputs[value] = (np.dtype(np.float32), ["batch", kv_heads, "past", dim])
        return key, value

    def dims(self, *rest: int) -> str:
        """Return the shape [batch, tokens, *rest] as a value."""
        if "pixel_values" in self.inputs:
            return self.graph.constant([-1, self.tokens, *rest])
        return self.graph.op("Concat", self.graph.op("Shape", "input_ids"), self.graph.constant(rest), axis=0)

    def places(self) -> str:
        """Return 0, 1, ..., tokens - 1."""
        zero, one = (self.graph.constant(torch.tensor(i)) for i in (0, 1))
        return self.graph.op("Range", zero, self._length("input_ids"), one)

    def positions(self) -> str:
        """Return the tokens' places in their sequences, earlier calls counted, [tokens]."""
        if not self.cached:
            return self.places()
        graph, total = self.graph, self._length("attention_mask")
        past = graph.op("Sub", total, self._length("input_ids"))
        return graph.op("Range", past, total, graph.constant(torch.tensor(1)))

    def count(self) -> str:
        """Return how many tokens of each sequence are new, [1]."""
        return self.graph.op("Shape", "input_ids", start=1, end=2)

    def _length(self, name: str) -> str:
        return self.graph.op("Squeeze", self.graph.op("Shape", name, start=1, end=2))

    def flat(self, ids: str) -> str:
        """[batch, tokens] -> [batch * tokens]."""
        return self.graph.op("Reshape", ids, self.graph.constant([-1]))

    def flatten(self, x: str) -> str:
        """[batch, tokens, width] -> [batch * tokens, width]."""
        return self.graph.op("Flatten", x, axis=2)

    def apart(self, x: str, width: int) -> str:
        """[batch * tokens, width] -> [batch, tokens, width]."""
        return self.graph.op("Reshape", x, self.dims(width))

    def first(self, x: str, width: int) -> str:
        """Return the first token of each sequence: [batch * tokens, width] -> [batch, width]."""
        return self.graph.op("Gather", self.apart(x, width), self.graph.constant(torch.tensor(0)), axis=1)

    def last(self, x: str, width: int, padding: str) -> str:
        """Return the last token of each sequence that is not `padding`, as transformers finds it: by its id."""
        graph = self.graph
        pad = graph.op("Equal", "input_ids", padding)
        place = graph.op("Where", pad, graph.constant(torch.tensor(0)), self.places())
        index = graph.op("ArgMax", place, axis=1, keepdims=1)
        return graph.op("GatherND", self.apart(x, width), index, batch_dims=1)

    def kept(self, x: str, width: int) -> str:
        """Return the tokens that logits are computed of, [batch * kept, width]: as many of the last ones as
        `logits_to_keep` says, all if it is 0, which it is unless a caller gives it."""
        graph = self.graph
        start = graph.op("Reshape", graph.op("Neg", graph.default(KEEP, np.array(0))), graph.constant([1]))
        ends = graph.constant([LARGEST]), graph.constant([1])
        return self.flatten(graph.op("Slice", self.apart(x, width), start, *ends))

    def logits(self, x: str, width: int) -> str:
        """[batch * kept, width] -> [batch, kept, width]."""
        if not self.cached:
            return self.apart(x, width)
        batch = self.graph.op("Shape", "input_ids", start=0, end=1)
        return self.graph.op("Reshape", x, self.graph.op("Concat", batch, self.graph.constant([-1, width]), axis=0))
