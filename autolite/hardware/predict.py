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

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autolite.architecture import ModelShape, factor_format
from autolite.errors import TargetError
from autolite.families import DESCRIBED
from autolite.hardware import without_map
from autolite.hardware.blocks import Array, Call, Pass, pass_of
from autolite.hardware.footprint import Computed, activations, file_size, layers_of, reads, weights_read
from autolite.hardware.profile import KINDS, Profile, growth
from autolite.hardware.roofline import CALIBRATED, Speeds, speeds_of, times
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
    parts = (shapes[start : start + _AT_ONCE] for start in range(0, len(shapes), _AT_ONCE))
    return [prices for part in parts for prices in _predicted(part, profile, workload)]


def _predicted(shapes: Sequence[ModelShape], profile: Profile, workload: Workload) -> list[dict[str, Measurement]]:
    speeds = speeds_of(profile, workload.threads)
    calls = _calls(shapes, speeds, workload)
    totals = np.array([call.total for call in calls])
    estimated = np.array([shape.unmapped is not None for shape in shapes])
    latency = _times(speeds, totals, estimated)
    first = _times(speeds, np.array([call.parts[0] for call in calls]), estimated)
    last = _times(speeds, np.array([call.parts[-1] for call in calls]), estimated)
    found = []
    for i, (shape, call) in enumerate(zip(shapes, calls, strict=True)):
        prices: dict[str, tuple[float, float, bool]] = {}  # metric: value, relative uncertainty, floored
        if len(call.parts) > 1:
            prices["ttft_ms"] = first[i]
            step, sigma, weak = last[i]
            prices["tokens_per_second"] = (1e3 * workload.batch / step, sigma, weak)
        milliseconds, sigma, weak = prices["latency_ms"] = latency[i]
        energy = math.hypot(sigma, speeds.power)
        prices["energy_mj"] = (milliseconds * speeds.watts, energy, weak or speeds.weak_power)
        size = float(file_size(shape))
        packed = profile.packing.value * call.read
        memory = size + packed + activations(shape, workload)
        packing = packed / memory * profile.packing.sigma
        prices["memory_bytes"] = (memory, math.hypot(packing, 0.1), profile.packing.kind not in CALIBRATED)
        graph = 0.0 if shape.unmapped is None else without_map.graph_bytes(shape) / size
        prices["size_bytes"] = (size, graph, False)
        found.append({metric: _measurement(metric, *prices[metric], profile, workload) for metric in prices})
    return found


def time_parts(shape: ModelShape, profile: Profile, workload: Workload) -> dict[str, float]:
    """Return the milliseconds of a model's call by the number of the profile that governs them (the keys of
    `autolite.hardware.roofline.Speeds`); times `correction`, they add up to its latency.

    Raises:
        TargetError: as `predict`.
    """
    speeds = speeds_of(profile, workload.threads)
    (call,) = _calls([shape], speeds, workload)
    return dict(zip(speeds.keys, (call.total / 1e3).tolist(), strict=True))


def basis(shape: ModelShape, profile: Profile, workload: Workload) -> dict[str, float]:
    """Return which part of a model's predicted latency rests on numbers of each kind, the surest first; where several
    numbers are behind a part of it, the least sure counts.

    Raises:
        TargetError: as `predict`.
    """
    speeds = speeds_of(profile, workload.threads)
    (call,) = _calls([shape], speeds, workload)
    shares: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    for kind, share in zip(speeds.kinds, (call.total / call.total.sum()).tolist(), strict=True):
        shares[kind] += share
    return {kind: share for kind, share in shares.items() if share}


def predict_faster(baseline: ModelShape, shape: ModelShape, profile: Profile, workload: Workload) -> Measurement:
    """Predict how many times faster `shape` is than `baseline`. What both owe to the same number cancels.

    Raises:
        TargetError: as `predict`.
    """
    speeds = speeds_of(profile, workload.threads)
    slow, fast = (call.total for call in _calls([baseline, shape], speeds, workload))
    difference = (slow / slow.sum() - fast / fast.sum())[None]
    estimated = any(each.unmapped is not None for each in (baseline, shape))
    sigma = speeds.spread(difference, 2, np.array([estimated]))
    weak = speeds.is_weak(np.stack([slow, fast])).any()
    return _measurement("faster", float(slow.sum() / fast.sum()), float(sigma[0]), bool(weak), profile, workload)


@dataclass(frozen=True, eq=False)
class _Call:
    """A model's call: microseconds by the keys of `Speeds` of its passes, as they are fastest (the prompt, and for
    language models a step after it), how often each is made, and the bytes of all matrices that the runtime reads."""

    parts: Array  # [passes, keys]
    counts: Array  # [passes]
    read: float

    @property
    def total(self) -> Array:
        """Microseconds of the whole call [keys]."""
        found: Array = self.counts @ self.parts
        return found


def _calls(shapes: Sequence[ModelShape], speeds: Speeds, workload: Workload) -> list[_Call]:
    """Choose the kernels of each pass of each model's call that make it fastest."""
    every = [_passes(shape, workload) for shape in shapes]
    rows: list[Pass] = []
    weights: list[int] = []
    options: list[Computed] = []  # of each row
    owners: dict[tuple[int, int], list[int]] = {}  # the rows of each pass of each model
    for place, shape in enumerate(shapes):
        layers = layers_of(shape)
        for chosen in _kernels(shape, speeds):
            computed = Computed.by(shape, layers, chosen, speeds.sparsity)
            total = weights_read(computed)
            # Steps of the second of two stacks read its own (with those of the keys and values that are there already).
            steps = weights_read(computed, stack=1) if len(shape.stacks) > 1 else total
            for number, (call, _) in enumerate(every[place]):
                owners.setdefault((place, number), []).append(len(rows))
                rows.append(pass_of(computed, call))
                weights.append(steps if call.source else total)
                options.append(computed)
    parts = times(speeds, rows, np.array(weights, dtype=np.float64))
    totals = parts.sum(1).tolist()
    found = []
    for place in range(len(shapes)):
        best = [min(owners[place, number], key=totals.__getitem__) for number in range(len(every[place]))]
        counts = np.array([count for _, count in every[place]], dtype=np.float64)
        # A matrix that the prompt and the steps read in two forms is kept in both, and for each of its uses: a shared
        # one takes less of the file, but ONNX Runtime packs it for every product.
        forms = zip(*(reads(options[row]) for row in best), strict=True)
        found.append(_Call(parts[best], counts, float(sum(sum(set(each)) for each in forms))))
    return found


def _passes(shape: ModelShape, workload: Workload) -> list[tuple[Call, int]]:
    """The pass over the prompt, once, and for language models a pass for one token, as often as one is generated: by
    the second stack, if there are two."""
    prompt = Call(workload.batch, workload.tokens, workload.tokens), 1
    if len(shape.stacks) > 1:
        step = Call(workload.batch, 1, 1 + workload.generated // 2, source=workload.tokens)
        return [prompt, (step, workload.generated)]
    if not (shape.stacks[-1].causal and shape.outputs == shape.vocab):
        return [prompt]
    return [prompt, (Call(workload.batch, 1, workload.tokens + workload.generated // 2), workload.generated)]


def _kernels(shape: ModelShape, speeds: Speeds) -> Iterator[Mapping[str, str]]:
    """Yield every choice of a kernel class for each of the formats that the shape's products are in.

    Raises:
        TargetError: if the target cannot run one of them.
    """
    used = _multiplied(shape)
    for form in sorted(used - speeds.formats.keys()):
        known = ", ".join(speeds.formats)
        raise TargetError(f"the target cannot run the number format '{form}'; it runs {known}")
    first = {form: kernels[0] for form, kernels in speeds.formats.items()}
    several = [form for form in speeds.formats if form in used and len(speeds.formats[form]) > 1]
    for chosen in itertools.product(*(speeds.formats[form] for form in several)):
        yield {**first, **dict(zip(several, chosen, strict=True))}


def _multiplied(shape: ModelShape) -> set[str]:
    """The number formats of the matrices that are multiplied with."""
    if shape.unmapped is not None:
        return {product.format for product in shape.unmapped.products}
    used = {shape.head_format} if shape.outputs else set()
    for stack in shape.stacks:
        for layer in stack.layers:
            used |= {layer.attention_format, layer.ffn_format}
            used |= {factor_format(layer.attention_format)} if layer.attention_rank else set()
            used |= {factor_format(layer.ffn_format)} if layer.ffn_rank else set()
    if DESCRIBED[shape.family].embedding_projection or DESCRIBED[shape.family].patch:
        used.add(shape.embedding_format)
    if shape.embedding_rank:
        used.add(factor_format(shape.embedding_format))
    return used


def _times(speeds: Speeds, parts: Array, estimated: NDArray[np.bool_]) -> list[tuple[float, float, bool]]:
    """Milliseconds, their relative uncertainty and whether anything behind them is uncalibrated, of times by what
    governs them [times, keys]."""
    totals = parts.sum(1)
    sigmas = speeds.spread(parts / totals[:, None], 1, estimated)
    milliseconds = totals * speeds.correction / 1e3
    return list(zip(milliseconds.tolist(), sigmas.tolist(), speeds.is_weak(parts).tolist(), strict=True))


def _measurement(
    metric: str, value: float, sigma: float, floored: bool, profile: Profile, workload: Workload
) -> Measurement:
    factor = max(growth(sigma), UNCALIBRATED if floored else 1.0)
    return Measurement(metric, value, value / factor, value * factor, "predicted", profile.runtime, str(workload))
