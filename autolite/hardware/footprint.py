"""What a shape takes up: bytes of its file, of its matrices as the kernels read them, and of its activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from autolite import formats
from autolite.architecture import ModelShape, factor_format
from autolite.families import DESCRIBED, Family, Head
from autolite.hardware import without_map
from autolite.hardware.pieces import Around, Attention, FeedForward, Piece, Pieces, head_of_shape, pieces_of
from autolite.hardware.segments import Array
from autolite.measure import Workload
from autolite.packing import PLANES
from autolite.products import matmuls

BYTES = 4  # activations, norms and biases are fp32
# Names, shapes and attributes of the operators in the file. Of those that make a matrix in floating point of its codes,
# and then 8-bit codes of it; and that unpack codes in two planes, or zero points.
_GRAPH_BYTES = {"layer": 2500, "around": 2300, "decoding": 700, "coding": 800, "plane": 900, "zeros": 550}
# A "thin" product is one of a low-rank difference, "codes" what decodes its 8-bit factor; "factor" is the second one of
# an embedding table; "heads" are the norms of queries and keys by head.
_GRAPH_BYTES |= {"heads": 750, "thin": 110, "codes": 140, "factor": 250}


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


def head_width(shape: ModelShape) -> int:
    """Return the width of what the head's last matrix multiplies."""
    return (shape.tied and shape.embedding_rank) or shape.stacks[-1].hidden


class Reads(NamedTuple):
    """Bytes of a piece's matrices as the kernels read them: of `each` product's, in order; of those that are counted
    once for all layers with the same weights (`shared`), and of those that are each layer's `own`."""

    each: tuple[int, ...]
    shared: int
    own: int


@dataclass(frozen=True, eq=False, slots=True)
class Computed:
    """A piece and how it is computed. There is one of each, so that looking up what is known of it costs little.

    Attributes:
        piece: what is computed.
        kernels: the kernel class of each of its `forms`.
        zeros: the time of a product with its zeros as a part of the dense one's.
        reads: the bytes of its matrices.
    """

    piece: Piece
    kernels: tuple[str, ...]
    zeros: float
    reads: Reads


@lru_cache(maxsize=1 << 16)
def computed_by(piece: Piece, kernels: tuple[str, ...], zeros: float = 1.0) -> Computed:
    """Return a piece as computed by these kernel classes."""
    return Computed(piece, kernels, zeros, _reads(piece, kernels))


def _reads(piece: Piece, kernels: tuple[str, ...]) -> Reads:
    if isinstance(piece, Around):
        return _reads_around(piece, dict(zip(piece.forms, kernels, strict=True)))
    own = [read_as(form, kernels[1], n, k) for _, _, k, n, form in piece.differences()]
    shared = [read_as(piece.form, kernels[0], n, k) for n, k in _matrices(piece)]
    return Reads((*shared, *own), sum(shared), sum(own))


def _matrices(piece: Attention | FeedForward) -> list[tuple[int, int]]:
    """Sizes n and k of the matrices [n, k] of half a layer."""
    hidden = piece.hidden
    if isinstance(piece, FeedForward):
        return [(piece.ffn * (2 if piece.gated else 1), hidden), (hidden, piece.ffn)]
    query, kv = piece.heads * piece.head_dim, piece.kv_heads * piece.head_dim
    found = [(query + 2 * kv, hidden), (hidden, query)]
    if (cross := piece.cross) is not None:
        found += [(2 * cross.width, piece.source), (cross.width, hidden), (hidden, cross.width)]
    return found


def _reads_around(piece: Around, chosen: Mapping[str, str]) -> Reads:
    shape = piece.shape
    if shape.unmapped is not None:
        products = [(p.weights, read_as(p.format, chosen[p.format], p.n, p.k)) for p in matmuls(shape)]
        return Reads(tuple(nbytes for _, nbytes in products), 0, sum(dict(products).values()))
    if not shape.outputs:
        return Reads((), 0, 0)
    head = read_as(shape.head_format, chosen[shape.head_format], shape.outputs, head_width(shape))
    return Reads((head,), 0, head)


class Stored(NamedTuple):
    """Bytes of a piece in the file: for `each` use of it, for the `first` with the same weights, and for the first such
    `apart` from layers without low-rank differences."""

    each: int
    first: int = 0
    apart: int = 0


@lru_cache(maxsize=1 << 16)
def stored(piece: Piece) -> Stored:
    """Return what a piece takes in the file: matrices and tables in their formats, everything else in fp32, and its
    part of the graph."""
    if isinstance(piece, Around):
        return Stored(_stored_around(piece))
    family, hidden = DESCRIBED[piece.family], piece.hidden
    norm = 1 if family.rms_norm else 2
    floats = biases = graph = 0
    if isinstance(piece, Attention):
        qkv = (piece.heads + 2 * piece.kv_heads) * piece.head_dim
        biases += qkv if not family.rms_norm or family.name == "qwen2" else 0
        biases += 0 if family.rms_norm else hidden
        floats += 0 if family.repeated else _norms(family, hidden) + (2 * piece.head_dim if family.query_norm else 0)
        if piece.cross is not None:
            biases += 3 * piece.cross.width + hidden
            floats += norm * hidden
        graph += _GRAPH_BYTES["layer"] + bool(family.query_norm) * _GRAPH_BYTES["heads"]
        merged = 1 if family.fused_qkv else 3
    else:
        biases += 0 if family.rms_norm else piece.ffn + hidden
        merged = 2 if piece.gated else 1
    bytes_read = _reads(piece, piece.forms)  # each format as it is stored
    first = bytes_read.shared + 2 * _decoding(piece.form)
    if not piece.rank:
        return Stored(BYTES * floats + graph, first + BYTES * biases)
    # Each layer has its own biases, and two thin products for each matrix. Matrices that are else merged into one
    # product stand apart, and are decoded one by one.
    codes = 0 if factor_format(piece.form) in ("fp32", "bf16") else _GRAPH_BYTES["codes"]
    graph += 2 * (merged + 1) * (_GRAPH_BYTES["thin"] + codes)
    return Stored(bytes_read.own + BYTES * (floats + biases) + graph, first, (merged - 1) * _decoding(piece.form))


def _norms(family: Family, hidden: int) -> int:
    """Values of the two norms of a layer."""
    return 2 * (1 if family.rms_norm else 2) * hidden


def _stored_around(piece: Around) -> int:
    shape, total = piece.shape, _reads(piece, piece.forms).own
    if shape.unmapped is not None:
        return without_map.file_size(shape, total)
    family = DESCRIBED[shape.family]
    hidden = shape.stacks[0].hidden
    norm = 1 if family.rms_norm else 2
    floats = 0
    graph = _GRAPH_BYTES["around"]
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
    if family.repeated:
        floats += sum(_norms(family, stack.hidden) for stack in shape.stacks)
    hidden = shape.stacks[-1].hidden
    floats += norm * hidden if family.final_norm else 0
    square = square_layers(head_of_shape(shape))
    total += square * formats.nbytes(shape.head_format, hidden, hidden)
    floats += square * hidden + (shape.outputs if not family.causal else 0)
    looked_up = (bool(shape.vocab) and not tied_head) + bool(family.position and not family.patch)
    graph += bool(shape.outputs) * _decoding(shape.head_format)
    graph += bool(family.embedding_projection or family.patch) * _decoding(shape.embedding_format)
    graph += looked_up * _decoding(shape.embedding_format, coded=False)
    return total + BYTES * floats + graph


def file_size(shape: ModelShape) -> int:
    """Return the bytes of the artifact: matrices and tables in their formats, everything else in fp32, the graph."""
    return int(file_sizes(pieces_of([shape]))[0])


def file_sizes(pieces: Pieces) -> Array:
    """Return the same of many shapes [shapes]."""
    each, first, apart = np.array([stored(piece) for piece in pieces.distinct], np.float64).T
    used = pieces.used
    found: Array = np.add.reduceat(each[used] + pieces.first * first[used] + pieces.apart * apart[used], pieces.starts)
    return found


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


def copies_cache(heads: int, kv_heads: int, tokens: int, generated: int) -> bool:
    """Whether the attention that is emitted where nothing was measured makes a longer copy of keys and values in each
    step, in the place of writing new ones behind the old: that reads prompts slower, and where query heads share their
    keys and values there is little to copy."""
    return heads != kv_heads or 8 * generated < tokens


def _kept_tokens(piece: Attention, workload: Workload) -> int:
    """Tokens of a sequence whose keys and values are in memory at once: all, and beside a copy that is made of them
    all but the last."""
    tokens, generated = workload.tokens, workload.generated
    copied = generated and copies_cache(piece.heads, piece.kv_heads, tokens, generated)
    return tokens + generated + (tokens + generated - 1 if copied else 0)


@lru_cache(maxsize=1 << 16)
def activations_of(piece: Piece, workload: Workload) -> tuple[float, float]:
    """Return the bytes of activations that are alive at once in a piece, and of the keys and values that it keeps."""
    rows = workload.batch * workload.tokens
    if isinstance(piece, Around):
        if piece.unmapped is not None:
            return without_map.activations(piece.shape, workload), 0
        causal = piece.stacks[-1][-1]
        read = workload.batch if workload.generated else rows  # who generates asks for the last token's logits alone
        return BYTES * read * piece.outputs if causal else 0, 0
    if isinstance(piece, FeedForward):
        return BYTES * 2 * rows * (piece.hidden + piece.ffn), 0
    width, kv = piece.heads * piece.head_dim, piece.kv_heads * piece.head_dim
    scores = workload.batch * piece.heads * workload.tokens**2
    kept = 2 * kv * workload.batch * _kept_tokens(piece, workload) if piece.causal else 0
    if (cross := piece.cross) is not None:
        kept += 2 * cross.width * rows * cross.sources
    return BYTES * (2 * rows * piece.hidden + rows * (width + 2 * kv) + 2 * scores), BYTES * kept


def activations(pieces: Pieces, workload: Workload) -> Array:
    """Return the most bytes of activations alive at once, and the keys and values of a language model's context, of
    each shape [shapes]."""
    alive, kept = np.array([activations_of(piece, workload) for piece in pieces.distinct], np.float64).T
    kept = np.add.reduceat(kept[pieces.used], pieces.starts)
    found: Array = np.maximum.reduceat(alive[pieces.used], pieces.starts) + kept
    return found
