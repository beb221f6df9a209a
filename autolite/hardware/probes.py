"""Tiny ONNX models that each isolate one cost of this machine; `autolite.measure` times them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autolite.formats import INT7
from autolite.saturation import saturates

KERNELS = ("fp32", "int8", "int7", "int4")
ROWS = (1, 16, 64, 128)
SIZES = ((128, 512), (384, 384), (384, 1536), (1536, 384), (768, 3072))  # [k, n] of transformer layers, small to base
# Heads, the width of each, tokens
HEADS = ((12, 32, 16), (12, 32, 64), (12, 32, 128), (4, 64, 64), (4, 32, 32), (12, 64, 128), (2, 64, 128))
LAYERS = (1, 2, 4, 8, 16)  # pairs of [384, 1536] and [1536, 384] in a row: do their weights stay in the cache?
LAYER_ROWS = 16
CHAIN = (2, 64)  # operators that compute next to nothing
ACTIVATION, NORMALIZATION = (64, 1536), (64, 384)


@dataclass(frozen=True, eq=False)
class Probe:
    """A model as ONNX, and the inputs that it is always called with.

    `size` is (m, k, n, times) for products, and empty otherwise.
    """

    model: bytes
    inputs: Mapping[str, np.ndarray]
    size: tuple[int, ...] = ()


class Loaded:
    """A probe that can be called: a Runner that ignores what it is given."""

    def __init__(self, session: Any, inputs: Mapping[str, np.ndarray]) -> None:
        self.session, self.inputs = session, dict(inputs)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run one call."""
        return {"y": self.session.run(None, self.inputs)[0]}


def loaded(models: Mapping[str, Probe], threads: int) -> dict[str, Loaded]:
    """Load probes to run on `threads` threads, equal models once."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    # As the artifacts are run: threads do not spin between the calls, where others need the cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    sessions: dict[bytes, Any] = {}
    found = {}
    for name, probe in models.items():
        if probe.model not in sessions:
            sessions[probe.model] = onnxruntime.InferenceSession(
                probe.model, options, providers=["CPUExecutionProvider"]
            )
        found[name] = Loaded(sessions[probe.model], probe.inputs)
    return found


def probes(cache: float, saturated: bool) -> dict[str, Probe]:
    """Return all probes by name, for a last-level cache of `cache` bytes, and for a processor whose products of signed
    8-bit weights overflow or do not (`autolite.saturation.saturates`)."""
    rng = np.random.default_rng(0)

    def floats(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    found = {}
    for kernel, (k, n) in itertools.product(KERNELS, SIZES):
        if kernel == "int7" and not saturated:
            continue  # the kernel of int8 is exact, and theirs too
        model = _products([(kernel, k, n)], saturated)
        for m in ROWS:
            found[f"{kernel} {m} {k} {n}"] = Probe(model, {"x": floats(m, k)}, (m, k, n, 1))
    for heads, width, tokens in HEADS:
        arrays = {name: floats(1, tokens, heads * width) for name in ("x", "key", "value")}
        arrays["mask"] = np.zeros((1, 1, tokens, tokens), np.float32)
        found[f"attention {heads} {width} {tokens}"] = Probe(
            _attention(heads), arrays, (tokens, 2 * width, tokens, heads)
        )
    for depth in LAYERS:
        model = _products([("fp32", 384, 1536), ("fp32", 1536, 384)] * depth, saturated)
        found[f"layers {depth}"] = Probe(model, {"x": floats(LAYER_ROWS, 384)})
    k, n = 2048, int(min(max(2 * cache, 48e6), 256e6) / 4 / 2048) // 16 * 16
    found["memory"] = Probe(_products([("fp32", k, n)], saturated), {"x": floats(1, k)}, (1, k, n, 1))
    for length in CHAIN:
        nodes = []
        for i in range(0, length, 2):
            nodes.append(_node("Split", [f"t{i}" if i else "x"], [f"a{i}", f"b{i}"], axis=1, num_outputs=2))
            nodes.append(_node("Concat", [f"b{i}", f"a{i}"], ["y" if i == length - 2 else f"t{i + 2}"], axis=1))
        found[f"chain {length}"] = Probe(_graph(nodes, {}), {"x": floats(1, 16)})
    x = floats(*ACTIVATION)
    for name, form in {"activation": "none", "approximation": "tanh"}.items():
        found[name] = Probe(_graph([_node("Gelu", ["x"], ["y"], approximate=form)], {}), {"x": x})
    found["copy"] = Probe(_graph([_node("Add", ["x", "other"], ["y"])], {}, other=2), {"x": x, "other": x})
    scale = {"scale": np.ones(NORMALIZATION[1], np.float32), "shift": np.zeros(NORMALIZATION[1], np.float32)}
    norm = _node("LayerNormalization", ["x", "scale", "shift"], ["y"])
    found["normalization"] = Probe(_graph([norm], scale), {"x": floats(*NORMALIZATION)})
    return found


def square(kernel: str, size: int) -> Probe:
    """Return a product [size, size] x [size, size] of a kernel class.

    That of int8 has activations that are codes already, and signed weights small enough to be exact everywhere.
    """
    rng = np.random.default_rng(0)
    if kernel != "int8":
        x = rng.standard_normal((size, size), dtype=np.float32)
        return Probe(_products([(kernel, size, size)], saturates()), {"x": x}, (size, size, size, 1))
    node = _node("MatMulIntegerToFloat", ["x", "w", "s", "t", "z"], ["y"], contrib=True)
    weights = {"w": rng.integers(-INT7, INT7 + 1, (size, size), dtype=np.int8), "z": np.array(128, np.uint8)}
    weights |= {name: np.array(0.001, np.float32) for name in ("s", "t")}
    codes = rng.integers(0, 256, (size, size), dtype=np.uint8)
    return Probe(_graph([node], weights, codes=True), {"x": codes}, (size, size, size, 1))


def _node(kind: str, inputs: list[str], outputs: list[str], contrib: bool = False, **attributes: Any) -> Any:
    from onnx import helper

    return helper.make_node(kind, inputs, outputs, domain="com.microsoft" if contrib else "", **attributes)


def _graph(
    nodes: list[Any], weights: Mapping[str, np.ndarray], rank: int = 2, codes: bool = False, **extra: int
) -> bytes:
    """Return the model of a graph x -> y of this rank; `extra` names further float inputs and their ranks.

    x is float32, or uint8 with `codes`.
    """
    from onnx import TensorProto, helper, numpy_helper

    def value(name: str, rank: int, kind: int = TensorProto.FLOAT) -> Any:
        return helper.make_tensor_value_info(name, kind, [None] * rank)

    first = value("x", rank, TensorProto.UINT8 if codes else TensorProto.FLOAT)
    inputs = [first, *(value(n, r) for n, r in extra.items())]
    stored = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "probe", inputs, [value("y", rank)], stored)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return bytes(model.SerializeToString())


def _attention(heads: int) -> bytes:
    node = _node("Attention", ["x", "key", "value", "mask"], ["y"], q_num_heads=heads, kv_num_heads=heads)
    return _graph([node], {}, rank=3, key=3, value=3, mask=4)


def _products(products: Sequence[tuple[str, int, int]], saturated: bool) -> bytes:
    """Products [m, k] x [k, n] behind each other, each in its kernel class as AutoLite emits it."""
    rng = np.random.default_rng(0)
    # Repeated blocks: drawing hundreds of megabytes of random numbers takes longer than timing them.
    normal = (0.03 * rng.standard_normal(2**16)).astype(np.float32)
    nodes: list[Any] = []
    weights: dict[str, np.ndarray] = {}
    for i, (kernel, k, n) in enumerate(products):
        x, y = f"t{i}" if i else "x", f"t{i + 1}" if i < len(products) - 1 else "y"
        w, s, b = f"w{i}", f"s{i}", f"b{i}"
        weights[b] = np.zeros(n, np.float32)
        if kernel == "fp32":
            # Not equal ones: a runtime may pack and keep those once.
            weights[w] = np.resize(np.roll(normal, i), (n, k))
            nodes.append(_node("Gemm", [x, w, b], [y], transB=1))
        elif kernel in ("int8", "int7"):
            largest = 127 if kernel == "int8" else INT7
            codes = rng.integers(-largest, largest + 1, (k, n), dtype=np.int8)
            weights[w], weights[s], zero = codes, np.full(n, 0.001, np.float32), ""
            if kernel == "int8" and saturated:  # where signed codes overflow, unsigned ones are emitted
                zero = f"z{i}"
                weights[w], weights[zero] = (codes.astype(np.int16) + 128).astype(np.uint8), np.full(n, 128, np.uint8)
            nodes.append(_node("DynamicQuantizeMatMul", [x, w, s, zero, b], [y], contrib=True))
        else:
            weights[w] = rng.integers(0, 256, (n, k // 32, 16), dtype=np.uint8)
            weights[s] = np.full((n, k // 32), 0.001, np.float32)
            settings = {"K": k, "N": n, "bits": 4, "block_size": 32, "accuracy_level": 4}
            nodes.append(_node("MatMulNBits", [x, w, s, "", "", b], [y], contrib=True, **settings))
    return _graph(nodes, weights)
