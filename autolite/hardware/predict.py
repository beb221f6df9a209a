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
from collections import Counter
from collections.abc import Iterator

from autolite import formats
from autolite.architecture import LayerShape, MatMul, ModelShape, Stack, factor_format, matmuls
from autolite.families import FAMILIES
from autolite.hardware import without_map
from autolite.hardware.footprint import BYTES, activations, file_size, head_of_shape, matrices, square_layers
from autolite.hardware.profile import Profile, growth
from autolite.hardware.roofline import CALIBRATED, Speeds, Time, speeds_of
from autolite.measure import Measurement, Workload

UNCALIBRATED = 1.5  # without measurements on the device no interval is narrower than this factor each way

# Operators of the graph that is run; "gated" layers also turn queries and keys by their positions.
_OPERATORS = {"attention": 9, "ffn": 6, "gated": 10, "absorbed": 9, "around": 26}


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
    speeds = speeds_of(profile, workload.threads)
    prompt, *steps = _passes(shape, speeds, workload)
    found: dict[str, tuple[float, float, bool]] = {}  # metric: value, relative uncertainty, floored
    if steps:
        step = steps[0][0]
        found["ttft_ms"] = (prompt[0].total / 1e3, *_spread(speeds, _shares([prompt])))
        found["tokens_per_second"] = (1e6 * workload.batch / step.total, *_spread(speeds, _shares(steps, 1.0)))
    latency = sum(part.total * count for part, count in [prompt, *steps]) / 1e3
    sigma, weak = _spread(speeds, _shares([prompt, *steps]))
    found["latency_ms"] = (latency, sigma, weak)
    found["energy_mj"] = (
        latency * speeds.watts,
        math.hypot(sigma, speeds.sigmas["watts"]),
        weak or "watts" in speeds.weak,
    )
    stored, _ = matrices(shape, prompt[0].kernels)
    size = float(file_size(shape, stored))
    # A matrix that the prompt and the steps read in two forms is kept in both, and for each of its uses: a shared one
    # takes less of the file, but ONNX Runtime packs it for every product.
    read = {form for time, _ in [prompt, *steps] for form in time.weights.items()}
    uses = Counter(product.weights for product in matmuls(shape))
    packed = profile.packing.value * sum(nbytes * uses[name] for name, nbytes in read)
    memory = size + packed + activations(shape, workload)
    packing = packed / memory * profile.packing.sigma
    found["memory_bytes"] = (memory, math.hypot(packing, 0.1), profile.packing.kind not in CALIBRATED)
    graph = 0.0 if shape.unmapped is None else without_map.graph_bytes(shape) / size
    found["size_bytes"] = (size, graph, False)
    return {metric: _measurement(metric, *found[metric], profile, workload) for metric in found}


def predict_faster(baseline: ModelShape, shape: ModelShape, profile: Profile, workload: Workload) -> Measurement:
    """Predict how many times faster `shape` is than `baseline`. What both owe to the same number cancels.

    Raises:
        TargetError: as `predict`.
    """
    speeds = speeds_of(profile, workload.threads)
    slow, fast = (_passes(each, speeds, workload) for each in (baseline, shape))
    value = sum(t.total * n for t, n in slow) / sum(t.total * n for t, n in fast)
    ours, theirs = _shares(fast), _shares(slow)
    difference = {key: theirs.get(key, 0.0) - ours.get(key, 0.0) for key in ours | theirs}
    sigma, weak = _spread(speeds, difference, models=2)
    return _measurement("faster", value, sigma, weak, profile, workload)


def _measurement(
    metric: str, value: float, sigma: float, floored: bool, profile: Profile, workload: Workload
) -> Measurement:
    factor = max(growth(sigma), UNCALIBRATED if floored else 1.0)
    return Measurement(metric, value, value / factor, value * factor, "predicted", profile.runtime, str(workload))


def _passes(shape: ModelShape, speeds: Speeds, workload: Workload) -> list[tuple[Time, float]]:
    """The pass over the prompt, once, and for language models a pass for one token, as often as one is generated."""
    options = [(kernels, matrices(shape, kernels)[1]) for kernels in _kernels(shape, speeds)]

    def fastest(tokens: int, context: int) -> Time:
        passes = [_pass(shape, Time(speeds, *option), workload.batch, tokens, context) for option in options]
        return min(passes, key=lambda time: time.total)

    prompt = fastest(workload.tokens, workload.tokens)
    if not (shape.stacks[-1].causal and shape.outputs == shape.vocab):
        return [(prompt, 1.0)]
    step = fastest(1, workload.tokens + workload.generated // 2)
    return [(prompt, 1.0), (step, float(workload.generated))]


def _kernels(shape: ModelShape, speeds: Speeds) -> Iterator[dict[str, str]]:
    """Yield every choice of a kernel class for each of the formats that the shape's products are in."""
    used = {product.format for product in matmuls(shape)}
    if shape.unmapped is None and (FAMILIES[shape.family].embedding_projection or FAMILIES[shape.family].patch):
        used.add(shape.embedding_format)
    first = {form: kernels[0] for form, kernels in speeds.formats.items()}
    several = [form for form in speeds.formats if form in used and len(speeds.formats[form]) > 1]
    for chosen in itertools.product(*(speeds.formats[form] for form in several)):
        yield {**first, **dict(zip(several, chosen, strict=True))}


def _shares(passes: list[tuple[Time, float]], times: float | None = None) -> dict[str, float]:
    """The share of the time that each number governs; `times` stands for every pass's own count."""
    parts: dict[str, float] = {}
    for time, count in passes:
        for key, microseconds in time.parts.items():
            parts[key] = parts.get(key, 0.0) + (count if times is None else times) * microseconds
    total = sum(parts.values())
    return {key: microseconds / total for key, microseconds in parts.items()}


def _spread(speeds: Speeds, elasticities: dict[str, float], models: int = 1) -> tuple[float, bool]:
    """Relative uncertainty of what changes with each number by these elasticities, and whether anything behind it is
    uncalibrated; `models` is how many times enter whose own errors (the correction's sigma) are independent."""
    estimated = speeds.sigmas["estimated"] if "estimated" in elasticities else 0.0
    variance = models * (speeds.sigmas["correction"] ** 2 + estimated**2)
    # One kernel's peak governs all its parts together; its half sizes govern their own.
    for kernel in speeds.kernels:
        governed = sum(elasticities.get(f"{kernel}.{part}", 0.0) for part in ("peak", "rows", "columns", "depth"))
        variance += (governed * speeds.sigmas[f"{kernel}.peak"]) ** 2
    for key, elasticity in elasticities.items():
        if not key.endswith(".peak"):
            variance += (elasticity * speeds.sigmas[key]) ** 2
    return math.sqrt(variance), any(key in speeds.weak for key in elasticities)


def _pass(shape: ModelShape, time: Time, batch: int, tokens: int, context: int) -> Time:
    """Add the time of one pass over `tokens` new tokens a sequence that attend to `context` tokens, themselves
    included, to `time`, and return it."""
    if shape.unmapped is not None:
        without_map.add_pass(time, shape, batch, tokens, context)
        time.add("fixed", time.speeds.fixed)
        return time
    family, weights = FAMILIES[shape.family], time.weights
    head = head_of_shape(shape)
    pooled = head is not None and head.pooling != "none"
    rows = batch * tokens
    tables = 1 + bool(family.position) + bool(family.token_type)
    time.copy((5 * tables - 3) * BYTES * rows * shape.embedding)  # rows looked up, and summed
    if shape.embedding_rank:
        _dense(time, factor_format(shape.embedding_format), rows, shape.embedding_rank, shape.embedding)
        time.operators(1)
    if family.embedding_norm:
        time.elements("normalization", rows * shape.embedding)
    if family.embedding_projection or family.patch:
        _dense(time, shape.embedding_format, rows, shape.embedding, shape.stacks[0].hidden)
    products = matmuls(shape)
    for stack in shape.stacks:
        alike: dict[tuple[object, ...], Time] = {}
        for index, layer in enumerate(stack.layers):
            last = stack is shape.stacks[-1] and index == len(stack.layers) - 1
            # Where only the first position is read, the last layer computes all but keys and values there alone.
            read = 1 if last and pooled and not stack.causal else tokens
            qkv, out, first, second = (next(products) for _ in range(4))
            deltas = [next(products) for _ in range(4 * bool(layer.attention_rank) + 4 * bool(layer.ffn_rank))]
            sizes = (layer.heads, layer.kv_heads, layer.head_dim, layer.ffn, layer.attention_rank, layer.ffn_rank)
            key = (*sizes, qkv.format, first.format, layer.sparsity, read)
            if key not in alike:
                part = alike[key] = time.empty()
                _attention(part, stack, layer, qkv, out, batch, tokens, read, context)
                _feed_forward(part, stack, layer, first, second, batch * read)
                for product in deltas:
                    _delta(part, product, rows if product.weights.endswith("qkv.down") else batch * read)
            time.include(alike[key])
    read = batch if pooled else rows
    hidden = shape.stacks[-1].hidden
    if family.final_norm:
        time.elements("normalization", read * hidden)
    for _ in range(square_layers(head)):
        _dense(time, shape.head_format, read, hidden, hidden)
    if shape.embedding_rank and shape.tied:
        _dense(time, factor_format(shape.embedding_format), read, hidden, shape.embedding_rank)
        time.operators(1)
    for product in products:
        time.product(time.kernels[product.format], read, product.k, product.n, weights[product.weights])
    time.operators(_OPERATORS["around"])
    time.add("fixed", time.speeds.fixed)
    return time


def _dense(time: Time, form: str, rows: int, k: int, n: int) -> None:
    time.product(time.kernels[form], rows, k, n, formats.nbytes(form, n, k))


def _delta(time: Time, product: MatMul, rows: int) -> None:
    """One of the two thin products of a low-rank difference, which adds to what is there."""
    time.product(time.kernels[product.format], rows, product.k, product.n, time.weights[product.weights])
    time.copy(2 * BYTES * rows * product.n)
    time.operators(1)


def _attention(
    time: Time,
    stack: Stack,
    layer: LayerShape,
    qkv: MatMul,
    out: MatMul,
    batch: int,
    tokens: int,
    read: int,
    context: int,
) -> None:
    kernel = time.kernels[qkv.format]
    nbytes = time.weights[qkv.weights]
    zeros = time.speeds.sparsity.get(layer.sparsity, 1.0)
    query = layer.heads * layer.head_dim
    rest = qkv.n - query if read < tokens else qkv.n
    if read < tokens:
        time.product(kernel, batch * read, qkv.k, query, nbytes * query / qkv.n, zeros)

    def products(time: Time) -> None:
        time.product(kernel, batch * tokens, qkv.k, rest, nbytes * rest / qkv.n, zeros)
        past = 2 * BYTES * context * layer.head_dim * layer.kv_heads / layer.heads
        time.product("attention", read, 2 * layer.head_dim, context, past, batch * layer.heads)
        time.copy(2 * BYTES * batch * tokens * qkv.n)  # split into query, key and value

    def absorbed(time: Time) -> None:
        """Keys and values are not computed: their matrices, decoded, multiply what is on the other side of them."""
        width, inputs = BYTES * stack.hidden * layer.head_dim, BYTES * tokens * stack.hidden
        time.product("fp32", batch, layer.head_dim, stack.hidden, width, layer.heads)
        time.product("fp32", layer.heads, stack.hidden, tokens, inputs, batch)
        time.product("fp32", layer.heads, tokens, stack.hidden, inputs, batch)
        time.product("fp32", batch, stack.hidden, layer.head_dim, width, layer.heads)
        time.copy(2 * inputs * batch)  # transposed
        time.operators(_OPERATORS["absorbed"])

    time.take_fastest(products, *([absorbed] if read < tokens else []))
    time.elements("softmax", batch * layer.heads * read)
    time.product(kernel, batch * read, out.k, out.n, time.weights[out.weights], zeros)
    time.elements("normalization", batch * read * stack.hidden)
    time.copy(3 * BYTES * batch * read * stack.hidden)  # residual sum
    time.operators(_OPERATORS["attention"])


def _feed_forward(time: Time, stack: Stack, layer: LayerShape, first: MatMul, second: MatMul, rows: int) -> None:
    kernel, weights = time.kernels[first.format], time.weights
    zeros = time.speeds.sparsity.get(layer.sparsity, 1.0)
    time.product(kernel, rows, first.k, first.n, weights[first.weights], zeros)
    rounded = formats.get(first.format).activations != "float" and not stack.gated
    time.elements("approximation" if rounded else "activation", rows * layer.ffn)
    time.copy((3 * layer.ffn * 2 if stack.gated else 0) * BYTES * rows)  # split, and product with the gate
    time.product(kernel, rows, second.k, second.n, weights[second.weights], zeros)
    time.elements("normalization", rows * stack.hidden)
    time.copy(3 * BYTES * rows * stack.hidden)
    time.operators(_OPERATORS["gated" if stack.gated else "ffn"])
