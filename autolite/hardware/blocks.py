"""What is computed of a piece in one pass, whatever the target: products, elements, bytes and operators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from autolite import formats
from autolite.architecture import CrossAttention, factor_format
from autolite.families import DESCRIBED
from autolite.hardware.footprint import BYTES, Computed, head_width, read_as, square_layers
from autolite.hardware.pieces import Around, Attention, FeedForward, head_of_shape, is_pooled
from autolite.hardware.segments import Array
from autolite.products import matmuls

# What is counted beside products: elements, rows of softmax, bytes of activations, operators of layers and around them,
# and calls.
KINDS = ("activation", "approximation", "normalization", "softmax", "copy", "operators", "around", "calls")
# Operators of the graph that is run; "gated" layers also turn queries and keys by their positions.
_OPERATORS = {"attention": 9, "ffn": 6, "gated": 10, "absorbed": 9, "around": 26, "cross": 8}
_UNMAPPED_OPERATORS = {"layer": 60, "around": 40}  # most of them are about shapes


@dataclass(frozen=True, eq=False, slots=True)
class Block:
    """What is computed of a piece.

    Attributes:
        kernels: the kernel class of each product [products].
        products: of each [m, k] x [k, n]: m, k, n, the bytes of the second factor, and how often it is made; less than
            once where zeros are skipped [products, 5].
        counts: how much of each of `KINDS` [kinds].
    """

    kernels: tuple[str, ...]
    products: Array
    counts: Array


class Call(NamedTuple):
    """A pass over `tokens` new tokens in each of `batch` sequences, that attend to `context`, themselves included. Of
    two stacks the first makes it, unless there are `source` tokens for the second to attend to."""

    batch: int
    tokens: int
    context: int
    source: int = 0


class Work:
    """A block in the making."""

    def __init__(self) -> None:
        self._kernels: list[str] = []
        self._products: list[tuple[float, ...]] = []
        self._counts = dict.fromkeys(KINDS, 0.0)

    def product(self, kernel: str, m: float, k: float, n: float, nbytes: float, times: float = 1) -> None:
        """Add a product [m, k] x [k, n], `times` over, with a second factor of so many bytes."""
        self._kernels.append(kernel)
        self._products.append((m, k, n, nbytes, times))

    def add(self, kind: str, count: float) -> None:
        """Add so much of one of `KINDS`."""
        self._counts[kind] += count

    def done(self) -> Block:
        """Return the block."""
        products = np.array(self._products, dtype=np.float64).reshape(-1, 5)
        return Block(tuple(self._kernels), products, np.array([self._counts[kind] for kind in KINDS]))


class Role(IntEnum):
    """What of a piece is needed in a pass."""

    WHOLE = 0
    LAST = 1  # of the last layer, or of the head, if one token a sequence is read
    ABSORBED = 2  # the same of its attention without keys and values, whose matrices multiply what is beside them
    PREPARED = 3  # what the first of two stacks' pass has of it: keys and values that are kept, no head


@lru_cache(maxsize=1 << 16)
def block_of(computed: Computed, call: Call, role: int) -> Block:
    """Describe what is computed of a piece in a pass, in its `Role`."""
    piece = computed.piece
    if isinstance(piece, Around):
        chosen = dict(zip(piece.forms, computed.kernels, strict=True))
        if piece.unmapped is not None:
            return _without_map(piece, chosen, call)
        return _around(piece, chosen, call, role)
    if isinstance(piece, FeedForward):
        return _ffn(piece, computed, call.batch * (call.tokens if role == Role.WHOLE else 1))
    if role == Role.PREPARED:
        return _kept(piece, computed, call)
    return _attention(piece, computed, call, call.tokens if role == Role.WHOLE else 1, role == Role.ABSORBED)


def _without_map(piece: Around, chosen: Mapping[str, str], call: Call) -> Block:
    """A pass of a model without an architecture map: the products are its own. What is between them is taken to be that
    of a transformer of the configuration's depth, width and heads: attention over all of the context, two norms and two
    residual sums a layer, and an activation of what the widening matrices of the feed-forward blocks give."""
    shape, other, work = piece.shape, piece.unmapped, Work()
    assert other is not None
    rows, hidden, layers = call.batch * call.tokens, shape.stacks[0].hidden, other.layers
    work.add("copy", 7 * BYTES * rows * shape.embedding)  # two rows looked up, and their sum
    work.add("normalization", rows * shape.embedding)
    for each in matmuls(shape):
        kernel, read = chosen[each.format], call.batch if each.pooled else rows
        work.product(kernel, read, each.k, each.n, read_as(each.format, kernel, each.n, each.k))
    inner = sum(p.n * p.calls for p in other.products if p.part == "ffn" and p.n > p.k)
    work.add("activation", rows * inner)
    work.add("normalization", rows * hidden * 2 * layers)
    work.add("copy", 6 * BYTES * rows * hidden * layers)  # residual sums
    if other.heads:
        dim = max(1, hidden // other.heads)
        for _ in range(layers):
            past = 2 * BYTES * call.context * dim
            work.product("attention", call.tokens, 2 * dim, call.context, past, call.batch * other.heads)
        work.add("softmax", call.batch * other.heads * call.tokens * layers)
        work.add("copy", 8 * BYTES * rows * hidden * layers)  # queries, keys, values and outputs, transposed
    work.add("operators", _UNMAPPED_OPERATORS["layer"] * layers)
    work.add("around", _UNMAPPED_OPERATORS["around"])
    work.add("calls", 1)
    return work.done()


def _around(piece: Around, chosen: Mapping[str, str], call: Call, role: int) -> Block:
    """All but the layers."""
    shape, family, work = piece.shape, DESCRIBED[piece.family], Work()
    if role == Role.PREPARED:
        shape = replace(shape, outputs=0)
    rows = call.batch * call.tokens

    def dense(form: str, rows: int, k: int, n: int) -> None:
        work.product(chosen[form], rows, k, n, formats.nbytes(form, n, k))

    tables = 1 + bool(family.position) + bool(family.token_type)
    work.add("copy", (5 * tables - 3) * BYTES * rows * shape.embedding)  # rows looked up, and summed
    if shape.embedding_rank:
        dense(factor_format(shape.embedding_format), rows, shape.embedding_rank, shape.embedding)
        work.add("around", 1)
    if family.embedding_norm:
        work.add("normalization", rows * shape.embedding)
    if family.embedding_projection or family.patch:
        dense(shape.embedding_format, rows, shape.embedding, shape.stacks[0].hidden)
    read = call.batch if is_pooled(shape) or role == Role.LAST else rows
    hidden = shape.stacks[-1].hidden
    if family.final_norm:
        work.add("normalization", read * hidden)
    for _ in range(square_layers(head_of_shape(shape))):
        dense(shape.head_format, read, hidden, hidden)
    if shape.embedding_rank and shape.tied:
        dense(factor_format(shape.embedding_format), read, hidden, shape.embedding_rank)
        work.add("around", 1)
    if shape.outputs:
        kernel, k = chosen[shape.head_format], head_width(shape)
        work.product(kernel, read, k, shape.outputs, read_as(shape.head_format, kernel, shape.outputs, k))
    work.add("around", _OPERATORS["around"])
    work.add("calls", 1)
    return work.done()


def _attention(part: Attention, computed: Computed, call: Call, read: int, absorbed: bool) -> Block:
    """The attention of a layer of which `read` tokens a sequence are needed; `absorbed` says that keys and values are
    not computed: their matrices, decoded, multiply what is on the other side of them."""
    work = Work()
    rows, needed = call.batch * call.tokens, call.batch * read
    query, kv = part.heads * part.head_dim, part.kv_heads * part.head_dim
    merged, kernel, hidden, zeros = query + 2 * kv, computed.kernels[0], part.hidden, computed.zeros
    nbytes = read_as(part.form, kernel, merged, hidden)
    rest = merged
    if read < call.tokens:
        rest -= query
        work.product(kernel, needed, hidden, query, nbytes * query / merged, zeros)
    if absorbed:
        width, inputs = BYTES * hidden * part.head_dim, BYTES * call.tokens * hidden
        work.product("fp32", call.batch, part.head_dim, hidden, width, part.heads)
        work.product("fp32", part.heads, hidden, call.tokens, inputs, call.batch)
        work.product("fp32", part.heads, call.tokens, hidden, inputs, call.batch)
        work.product("fp32", call.batch, hidden, part.head_dim, width, part.heads)
        work.add("copy", 2 * inputs * call.batch)  # transposed
        work.add("operators", _OPERATORS["absorbed"])
    else:
        work.product(kernel, rows, hidden, rest, nbytes * rest / merged, zeros)
        past = 2 * BYTES * call.context * part.head_dim * part.kv_heads / part.heads
        work.product("attention", read, 2 * part.head_dim, call.context, past, call.batch * part.heads)
        work.add("copy", 2 * BYTES * rows * merged)  # split into query, key and value
    work.add("softmax", call.batch * part.heads * read)
    work.product(kernel, needed, query, hidden, read_as(part.form, kernel, hidden, query), zeros)
    work.add("normalization", needed * hidden)
    work.add("copy", 3 * BYTES * needed * hidden)  # residual sum
    work.add("operators", _OPERATORS["attention"])
    if part.cross is not None:
        _attend(work, part, part.cross, computed, call)
    for _, side, k, n, form in part.differences():
        _difference(work, computed.kernels[1], rows if side == "qkv.down" else needed, k, n, form)
    return work.done()


def _ffn(part: FeedForward, computed: Computed, rows: int) -> Block:
    """The feed-forward network of a layer, for so many tokens."""
    work, kernel, zeros, gated, hidden = Work(), computed.kernels[0], computed.zeros, part.gated, part.hidden
    inner = part.ffn * (2 if gated else 1)
    work.product(kernel, rows, hidden, inner, read_as(part.form, kernel, inner, hidden), zeros)
    rounded = formats.get(part.form).activations != "float" and not gated
    work.add("approximation" if rounded else "activation", rows * part.ffn)
    work.add("copy", (3 * part.ffn * 2 if gated else 0) * BYTES * rows)  # split, and product with the gate
    work.product(kernel, rows, part.ffn, hidden, read_as(part.form, kernel, hidden, part.ffn), zeros)
    work.add("normalization", rows * hidden)
    work.add("copy", 3 * BYTES * rows * hidden)
    work.add("operators", _OPERATORS["gated" if gated else "ffn"])
    for _, _, k, n, form in part.differences():
        _difference(work, computed.kernels[1], rows, k, n, form)
    return work.done()


def _difference(work: Work, kernel: str, rows: int, k: int, n: int, form: str) -> None:
    """Add one of the two products of a low-rank difference."""
    work.product(kernel, rows, k, n, read_as(form, kernel, n, k))
    work.add("copy", 2 * BYTES * rows * n)  # added to what is there
    work.add("operators", 1)


def _attend(work: Work, part: Attention, cross: CrossAttention, computed: Computed, call: Call) -> None:
    """Add a layer's attention to `call.source` tokens whose keys and values are kept."""
    rows, hidden, width, source = call.batch * call.tokens, part.hidden, cross.width, call.source * cross.sources
    form, kernel, zeros = part.form, computed.kernels[0], computed.zeros
    work.product(kernel, rows, hidden, width, read_as(form, kernel, width, hidden), zeros)
    past = 2 * BYTES * source * cross.head_dim
    work.product("attention", call.tokens, 2 * cross.head_dim, source, past, call.batch * cross.heads)
    work.add("softmax", rows * cross.heads)
    work.product(kernel, rows, width, hidden, read_as(form, kernel, hidden, width), zeros)
    work.add("normalization", rows * hidden)
    work.add("copy", 3 * BYTES * rows * hidden)  # residual sum
    work.add("operators", _OPERATORS["cross"])


def _kept(part: Attention, computed: Computed, call: Call) -> Block:
    """The keys and values of a layer's cross-attention, computed once."""
    work = Work()
    if (cross := part.cross) is not None:
        rows, kernel, width = call.batch * call.tokens * cross.sources, computed.kernels[0], 2 * cross.width
        nbytes = read_as(part.form, kernel, width, part.source)
        work.product(kernel, rows, part.source, width, nbytes, computed.zeros)
        work.add("copy", 2 * BYTES * rows * width)  # split into keys and values
        work.add("operators", 2)
    return work.done()
