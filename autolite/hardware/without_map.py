"""What a model takes up whose architecture the map does not have: its matrices, and the rest by estimation."""

from __future__ import annotations

from autolite import formats
from autolite.architecture import ModelShape, Unmapped
from autolite.measure import Workload

BYTES = 4
_GRAPH_BYTES = {"layer": 5000, "around": 3000}  # by what exported graphs of a dozen architectures take


def graph_bytes(shape: ModelShape) -> int:
    """Estimate what the file has beside tensors."""
    return _GRAPH_BYTES["layer"] * max(1, _of(shape).layers) + _GRAPH_BYTES["around"]


def file_size(shape: ModelShape, stored: int) -> int:
    """Return the bytes of the artifact; `stored` are those of the products' matrices."""
    total = stored + BYTES * _of(shape).floats + graph_bytes(shape)
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


def _of(shape: ModelShape) -> Unmapped:
    assert shape.unmapped is not None
    return shape.unmapped
