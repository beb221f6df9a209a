"""Shapes as the pieces that they are made of: the two halves of each layer, and what is around the layers.

Thousands of plans of one model have few distinct pieces. There is one object of each, so that looking up what is known
of it costs little, and a plan is a list of numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from autolite.architecture import CrossAttention, LayerShape, ModelShape, Stack, Unmapped, factor_format
from autolite.families import DESCRIBED, Head
from autolite.hardware.segments import Bools, Ints, starts_of
from autolite.products import differences


@dataclass(frozen=True, eq=False, slots=True)
class Attention:
    """The attention of a layer in numbers, without the identity of its weights: equal ones are priced once, whatever
    feed-forward network is behind them.

    `source` is the width of what cross-attention reads, if the layer has any.
    """

    family: str
    hidden: int
    causal: bool
    source: int
    heads: int
    kv_heads: int
    head_dim: int
    form: str
    rank: int
    sparsity: str
    cross: CrossAttention | None

    @property
    def forms(self) -> tuple[str, ...]:
        """The number formats of its matrices and, if it has some, of the factors of its low-rank differences."""
        return (self.form, factor_format(self.form)) if self.rank else (self.form,)

    def differences(self) -> Iterator[tuple[str, str, int, int, str]]:
        """Yield the products of its low-rank differences, as `autolite.products.differences`."""
        alone = LayerShape(
            self.heads, self.kv_heads, self.head_dim, 0, 0, 0, attention_format=self.form, attention_rank=self.rank
        )
        return differences(alone, self.hidden, False, bool(DESCRIBED[self.family].fused_qkv))


@dataclass(frozen=True, eq=False, slots=True)
class FeedForward:
    """The same of the feed-forward network of a layer."""

    family: str
    hidden: int
    gated: bool
    ffn: int
    form: str
    rank: int
    sparsity: str

    @property
    def forms(self) -> tuple[str, ...]:
        """As those of attention."""
        return (self.form, factor_format(self.form)) if self.rank else (self.form,)

    def differences(self) -> Iterator[tuple[str, str, int, int, str]]:
        """Yield the products of its low-rank differences, as `autolite.products.differences`."""
        alone = LayerShape(0, 0, 0, self.ffn, 0, 0, ffn_format=self.form, ffn_rank=self.rank)
        return differences(alone, self.hidden, self.gated, False)


@dataclass(frozen=True, eq=False, slots=True)
class Around:
    """All of a shape but its layers; of one without an architecture map, all."""

    family: str
    stacks: tuple[tuple[int, bool, bool], ...]  # hidden, gated and causal of each
    vocab: int
    embedding: int
    positions: int
    outputs: int
    tied: bool
    embedding_format: str
    head_format: str
    unmapped: Unmapped | None
    embedding_rank: int
    sparsity: str = "none"  # zeros are in matrices of layers only

    @property
    def shape(self) -> ModelShape:
        """A shape of this and no layers."""
        return ModelShape(
            self.family,
            tuple(Stack("", hidden, (), gated, causal) for hidden, gated, causal in self.stacks),
            self.vocab,
            self.embedding,
            self.positions,
            self.outputs,
            self.tied,
            self.embedding_format,
            self.head_format,
            unmapped=self.unmapped,
            embedding_rank=self.embedding_rank,
        )

    @property
    def forms(self) -> tuple[str, ...]:
        """The number formats of the matrices that are multiplied with."""
        if self.unmapped is not None:
            return tuple(sorted({product.format for product in self.unmapped.products}))
        family = DESCRIBED[self.family]
        used = [self.head_format] if self.outputs else []
        used += [self.embedding_format] if family.embedding_projection or family.patch else []
        used += [factor_format(self.embedding_format)] if self.embedding_rank else []
        return tuple(dict.fromkeys(used))


Piece = Around | Attention | FeedForward
_attention = lru_cache(maxsize=1 << 16)(Attention)
_feed_forward = lru_cache(maxsize=1 << 16)(FeedForward)
_around = lru_cache(maxsize=1 << 16)(Around)


def head_of_shape(shape: ModelShape) -> Head | None:
    """Return the head that a model of this shape has, None if it is a bare encoder."""
    if not shape.outputs:
        return None
    family = DESCRIBED[shape.family]
    generates = family.causal and shape.outputs == shape.vocab
    return next((head for head in family.heads if (head.pooling == "none") == generates), None)


def is_pooled(shape: ModelShape) -> bool:
    """Whether the head of a shape that has a map reads one vector a sequence."""
    head = head_of_shape(shape)
    return head is not None and head.pooling != "none"


@dataclass(frozen=True, eq=False, slots=True)
class Pieces:
    """Shapes as arrays. Each has what is around its layers for its first use of a piece, and then attention and
    feed-forward network of each layer, in order.

    Attributes:
        distinct: all pieces.
        counts: how many uses each shape has [shapes].
        starts: the first use of each [shapes].
        used: which of `distinct` each use is [uses].
        first: whether no use before has the same weights [uses].
        apart: the same if only layers with low-rank differences are looked at [uses].
        written: whether a step of the second of two stacks needs it: its layers, and what is around them [uses].
    """

    distinct: list[Piece]
    counts: Ints
    starts: Ints
    used: Ints
    first: Bools
    apart: Bools
    written: Bools


def pieces_of(shapes: Sequence[ModelShape]) -> Pieces:
    """Take shapes apart."""
    index: dict[Piece, int] = {}
    counts: list[int] = []
    used: list[int] = []
    first: list[bool] = []
    apart: list[bool] = []
    written: list[bool] = []
    for shape in shapes:
        begun, family, source = len(used), shape.family, shape.stacks[0].hidden
        around = _around(
            family,
            tuple([(stack.hidden, stack.gated, stack.causal) for stack in shape.stacks]),
            shape.vocab,
            shape.embedding,
            shape.positions,
            shape.outputs,
            shape.tied,
            shape.embedding_format,
            shape.head_format,
            shape.unmapped,
            shape.embedding_rank,
        )
        used.append(index.setdefault(around, len(index)))
        first.append(True)
        apart.append(True)
        written.append(True)
        for place, stack in enumerate(shape.stacks):
            layers, hidden, causal, gated = stack.layers, stack.hidden, stack.causal, stack.gated
            for x in layers:
                attention = _attention(
                    family,
                    hidden,
                    causal,
                    source,
                    x.heads,
                    x.kv_heads,
                    x.head_dim,
                    x.attention_format,
                    x.attention_rank,
                    x.sparsity,
                    x.cross,
                )
                ffn = _feed_forward(family, hidden, gated, x.ffn, x.ffn_format, x.ffn_rank, x.sparsity)
                used.append(index.setdefault(attention, len(index)))
                used.append(index.setdefault(ffn, len(index)))
            first += _firsts(tuple([x.attention for x in layers]), tuple([x.feed_forward for x in layers]))
            # Which of the layers without low-rank differences is the first does not matter.
            apart += _firsts(
                tuple([x.attention if x.attention_rank else -1 for x in layers]),
                tuple([x.feed_forward if x.ffn_rank else -1 for x in layers]),
            )
            written += [place > 0] * (2 * len(layers))
        counts.append(len(used) - begun)
    many = np.array(counts, np.int64)
    flags = (np.array(each, np.bool_) for each in (first, apart, written))
    return Pieces(list(index), many, starts_of(many), np.array(used, np.int64), *flags)


@lru_cache(maxsize=1 << 12)
def _firsts(attention: tuple[int, ...], ffn: tuple[int, ...]) -> tuple[bool, ...]:
    """Whether each layer is the first with these weights in its attention and in its feed-forward network, in turns."""
    each = zip(_first(attention), _first(ffn), strict=True)
    return tuple(found for pair in each for found in pair)


def _first(numbers: Sequence[int]) -> list[bool]:
    places = {number: place for place, number in reversed(list(enumerate(numbers)))}
    return [places[number] == place for place, number in enumerate(numbers)]
