"""This machine as a target: a profile from a few seconds of small ONNX models, cached for the next time."""

from __future__ import annotations

import datetime
import itertools
import os
import platform
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from autolite.errors import TargetError
from autolite.hardware.profile import Profile, dump_profile, parse_profile
from autolite.measure import Timing, host_lock, time_interleaved

_ROWS = (1, 16, 64, 128)
_SIZES = ((128, 512), (384, 384), (384, 1536), (1536, 384), (768, 3072))  # [k, n] of transformer layers, small to base
_KERNELS = {"fp32": 4.0, "int8": 1.0, "int4": 0.625}  # and the bytes a weight takes
_CHAIN = 64
_SECONDS = 6.0
_REVISION = 1  # of the probes and their fit: an older cache file is measured again


def local_profile(
    threads: int | None = None, refresh: bool = False, progress: Callable[[str], None] | None = None
) -> Profile:
    """Return the profile of this machine on `threads` threads (all physical cores if None).

    It is measured in about ten seconds the first time, and then read from the user's cache folder; the key is the
    processor's name, the number of threads and ONNX Runtime's version.

    Args:
        threads: number of threads that ONNX Runtime computes with.
        refresh: measure again even if a cached profile exists.
        progress: told in words what is done.

    Raises:
        TargetError: if this machine has fewer processors than `threads`.
    """
    import onnxruntime
    import psutil

    available = os.cpu_count() or 1
    threads = threads or psutil.cpu_count(logical=False) or available
    if not 1 <= threads <= available:
        raise TargetError(f"threads={threads}, but this machine has {available} processors: ask for 1 to {available}")
    say = progress or (lambda message: None)
    name = re.sub(r"[^a-z0-9]+", "-", cpu_name().lower()).strip("-")
    file = cache_dir() / "hardware" / f"{name}-{threads}t-ort{onnxruntime.__version__}-r{_REVISION}.yaml"
    with host_lock(say):
        if not refresh and file.is_file():
            with suppress(TargetError):
                return parse_profile(file.read_text(encoding="utf-8"), str(file))
        say(f"measuring this machine on {threads} thread{'s' if threads > 1 else ''}, about ten seconds")
        profile = _measure(threads, onnxruntime.__version__)
        with suppress(OSError):  # a read-only home only means measuring again next time
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(f".{os.getpid()}.tmp")
            partial.write_text(dump_profile(profile), encoding="utf-8")
            partial.replace(file)
    return profile


def cache_dir() -> Path:
    """Return the user's cache folder for AutoLite: `$XDG_CACHE_HOME/autolite`, or `~/.cache/autolite`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "autolite"


def cpu_name() -> str:
    """Return the processor's name as the system gives it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cache_bytes() -> tuple[float, bool]:
    """Size of the last-level cache in bytes, and whether the system told it."""
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with suppress(OSError, ValueError):
            text = file.read_text(encoding="ascii").strip()
            sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]] if text[-1] in "KM" else int(text))
    return (float(max(sizes)), True) if max(sizes) else (8.0 * 2**20, False)


class _Probe:
    """An ONNX model with fixed inputs; a Runner that ignores what it is given."""

    def __init__(self, model: Any, inputs: Mapping[str, np.ndarray], threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.inputs = dict(inputs)
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"y": self.session.run(None, self.inputs)[0]}


def _model(nodes: list[Any], weights: Mapping[str, np.ndarray], rank: int = 2) -> Any:
    import onnx
    from onnx import TensorProto, helper

    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * rank) for name in "xy"]
    initializers = [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "probe", ends[:1], ends[1:], initializers)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _product(kernel: str, k: int, n: int) -> Any:
    """The model of one product [m, k] x [k, n] as ONNX Runtime computes it in this kernel class."""
    from onnx import helper

    rng = np.random.default_rng(0)
    if kernel == "fp32":
        # Repeated blocks: drawing hundreds of megabytes of random numbers takes longer than timing them.
        weight = np.resize(rng.standard_normal(2**16, dtype=np.float32), (k, n))
        return _model([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": weight})
    if kernel == "int8":
        weights: dict[str, np.ndarray] = {
            "w": rng.integers(-127, 128, (k, n), dtype=np.int8),
            "scale": np.full(n, 0.01, np.float32),
            "bias": np.zeros(n, np.float32),
        }
        names = ["x", "w", "scale", "", "bias"]
        return _model([helper.make_node("DynamicQuantizeMatMul", names, ["y"], domain="com.microsoft")], weights)
    settings: dict[str, Any] = {"K": k, "N": n, "bits": 4, "block_size": 32, "accuracy_level": 4}
    weights = {
        "w": rng.integers(0, 256, (n, k // 32, 16), dtype=np.uint8),
        "scale": np.full((n, k // 32), 0.01, np.float32),
    }
    node = helper.make_node("MatMulNBits", ["x", "w", "scale"], ["y"], domain="com.microsoft", **settings)
    return _model([node], weights)


def _probes(threads: int, cache: float) -> dict[str, _Probe]:
    from onnx import helper

    rng = np.random.default_rng(0)

    def floats(*shape: int) -> dict[str, np.ndarray]:
        return {"x": rng.standard_normal(shape, dtype=np.float32)}

    probes = {}
    for kernel, (k, n) in itertools.product(_KERNELS, _SIZES):
        first = _Probe(_product(kernel, k, n), floats(1, k), threads)
        for m in _ROWS:
            probe = object.__new__(_Probe)
            probe.session, probe.inputs = first.session, floats(m, k)
            probes[f"{kernel} {m} {k} {n}"] = probe
    # Weights twice as large as the cache come from memory, an eighth of it from the cache (both beyond the core's own).
    for name, nbytes in (("memory", min(max(2 * cache, 48e6), 256e6)), ("cache", cache / 8)):
        n = int(nbytes / 4 / 2048) // 16 * 16
        probes[f"{name} 1 2048 {n}"] = _Probe(_product("fp32", 2048, n), floats(1, 2048), threads)
    for length in (1, _CHAIN):
        edges = ["x", *(f"t{i}" for i in range(1, length)), "y"]
        nodes = [helper.make_node("Add", [edges[i], f"c{i}"], [edges[i + 1]]) for i in range(length)]
        weights = {f"c{i}": np.full((1, 16), i + 1, np.float32) for i in range(length)}
        probes[f"chain {length}"] = _Probe(_model(nodes, weights), floats(1, 16), threads)
    ones = {"s": np.ones(384, np.float32), "b": np.zeros(384, np.float32)}
    gelu = _model([helper.make_node("Gelu", ["x"], ["y"])], {})
    norm = _model([helper.make_node("LayerNormalization", ["x", "s", "b"], ["y"])], ones)
    softmax = _model([helper.make_node("Softmax", ["x"], ["y"])], {})
    probes["activation"] = _Probe(gelu, floats(64, 1536), threads)
    probes["normalization"] = _Probe(norm, floats(64, 384), threads)
    probes["softmax"] = _Probe(softmax, floats(12 * 64, 64), threads)
    return probes


def _fit(sizes: np.ndarray, microseconds: np.ndarray) -> tuple[np.ndarray, float]:
    """Fit 2/P * (mkn + rows kn + columns mk + depth mn) with least relative squares and no negative term.

    `sizes` is [probes, 3] of m, k, n. Returns (speed in FLOPs a microsecond, rows, columns, depth) and the relative
    standard deviation of the residuals. Four terms are few enough to try every set of those that are positive.
    """
    m, k, n = sizes.T
    terms = 2 * np.stack([m * k * n, k * n, m * k, m * n], axis=1) / microseconds[:, None]
    best, least = np.zeros(4), np.inf
    for count in range(4):
        for others in itertools.combinations((1, 2, 3), count):
            chosen = [0, *others]
            found = np.linalg.lstsq(terms[:, chosen], np.ones(len(terms)), rcond=None)[0]
            error = float(np.sum((terms[:, chosen] @ found - 1) ** 2))
            if (found > 0).all() and error < least:
                best, least = np.zeros(4), error
                best[chosen] = found
    return np.array([1 / best[0], *(best[1:] / best[0])]), float(np.sqrt(least / max(1, len(terms) - 4)))


def _measure(threads: int, version: str) -> Profile:
    import psutil

    cache, known = _cache_bytes()
    timings = time_interleaved(_probes(threads, cache), {}, _SECONDS, warmup=0.02)
    us = {name: timing.median * 1e3 for name, timing in timings.items()}
    date = datetime.date.today()
    source = f"probes of AutoLite, ONNX Runtime {version}, {threads} thread(s)"

    def number(value: float, unit: str, sigma: float, kind: str = "measured", source: str = source) -> list[Any]:
        return [float(f"{value:.4g}"), unit, kind, source, date, round(sigma, 3)]

    dispatch = max((us[f"chain {_CHAIN}"] - us["chain 1"]) / (_CHAIN - 1), 0.05)
    fixed = max(us["chain 1"] - dispatch, 0.0)
    peak, efficiency = {}, {}
    for kernel in _KERNELS:
        probes = [
            (name, np.array([float(part) for part in name.split()[1:]])) for name in us if name.startswith(kernel)
        ]
        net = np.array([max(us[name] - dispatch - fixed, 0.1 * us[name]) for name, _ in probes])
        (speed, *halves), residual = _fit(np.array([size for _, size in probes]), net)
        sigma = max(residual, 0.03)
        peak[kernel] = number(speed / 1e3, "GFLOPS", sigma / 2, "calibrated")  # a model averages over several sizes
        one = number(1, "1", 0.0, "calibrated", "1 by construction: the peak is the rate fitted to the probes")
        efficiency[kernel] = {"fraction": one}
        for part, half in zip(("rows", "columns", "depth"), halves, strict=True):
            efficiency[kernel][part] = number(half, "1", sigma, "calibrated")

    def bandwidth(name: str) -> list[Any]:
        probe = next(p for p in us if p.startswith(f"{name} "))
        _, _, k, n = probe.split()
        return number(4 * int(k) * int(n) / us[probe] / 1e3, "GB/s", _sigma(timings[probe]))

    def rate(name: str, elements: int) -> list[Any]:
        net = max(us[name] - dispatch - fixed, 0.1 * us[name])
        return number(elements / net / 1e3, "Gelem/s", max(0.05, _sigma(timings[name])))

    watts = "a usual figure for a server or desktop core; this machine was not asked"
    system = "as the operating system reports it"
    return Profile.model_validate(
        {
            "name": "local",
            "description": f"{cpu_name()}, {threads} thread(s), ONNX Runtime {version}, measured {date}",
            "default_unit": "cpu",
            "units": [
                {
                    "name": "cpu",
                    "threads": threads,
                    "peak": peak,
                    "elementwise": {
                        "activation": rate("activation", 64 * 1536),
                        "normalization": rate("normalization", 64 * 384),
                        "softmax": rate("softmax", 12 * 64 * 64),
                    },
                    "scaling": number(0.9, "1", 0.1, "assumed", "only for fewer threads than were measured"),
                    "power": number(4 + 6 * threads, "W", 0.7, "assumed", watts),
                }
            ],
            "efficiency": efficiency,
            "formats": {"fp32": "fp32", "int8": "int8", "int4": "int4", "kmeans4": "fp32"},
            "memory": {
                "size": number(psutil.virtual_memory().total / 1e9, "GB", 0.0, source=system),
                "bandwidth": bandwidth("memory"),
            },
            "cache": {
                "size": number(cache / 1e6, "MB", *((0.0, "measured", system) if known else (0.7, "assumed", "usual"))),
                "bandwidth": bandwidth("cache"),
            },
            "dispatch": number(dispatch, "us", _sigma(timings[f"chain {_CHAIN}"])),
            "fixed": number(fixed, "us", max(0.1, _sigma(timings["chain 1"]))),
            "idle": number(4, "W", 0.7, "assumed", watts),
            "packing": number(1, "1", 0.3, "assumed", "ONNX Runtime keeps a packed copy of every matrix"),
            "correction": number(1, "1", 0.15, "assumed", "what sums of probes usually miss on whole models"),
        }
    )


def _sigma(timing: Timing) -> float:
    low, high = timing.median_interval()
    return max(0.02, (high - low) / (2 * 1.96 * timing.median))
