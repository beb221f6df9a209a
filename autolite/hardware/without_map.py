"""Prices of models whose architecture the map does not have: their products one by one, and the rest by estimation."""

from __future__ import annotations

from collections.abc import Mapping

from autolite import formats
from autolite.architecture import ModelShape, Unmapped, matmuls
from autolite.hardware.roofline import Time
from autolite.measure import Workload

BYTES = 4
_GRAPH_BYTES = {"layer": 5000, "around": 3000}  # by what exported graphs of a dozen architectures take
_OPERATORS = {"layer": 60, "around": 40}  # most of them are about shapes


def add_pass(time: Time, shape: ModelShape, batch: int, tokens: int, context: int) -> None:
    """Add the time of one pass over `tokens` new tokens a sequence that attend to `context` tokens.

    The products are the model's own. What is between them is taken to be that of a transformer of the configuration's
    depth, width and heads: attention over all of the context, two norms and two residual sums a layer, and an
    activation of what the widening matrices of the feed-forward blocks give.
    """
    other = _of(shape)
    rows, hidden = batch * tokens, shape.stacks[0].hidden
    time.copy(7 * BYTES * rows * shape.embedding)  # two rows looked up, and their sum
    time.elements("normalization", rows * shape.embedding)
    for product in matmuls(shape):
        read = batch if product.pooled else rows
        time.product(time.kernels[product.format], read, product.k, product.n, time.weights[product.weights])
    time.elements("activation", rows * _inner(other))
    time.elements("normalization", rows * hidden * 2 * other.layers)
    time.copy(6 * BYTES * rows * hidden * other.layers)  # residual sums
    if other.heads:
        dim = max(1, hidden // other.heads)
        for _ in range(other.layers):
            time.product("attention", tokens, 2 * dim, context, 2 * BYTES * context * dim, batch * other.heads)
        time.elements("softmax", batch * other.heads * tokens * other.layers)
        time.copy(8 * BYTES * rows * hidden * other.layers)  # queries, keys, values and outputs, transposed
    time.operators(_OPERATORS["layer"] * other.layers + _OPERATORS["around"])
    time.add("estimated", 0.0)  # no time of its own, but an uncertainty


def graph_bytes(shape: ModelShape) -> int:
    """Estimate what the file has beside tensors."""
    return _GRAPH_BYTES["layer"] * max(1, _of(shape).layers) + _GRAPH_BYTES["around"]


def file_size(shape: ModelShape, stored: Mapping[str, int]) -> int:
    """Return the bytes of the artifact; `stored` are those of the products' matrices."""
    total = sum(stored.values()) + BYTES * _of(shape).floats + graph_bytes(shape)
    return total + (0 if shape.tied else formats.nbytes(shape.embedding_format, shape.vocab, shape.embedding))


def activations(shape: ModelShape, workload: Workload) -> float:
    """Return the most bytes of activations alive at once, and the keys and values of a language model's context."""
    other, hidden = _of(shape), shape.stacks[0].hidden
    rows = workload.batch * workload.tokens
    widest = max((p.n for p in other.products if p.part != "head"), default=hidden)
    scores = workload.batch * other.heads * workload.tokens**2
    alive = 2 * rows * hidden + max(3 * rows * hidden + 2 * scores, 2 * rows * widest)
    cached = 2 * hidden * workload.batch * (workload.tokens + workload.generated) * other.layers
    if not shape.stacks[0].causal:
        return BYTES * alive
    return BYTES * (max(alive, rows * shape.outputs) + cached)


def _inner(other: Unmapped) -> int:
    """Elements a token that activation functions see in all layers together."""
    return sum(p.n * p.calls for p in other.products if p.part == "ffn" and p.n > p.k)


def _of(shape: ModelShape) -> Unmapped:
    assert shape.unmapped is not None
    return shape.unmapped
