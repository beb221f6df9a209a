"""What a shape costs on a target before anything is built: latency, size, memory and energy.

The time of a call is a sum over its operators of a roofline (Williams, Waterman and Patterson 2009) whose compute roof
depends on the size of the product, plus costs of dispatch:

    t = sum over operators of max(FLOPs / (P * e(m, n, k)) + stall, bytes / B) + dispatch * operators + fixed
    e(m, n, k) = fraction / (1 + rows / m + columns / n + depth / k)

The stall is the part of reading the weights from memory that computing does not hide. Where several kernels can compute
with a number format, a pass is priced with the one that makes it fastest: a prompt and the steps after it may differ.

Uncertainties of the profile's numbers are propagated to first order in the logarithms: the elasticity of the time with
respect to a number is the share of the time that it governs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from autolite.architecture import ModelShape
from autolite.hardware import without_map
from autolite.hardware.calls import Course, calls_of, course_of
from autolite.hardware.footprint import activations, file_sizes
from autolite.hardware.pieces import pieces_of
from autolite.hardware.profile import KINDS, Profile, growth
from autolite.hardware.roofline import CALIBRATED, Speeds, speeds_of
from autolite.hardware.segments import Array, Bools
from autolite.measure import Measurement, Workload

_AT_ONCE = 1024  # models in one table
UNCALIBRATED = 1.5  # without measurements on the device no interval is narrower than this factor each way


def predict(shape: ModelShape, profile: Profile, workload: Workload) -> dict[str, Measurement]:
    """Price a model on a target.

    Returns latency_ms (of one call; language models: the prompt and then `generated` steps), size_bytes, memory_bytes
    and energy_mj, and for language models ttft_ms (the prompt) and tokens_per_second (of the steps after it, each of
    which reads all weights once and the keys and values of the context so far). All are "predicted"; the size is exact.
    Of a model without an architecture map the products are known and what is between them is estimated, so that
    intervals of times are wider, and that of the size has the size of the graph in it.

    Raises:
        TargetError: if the workload wants more threads than the target's default unit has, or a number format that
            the target cannot run.
    """
    return predict_all([shape], profile, workload)[0]


def predict_all(shapes: Sequence[ModelShape], profile: Profile, workload: Workload) -> list[dict[str, Measurement]]:
    """Price many models at once, in less time than one by one; see `predict`."""
    speeds = speeds_of(profile, workload.threads)
    found: list[dict[str, Measurement]] = [{} for _ in shapes]
    for course, places in _by_course(shapes, workload).items():
        for start in range(0, len(places), _AT_ONCE):
            some = places[start : start + _AT_ONCE]
            prices = _predicted([shapes[place] for place in some], course, speeds, profile, workload)
            for place, each in zip(some, prices, strict=True):
                found[place] = each
    return found


def _by_course(shapes: Sequence[ModelShape], workload: Workload) -> dict[Course, list[int]]:
    """The places of the shapes whose calls have each course."""
    found: dict[Course, list[int]] = {}
    for place, shape in enumerate(shapes):
        found.setdefault(course_of(shape, workload), []).append(place)
    return found


def _predicted(
    shapes: Sequence[ModelShape], course: Course, speeds: Speeds, profile: Profile, workload: Workload
) -> Iterator[dict[str, Measurement]]:
    """Price models whose calls have one course."""
    pieces = pieces_of(shapes)
    calls = calls_of(pieces, course, speeds)
    estimated = np.array([shape.unmapped is not None for shape in shapes])
    found: dict[str, _Prices] = {}
    latency, *passes = _times(speeds, np.concatenate([calls.totals[None], calls.parts]), estimated)
    if len(passes) > 1:
        found["ttft_ms"], step = passes
        found["tokens_per_second"] = step._replace(values=1e3 * workload.batch / step.values)
    found["latency_ms"] = latency
    energy = np.hypot(latency.sigmas, speeds.power)
    found["energy_mj"] = _Prices(latency.values * speeds.watts, energy, latency.weak | speeds.weak_power)
    sizes = file_sizes(pieces)
    packed = profile.packing.value * calls.read
    memory = sizes + packed + activations(pieces, workload)
    packing = np.hypot(packed / memory * profile.packing.sigma, 0.1)
    found["memory_bytes"] = _Prices(memory, packing, np.full(len(shapes), profile.packing.kind not in CALIBRATED))
    graph = np.array([0.0 if shape.unmapped is None else without_map.graph_bytes(shape) for shape in shapes])
    found["size_bytes"] = _Prices(sizes, graph / sizes, np.zeros(len(shapes), np.bool_))
    columns = _measurements(found, profile, workload)
    for each in zip(*columns, strict=True):
        yield dict(zip(found, each, strict=True))


def time_parts(shape: ModelShape, profile: Profile, workload: Workload) -> dict[str, float]:
    """Return the milliseconds of a model's call by the number of the profile that governs them (the keys of
    `autolite.hardware.roofline.Speeds`); times `correction`, they add up to its latency.

    Raises:
        TargetError: as `predict`.
    """
    speeds = speeds_of(profile, workload.threads)
    (total,) = _totals([shape], speeds, workload)
    return dict(zip(speeds.keys, (total / 1e3).tolist(), strict=True))


def basis(shape: ModelShape, profile: Profile, workload: Workload) -> dict[str, float]:
    """Return which part of a model's predicted latency rests on numbers of each kind, the surest first; where several
    numbers are behind a part of it, the least sure counts.

    Raises:
        TargetError: as `predict`.
    """
    speeds = speeds_of(profile, workload.threads)
    (total,) = _totals([shape], speeds, workload)
    shares: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    for kind, share in zip(speeds.kinds, (total / total.sum()).tolist(), strict=True):
        shares[kind] += share
    return {kind: share for kind, share in shares.items() if share}


def predict_faster(baseline: ModelShape, shape: ModelShape, profile: Profile, workload: Workload) -> Measurement:
    """Predict how many times faster `shape` is than `baseline`. What both owe to the same number cancels.

    Raises:
        TargetError: as `predict`.
    """
    speeds = speeds_of(profile, workload.threads)
    slow, fast = totals = _totals([baseline, shape], speeds, workload)
    difference = (slow / slow.sum() - fast / fast.sum())[None]
    estimated = any(each.unmapped is not None for each in (baseline, shape))
    sigma = speeds.spread(difference, 2, np.array([estimated]))
    weak = np.array([speeds.is_weak(totals).any()])
    prices = _Prices(slow.sum() / fast.sum(keepdims=True), sigma, weak)
    ((found,),) = _measurements({"faster": prices}, profile, workload)
    return found


def _totals(shapes: Sequence[ModelShape], speeds: Speeds, workload: Workload) -> Array:
    """Microseconds of models' calls by what governs them [models, keys]."""
    found = np.empty((len(shapes), len(speeds.keys)))
    for course, places in _by_course(shapes, workload).items():
        found[places] = calls_of(pieces_of([shapes[place] for place in places]), course, speeds).totals
    return found


class _Prices(NamedTuple):
    """A metric of models: its values, their relative uncertainties and whether anything behind them is uncalibrated
    [models] each."""

    values: Array
    sigmas: Array
    weak: Bools


def _times(speeds: Speeds, parts: Array, estimated: Bools) -> list[_Prices]:
    """Milliseconds of several times of models, by what governs them [times, models, keys]."""
    totals = parts.sum(2)
    sigmas = speeds.spread(parts / totals[:, :, None], 1, estimated)
    milliseconds = totals * speeds.correction / 1e3
    return [_Prices(*each) for each in zip(milliseconds, sigmas, speeds.is_weak(parts), strict=True)]


def _measurements(metrics: Mapping[str, _Prices], profile: Profile, workload: Workload) -> Iterator[list[Measurement]]:
    """Yield of each metric the measurements of all models."""
    values, sigmas, weak = (np.array(each) for each in zip(*metrics.values(), strict=True))
    factors = np.maximum(growth(sigmas), np.where(weak, UNCALIBRATED, 1.0))
    bounds = (each.tolist() for each in (values, values / factors, values * factors))
    text = str(workload)
    for metric, *rows in zip(metrics, *bounds, strict=True):
        yield [
            Measurement(metric, value, low, high, "predicted", profile.runtime, text)
            for value, low, high in zip(*rows, strict=True)
        ]
