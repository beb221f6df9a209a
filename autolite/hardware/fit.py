"""From the times of probes to the numbers of a profile."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from autolite.formats import FORMATS, INT7, Format
from autolite.hardware.probes import ACTIVATION, CHAIN, KERNELS, LAYER_ROWS, LAYERS, NORMALIZATION, Probe
from autolite.hardware.profile import Profile
from autolite.linear_grids import Linear
from autolite.measure import Timing

USUAL_CACHE = 8.0 * 2**20  # bytes; where the system does not tell


@dataclass(frozen=True)
class Machine:
    """What is known of a machine before anything is timed.

    Attributes:
        name: of its profile.
        processor: for people.
        threads: that the probes run on.
        memory: bytes.
        cache: bytes of the last-level cache; None if the system does not tell.
    """

    name: str
    processor: str
    threads: int
    memory: float
    cache: float | None


def fit_profile(timings: Mapping[str, Timing], models: Mapping[str, Probe], machine: Machine, runtime: str) -> Profile:
    """Fit the numbers of a profile to the times of the probes.

    Args:
        timings: of each probe.
        models: the probes, for their sizes.
        machine: that they ran on.
        runtime: what ran them, and its version.
    """
    us = {name: quiet(timing) * 1e3 for name, timing in timings.items()}
    date = datetime.date.today()
    threads = machine.threads
    counted = f"{threads} thread{'s' if threads > 1 else ''}"
    source = f"AutoLite's probes, {runtime}, {counted}"

    def number(value: float, unit: str, sigma: float, kind: str = "measured", source: str = source) -> list[Any]:
        return [float(f"{value:.4g}"), unit, kind, source, date, round(sigma, 3)]

    few, many = CHAIN
    dispatch = max((us[f"chain {many}"] - us[f"chain {few}"]) / (many - few), 0.05)
    fixed = max(us[f"chain {few}"] - few * dispatch, 0.0)
    net = {name: max(time - dispatch - fixed, 0.1 * time) for name, time in us.items()}
    one = number(1, "1", 0.0, "calibrated", "1 by construction: the peak is the rate fitted to the probes")
    peak, efficiency = {}, {}
    kernels = [kernel for kernel in KERNELS if any(name.startswith(f"{kernel} ") for name in us)]
    seven = "int7" if "int7" in kernels else "int8"  # which of the two kernels takes codes of 7 bits
    for kernel in (*kernels, "attention"):
        names = [name for name in us if name.startswith(f"{kernel} ")]
        sizes = np.array([models[name].size for name in names], dtype=float)
        fit = fit_attention if kernel == "attention" else fit_product
        found, residual = fit(sizes, np.array([net[name] for name in names]))
        sigma = max(residual, 0.03)
        peak[kernel] = number(found[0] / 1e3, "GFLOPS", sigma / 2, "calibrated")  # a model averages over several sizes
        halves = zip(("rows", "columns", "depth"), found[1:4], strict=True)
        efficiency[kernel] = {
            "fraction": one,
            **{part: number(half, "1", sigma, "calibrated") for part, half in halves},
        }
    _, k, n, _ = models["memory"].size
    bandwidth = 4 * k * n / net["memory"]  # bytes a microsecond
    found_share, stall = _fit_cache(net, bandwidth, machine.cache or USUAL_CACHE)

    def rate(name: str, count: float, unit: str) -> list[Any]:
        return number(count / net[name] / 1e3, unit, max(0.05, _sigma(timings[name])))

    watts = "usual for a core of a server or desktop; this machine was not asked"
    system = "as the operating system reports it"
    heard = "" if machine.cache else "; its nominal size is not known"
    unit = {
        "name": "cpu",
        "threads": threads,
        "peak": peak,
        "elementwise": {
            "activation": rate("activation", float(np.prod(ACTIVATION)), "Gelem/s"),
            "approximation": rate("approximation", float(np.prod(ACTIVATION)), "Gelem/s"),
            "normalization": rate("normalization", float(np.prod(NORMALIZATION)), "Gelem/s"),
        },
        "softmax": number(found[4], "Mrow/s", sigma, "calibrated"),  # of the attention, fitted last
        "scaling": number(1, "1", 0.0, "calibrated", "1 by construction: all threads were measured together"),
        "power": number(4 + 6 * threads, "W", 0.7, "assumed", watts),
    }
    profile = {
        "name": machine.name,
        "description": f"{machine.processor}, {counted}, {runtime}",
        "default_unit": "cpu",
        "units": [unit],
        "efficiency": efficiency,
        "formats": {name: _classes(form, seven) for name, form in FORMATS.items()},
        "memory": {
            "size": number(machine.memory / 1e9, "GB", 0.0, source=system),
            "bandwidth": number(bandwidth / 1e3, "GB/s", _sigma(timings["memory"])),
            "stall": number(stall, "1", 0.2, "calibrated"),
        },
        "cache": {
            "size": number(found_share / 1e6, "MB", 0.3, "calibrated", source + heard),
            "bandwidth": rate("copy", 3 * 4 * float(np.prod(ACTIVATION)), "GB/s"),
        },
        "dispatch": number(dispatch, "us", 0.3),
        "fixed": number(fixed, "us", max(0.1, _sigma(timings[f"chain {few}"]))),
        "idle": number(4, "W", 0.7, "assumed", watts),
        "packing": number(1, "1", 0.3, "assumed", "ONNX Runtime keeps a packed copy of every matrix"),
        "correction": number(
            1, "1", 0.2, "assumed", "what sums of probes miss on whole models, most where others use the memory too"
        ),
    }
    return Profile.model_validate(profile)


def _classes(form: Format, seven: str) -> list[str]:
    """Return the kernel classes that a format can be multiplied in; `seven` is that of codes of 7 bits.

    Groups of 2 bits are read by the kernel of 4 bits' at its speed for a few rows; for more, decoded ones are faster.
    """
    if form.activations != "any":
        largest = getattr(form.layout, "largest", 0)
        return ["fp32"] if form.activations == "float" else [seven if largest == INT7 else "int8"]
    layout = form.layout
    blocks = isinstance(layout, Linear) and layout.group > 0 and layout.bits in (2, 4)
    return [*(["int4"] if blocks else []), seven, "fp32"]


def fit_product(sizes: np.ndarray, microseconds: np.ndarray) -> tuple[np.ndarray, float]:
    """Fit 2/P * (mkn + rows kn + columns mk + depth mn) to the times of products.

    `sizes` is [probes, 4]: m, k, n and how often the product is made. Returns (speed in FLOPs a microsecond, rows,
    columns, depth) and the relative standard deviation of the residuals.
    """
    m, k, n, times = sizes.T
    found, residual = fit_terms(2 * times * np.stack([m * k * n, k * n, m * k, m * n]), microseconds)
    return np.array([1 / found[0], *(found[1:] / found[0])]), residual


def fit_attention(sizes: np.ndarray, microseconds: np.ndarray) -> tuple[np.ndarray, float]:
    """Fit 2/P * (mkn + columns mk + depth mn) + m / softmax.

    Returns (speed, rows = 0, columns, depth, softmax in rows a microsecond) and the residuals' deviation.
    """
    m, k, n, times = sizes.T
    found, residual = fit_terms(times * np.stack([2 * m * k * n, 2 * m * k, 2 * m * n, m]), microseconds)
    product, columns, depth, row = found
    return np.array([1 / product, 0, columns / product, depth / product, 1 / max(row, 1e-6)]), residual


def fit_terms(terms: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, float]:
    """Fit times = sum of coefficient * term, `terms` [terms, samples], the first one positive and none negative.

    Absolute relative errors are minimised, because a sample that another program disturbed must not bend the fit; the
    terms are few enough to try every set of those that are positive. Returns the coefficients and the relative
    standard deviation of the residuals, as their median size tells it.
    """
    relative = (terms / times).T
    best, least, errors = np.zeros(len(terms)), np.inf, np.zeros(len(times))
    for count in range(len(terms)):
        for others in itertools.combinations(range(1, len(terms)), count):
            chosen = relative[:, [0, *others]]
            weights = np.ones(len(times))
            for _ in range(20):  # iteratively reweighted least squares
                found = np.linalg.lstsq(chosen * weights[:, None], weights, rcond=None)[0]
                error = np.abs(chosen @ found - 1)
                weights = 1 / np.sqrt(np.maximum(error, 0.01))
            if (found > 0).all() and error.sum() < least:
                best, least, errors = np.zeros(len(terms)), float(error.sum()), error
                best[[0, *others]] = found
    return best, 1.48 * float(np.median(errors))


def _fit_cache(net: Mapping[str, float], bandwidth: float, nominal: float) -> tuple[float, float]:
    """Fit the share of the cache in bytes and the stall: what layers cost more when others came in between.

    A layer's two matrices alone stay in the cache; the deeper the stack, the fewer of its weights do.
    """
    nbytes = 2 * 4 * 384 * 1536
    alone = net[f"fp32 {LAYER_ROWS} 384 1536"] + net[f"fp32 {LAYER_ROWS} 1536 384"]
    extra = np.array([net[f"layers {depth}"] / depth - alone for depth in LAYERS])
    best, least = (nominal, 0.0), np.inf
    for share in nominal * np.geomspace(1 / 32, 1, 41):
        missing = np.clip(np.array([depth * nbytes for depth in LAYERS]) / share - 1, 0, 1) * nbytes / bandwidth
        stall = max(0.0, float(missing @ extra) / max(float(missing @ missing), 1e-12))
        error = float(np.sum((extra - stall * missing) ** 2))
        if error <= least:
            best, least = (float(share), stall), error
    return best


def quiet(timing: Timing) -> float:
    """Return the quietest round's median in milliseconds: what a machine can do, as others only ever add time."""
    return float(timing.medians.min())


def _sigma(timing: Timing) -> float:
    low, high = timing.median_interval()
    return min(max(0.02, (high - low) / (2 * 1.96 * timing.median)), 1.0)  # where others run, it may be a hundred
