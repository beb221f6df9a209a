"""Which option is fastest on this machine: measured once a place and size, and kept for every later emission.

Sizes are rounded to buckets. What an option computes is compared with the first option of its place: one that differs
by more than the place's number format rounds is not equivalent and never chosen.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from autolite.cache import cache_dir
from autolite.errors import StorageError
from autolite.formats import FORMATS, encode
from autolite.machine import cpu_name
from autolite.measure import time_interleaved
from autolite.parts import Matrix, Norm
from autolite.runtime.attention import Heads, attend, attend_cached, attend_first
from autolite.runtime.blocks import activate, add_and_normalize, project
from autolite.runtime.graph import Graph, Input
from autolite.runtime.linear import Weights, lookup, product, products, weights_of
from autolite.runtime.reading import Reading
from autolite.runtime.sequences import Sequences
from autolite.runtime.session import opened
from autolite.runtime.variants import FEW_ROWS, Choices, Place, usual
from autolite.saturation import saturates
from autolite.store import Store

SECONDS = 0.1  # for each option of a place
CLEARLY = 0.97  # an option replaces the usual one if it takes at most this part of its time
# Greatest relative error against the first option, by what the format does with activations. Products of 8-bit codes
# agree exactly, unless they overflow; quantizing other values than the reference does moves roundings, not results.
TOLERANCE = {"float": 1e-4, "dynamic": 2e-3, "static": 2e-3, "any": 0.05}
TOLERANCE_FIRST = 0.05
REVISION = 3  # of the probes: what another one measured is not read

_WORDS = 1000  # rows of the probes' tables
PREFIX = "variant "  # of the facts in the store

Feed = dict[str, np.ndarray]


@dataclass(frozen=True)
class Found:
    """What was measured of one option: microseconds (median, 95 % interval) and its relative error."""

    option: str
    microseconds: float
    low: float
    high: float
    error: float
    equivalent: bool


def bucket(place: Place) -> Place:
    """Return the place with its sizes rounded: rows and tokens and widths to an eighth of their power of two or
    finer, counts of heads and batches not at all.

    >>> bucket(Place("gelu", "int8", (130, 1500))).sizes
    (128, 1536)
    """
    exact = {"attention": (0, 2, 3, 4, 5), "cached": (0, 3, 4, 5), "first": (0, 2, 3)}.get(place.kind, ())
    return replace(place, sizes=tuple(n if i in exact else _rounded(n) for i, n in enumerate(place.sizes)))


def _rounded(n: int) -> int:
    step = max(1, 1 << n.bit_length() >> 3)
    return round(n / step) * step


def tuned(threads: int, store: Store | None = None) -> Choices:
    """Return choices that measure what they were not asked before, on so many threads of this machine.

    Args:
        threads: processor threads of the call that is emitted for.
        store: where measurements are kept; by default one of this user, for all runs.
    """
    return _Tuned(threads, store or machine_store(threads))


@cache
def machine_store(threads: int) -> Store:
    """Return the user's store for this processor, runtime version and number of threads."""
    run = f"onnxruntime {onnxruntime.__version__} r{REVISION} {threads} threads {cpu_name()}"[:200]
    try:
        folder = cache_dir()
        folder.mkdir(parents=True, exist_ok=True)
        return Store(f"sqlite:///{folder / 'variants.db'}", run)
    except (OSError, StorageError):  # a folder that cannot be written only costs time
        return Store(f"sqlite:///{tempfile.mkdtemp(prefix='autolite-')}/variants.db", run)


class _Tuned:
    """Choices backed by measurements; remembers within the process what it read."""

    def __init__(self, threads: int, store: Store) -> None:
        self._threads, self._store = threads, store
        self._known: dict[Place, str] = {}

    def __call__(self, place: Place) -> str:
        if len(place.options) == 1:
            return place.options[0]
        if place.kind == "int8":
            return "uint8" if saturates() else "int8"
        # For few rows the cost is reading the weights; a probe would find its one matrix in the cache every time.
        if place.kind == "product" and place.sizes[0] <= FEW_ROWS:
            return usual(place)
        near = bucket(place)
        if near not in self._known:
            self._known[near] = fastest(place, self.found(near))
        return self._known[near]

    def found(self, place: Place) -> list[Found]:
        key = _key(place)
        kept = self._store.get(key)
        if kept is None:
            found = measure(place, self._threads)
            kept = [vars(each) for each in found]
            self._store.put(key, kept)
        return [Found(**each) for each in kept]


def table(threads: int, store: Store | None = None) -> list[tuple[Place, list[Found]]]:
    """Return what was measured so far on so many threads of this machine: each place with its options."""
    facts = (store or machine_store(threads)).facts(PREFIX)
    return [(_place(key), [Found(**each) for each in found]) for key, found in facts.items()]


def _key(place: Place) -> str:
    return f"{PREFIX}{place.kind} {place.format} {'x'.join(map(str, place.sizes))}"


def _place(key: str) -> Place:
    kind, form, sizes = key.removeprefix(PREFIX).split(" ")
    return Place(kind, form, tuple(map(int, sizes.split("x"))))


def fastest(place: Place, found: list[Found]) -> str:
    """Return the fastest equivalent option; the usual one, unless another is clearly faster."""
    times = {each.option: each.microseconds for each in found if each.equivalent}
    best = min(times, key=lambda option: times[option])
    usual_one = usual(place)
    return usual_one if usual_one in times and times[best] > CLEARLY * times[usual_one] else best


def measure(place: Place, threads: int) -> list[Found]:
    """Time every option of a place on random values of its sizes, interleaved, and compare what they compute."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        load = _generating if place.kind == "cached" else _fixed
        runners = {option: load(place, option, Path(folder) / f"{option}.onnx", threads) for option in place.options}
        outputs = {option: runner.run({})["result"].astype(np.float64) for option, runner in runners.items()}
        timings = time_interleaved(runners, {}, SECONDS * len(runners), warmup=0.01)
    reference = outputs[place.options[0]]
    found = []
    for option, timing in timings.items():
        error = float(np.linalg.norm(outputs[option] - reference)) / max(float(np.linalg.norm(reference)), 1e-30)
        low, high = timing.median_interval()
        limit = TOLERANCE_FIRST if place.kind == "first" else TOLERANCE[FORMATS[place.format].activations]
        found.append(Found(option, 1e3 * timing.median, 1e3 * low, 1e3 * high, error, error <= limit))
    return found


@dataclass(frozen=True)
class _Probe:
    """A loaded model that is always called in the same way: what `measure` times."""

    call: Callable[[], np.ndarray]

    def run(self, inputs: Any) -> dict[str, np.ndarray]:
        return {"result": self.call()}


def _fixed(place: Place, option: str, file: Path, threads: int) -> _Probe:
    inputs, feed = _feed(place)
    graph = Graph()
    graph.save(file, inputs, (_build(graph, place, option), "result", None))
    session, _ = opened(str(file), threads, exact=False)
    return _Probe(lambda: np.asarray(session.run(None, feed)[0]))


def _generating(place: Place, option: str, file: Path, threads: int) -> _Probe:
    """A layer that reads a prompt, and then token after token."""
    batch, tokens, generated, heads, kv_heads, dim = place.sizes
    graph, rng = Graph(), np.random.default_rng(0)
    sequences = Sequences(graph, batch, tokens, cached=True)
    sequences.take_text()
    tables = (rng.standard_normal((_WORDS, width * dim), dtype=np.float32) for width in (heads, kv_heads, kv_heads))
    query, key, value = (graph.op("Gather", graph.constant(table), "input_ids") for table in tables)
    past, division = sequences.take_past(0, kv_heads, dim), Heads(heads, kv_heads, dim, dim**-0.5, causal=True)
    mask, count = sequences.mask, sequences.count()
    found = attend_cached(graph, query, key, value, mask, count, past, division, option)
    names = ("logits", "present.0.key", "present.0.value")
    outputs = [(value, name, None) for value, name in zip(found, names, strict=True)]
    graph.save(file, sequences.inputs, *outputs)
    session, prompt = opened(str(file), threads, exact=False)[0], rng.integers(0, _WORDS, (batch, tokens))
    steps = rng.integers(0, _WORDS, (generated, batch, 1))

    def call() -> np.ndarray:
        reading = Reading(session, tokens + generated, batch)
        return np.stack([reading.read(prompt), *map(reading.read, steps)])

    return _Probe(call)


def _feed(place: Place) -> tuple[dict[str, Input], Feed]:
    """The inputs of a place's probe, normally distributed."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    sizes = place.sizes
    match place.kind:
        case "attention":
            batch, tokens, heads, kv_heads, dim, _ = sizes
            feed = {"x": normal(batch, tokens, heads * dim)}
            feed |= {name: normal(batch, tokens, kv_heads * dim) for name in ("key", "value")}
            feed["mask"] = np.ones((batch, tokens), np.int64)
        case "first":
            batch, tokens, _, _, hidden = sizes
            feed = {"x": normal(batch, tokens, hidden), "mask": np.ones((batch, tokens), np.int64)}
        case "norm":
            feed = {"x": normal(*sizes), "other": normal(*sizes)}
        case "lookup":
            feed = {"x": rng.integers(0, _WORDS, sizes[0])}
        case _:  # rows and width come first
            feed = {"x": normal(*sizes[:2])}
    return {name: (a.dtype, [None] * a.ndim) for name, a in feed.items()}, feed


def _matrix(n: int, k: int, seed: int = 0) -> Matrix:
    generator = torch.Generator().manual_seed(seed)
    return Matrix(f"w{seed}", 0.03 * torch.randn(n, k, generator=generator), torch.randn(n, generator=generator))


def _weights(place: Place, *matrices: Matrix) -> Weights:
    encoded = {m.key: encode(m.weight, place.format) for m in matrices}
    return weights_of(matrices, encoded, {m.key: (-4.0, 4.0) for m in matrices}, unsigned=saturates())


def _build(graph: Graph, place: Place, option: str) -> str:
    """Add the nodes of an option, as the emitter does, to the inputs of `_feed`."""
    builders: dict[str, Callable[[Graph, Place, str], str]] = {
        "product": lambda g, p, o: product(g, "x", _weights(p, _matrix(p.sizes[2], p.sizes[1])), o),
        "qkv": _qkv,
        "attention": _attention,
        "first": _first,
        "gelu": lambda g, p, o: activate(g, "x", "gelu", o),
        "norm": _norm,
        "lookup": _lookup,
    }
    return builders[place.kind](graph, place, option)


def _qkv(graph: Graph, place: Place, option: str) -> str:
    rows, hidden, width, kv = place.sizes
    kernel = usual(Place("product", place.format, (rows, hidden, width)))
    parts = [_matrix(n, hidden, seed) for seed, n in enumerate((width, kv, kv))]
    if option == "merged":
        found = project(graph, "x", _weights(place, *parts), kernel, (width, kv, kv))
    else:
        found = products(graph, "x", [_weights(place, m) for m in parts], kernel)
    return graph.op("Concat", *found, axis=1)


def _attention(graph: Graph, place: Place, option: str) -> str:
    _, _, heads, kv_heads, dim, causal = place.sizes
    return attend(graph, "x", "key", "value", "mask", Heads(heads, kv_heads, dim, dim**-0.5, bool(causal)), option)


def _first(graph: Graph, place: Place, option: str) -> str:
    batch, tokens, heads, dim, hidden = place.sizes
    width = heads * dim
    query, keys, values = (_weights(place, _matrix(width, hidden, seed)) for seed in range(3))
    kernel = usual(Place("product", place.format, (batch * tokens, hidden, width)))
    one = product(graph, graph.op("Gather", "x", graph.constant(torch.tensor(0)), axis=1), query, kernel)
    division = Heads(heads, heads, dim, dim**-0.5, one_query=True)
    return attend_first(graph, one, "x", (keys, None), (values, None), "mask", division, option, (kernel, "Attention"))


def _norm(graph: Graph, place: Place, option: str) -> str:
    width = place.sizes[1]
    return add_and_normalize(graph, "x", "other", Norm("n", torch.ones(width), torch.zeros(width), 1e-12), option)


def _lookup(graph: Graph, place: Place, option: str) -> str:
    weight = torch.randn(_WORDS, place.sizes[1], generator=torch.Generator().manual_seed(0))
    return lookup(graph, "x", Matrix("w", weight), {"w": encode(weight, place.format)}, option=option)
