"""Prices: against closed forms, in the right order, and never surer than their sources."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autolite.architecture import LayerShape, ModelShape, Stack, shape_of
from autolite.errors import TargetError
from autolite.formats import FORMATS
from autolite.hardware.predict import UNCALIBRATED, basis, predict, predict_all, predict_faster, time_parts
from autolite.hardware.profile import KINDS, Number, Profile
from autolite.hardware.profile_files import load_profile, profile_names
from autolite.measure import Workload
from autolite.runtime.onnxruntime import OnnxRuntime
from autolite.techniques.base import Student
from autolite.techniques.quantize import Quantize, QuantizeConfig
from autolite.testing import tiny_model
from tests.shapes import bert_shape, llama_shape

TARGETS = profile_names()
ENCODER_METRICS = {"latency_ms", "size_bytes", "memory_bytes", "energy_mj"}


def formatted(shape: ModelShape, form: str) -> ModelShape:
    layers = tuple(replace(x, attention_format=form, ffn_format=form) for x in shape.stacks[0].layers)
    return shape.with_layers(0, layers)


def with_numbers(profile: Profile, **changes: float) -> Profile:
    """A copy with numbers replaced by path, dots written as double underscores."""
    data = profile.model_dump()
    for path, value in changes.items():
        node: Any = data
        for part in path.split("__"):
            node = node[int(part) if part.isdigit() else part]
        node["value"] = value
    return Profile.model_validate(data)


def recast(profile: Profile, kind: str, sigma: float) -> Profile:
    """A copy in which every number has this kind and uncertainty."""

    def walk(node: object) -> object:
        if isinstance(node, Number):
            return node.model_copy(update={"kind": kind, "sigma": sigma}).model_dump()
        if isinstance(node, dict):
            return {key: walk(value) for key, value in node.items()}
        if isinstance(node, tuple):
            return [walk(item) for item in node]
        fields = getattr(type(node), "model_fields", None)
        return {name: walk(getattr(node, name)) for name in fields} if fields else node

    return Profile.model_validate(walk(profile))


@pytest.mark.parametrize("target", TARGETS)
class TestEveryTarget:
    @pytest.mark.parametrize("shape", [bert_shape(), llama_shape()], ids=["bert", "llama"])
    def test_values_lie_in_their_intervals_and_say_what_they_are(self, target: str, shape: ModelShape) -> None:
        profile = load_profile(target)
        workload = Workload(2, 32, profile.threads, 8)
        extra = {"ttft_ms", "tokens_per_second"} if shape.stacks[0].causal else set()
        for form, found in zip(
            FORMATS, predict_all([formatted(shape, form) for form in FORMATS], profile, workload), strict=True
        ):
            assert set(found) == ENCODER_METRICS | extra, form
            for metric, one in found.items():
                assert (one.metric, one.source, one.runtime) == (metric, "predicted", profile.runtime)
                assert one.workload == str(workload)
                assert 0 < one.low <= one.value <= one.high < math.inf, (form, metric)
                if metric == "size_bytes":
                    assert one.low == one.high == one.value == int(one.value)
                else:  # nothing here was calibrated
                    assert one.value / one.low >= UNCALIBRATED - 1e-9, (form, metric)
                    assert one.high / one.value >= UNCALIBRATED - 1e-9, (form, metric)

    def test_more_work_takes_longer(self, target: str) -> None:
        profile = load_profile(target)

        def latency(**workload: int) -> float:
            return predict(bert_shape(), profile, Workload(**{"threads": 1, **workload}))["latency_ms"].value

        assert latency(tokens=16) < latency(tokens=64) < latency(tokens=128) < latency(tokens=128, batch=2)
        if profile.threads > 1:
            assert latency(tokens=64, threads=profile.threads) < latency(tokens=64, threads=1)

    def test_int8_is_faster_than_fp32_for_encoders_and_four_bits_for_decoding(self, target: str) -> None:
        profile = load_profile(target)
        batch = 1 if profile.threads > 1 else 64  # of one text a GPU computes nearly nothing, it starts kernels
        encoder = {f: predict(formatted(bert_shape(), f), profile, Workload(batch, threads=1)) for f in FORMATS}
        eight = min(encoder[form]["latency_ms"].value for form in ("int8", "int7"))  # one of both overflows nowhere
        assert eight < 0.7 * encoder["fp32"]["latency_ms"].value
        big = llama_shape(layers=8, hidden=1024, heads=16, kv_heads=16, ffn=2816)
        speed = {
            f: predict(formatted(big, f), profile, Workload(threads=1))["tokens_per_second"].value for f in FORMATS
        }
        assert speed["fp32"] < speed["int8"] < speed["int4"]

    @settings(max_examples=12, deadline=None)
    @given(
        st.integers(1, 6),
        st.integers(1, 12),
        st.integers(1, 96),
        st.sampled_from(sorted(FORMATS)),
        st.sampled_from([1, 16, 128]),
    )
    def test_less_of_a_model_is_never_slower_or_larger(
        self, target: str, layers: int, heads: int, ffn: int, form: str, tokens: int
    ) -> None:
        profile = load_profile(target)

        def price(layers: int, heads: int, ffn: int, form: str) -> dict[str, float]:
            every = tuple(LayerShape(heads, heads, 32, 16 * ffn, i, i, form, form) for i in range(layers))
            shape = ModelShape("bert", (Stack("encoder", 384, every),), 1000, 384, 128, 2)
            return {k: m.value for k, m in predict(shape, profile, Workload(1, tokens, 1)).items()}

        full = price(layers, heads, ffn, form)
        for less in ((layers - 1, heads, ffn), (layers, heads - 1, ffn), (layers, heads, ffn - 1)):
            if min(less) > 0:
                smaller = price(*less, form)
                # Another kernel may be the faster one for less of a model, and keep its weights in more bytes.
                metrics = set(full) - ({"memory_bytes"} if len(profile.formats[form]) > 1 else set())
                assert all(smaller[metric] <= full[metric] * (1 + 1e-12) for metric in metrics), less
        if form == "int8":
            assert full["size_bytes"] <= price(layers, heads, ffn, "fp32")["size_bytes"]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(TARGETS),
    st.sampled_from(sorted(FORMATS)),
    st.sets(st.sampled_from(["fp32", "int8", "int4"]), min_size=1),
    st.sampled_from([1, 2, 16, 128]),
    st.integers(0, 8),
    st.integers(1, 24),
)
def test_several_kernels_are_never_dearer_than_one_of_them(
    target: str, form: str, kernels: set[str], tokens: int, generated: int, heads: int
) -> None:
    profile = load_profile(target)
    workload = Workload(1, tokens, 1, generated)
    shapes = (bert_shape(2, 32 * heads, heads, 64 * heads), llama_shape(2, 32 * heads, heads, heads, 64 * heads))

    def priced(shape: ModelShape, kernels: Sequence[str]) -> dict[str, float]:
        one = profile.model_copy(update={"formats": {**profile.formats, form: tuple(kernels)}})
        return {metric: found.value for metric, found in predict(formatted(shape, form), one, workload).items()}

    for shape in shapes:
        alone = [priced(shape, [kernel]) for kernel in kernels]
        together = priced(shape, sorted(kernels))
        assert together["latency_ms"] <= min(one["latency_ms"] for one in alone) * (1 + 1e-12)
        if not shape.stacks[0].causal:  # one pass: with one of the kernels, its uncertainty and its copies
            assert together in alone


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(TARGETS),
    st.lists(st.tuples(st.integers(1, 4), st.sampled_from(sorted(FORMATS)), st.booleans()), min_size=1, max_size=6),
    st.integers(0, 4),
)
def test_many_models_at_once_cost_what_each_does_alone(
    target: str, kinds: list[tuple[int, str, bool]], generated: int
) -> None:
    profile, workload = load_profile(target), Workload(2, 16, 1, generated)
    shapes = [formatted((llama_shape if causal else bert_shape)(layers), form) for layers, form, causal in kinds]
    found = predict_all(shapes, profile, workload)
    assert [each.keys() for each in found] == [predict(shape, profile, workload).keys() for shape in shapes]
    for shape, prices in zip(shapes, found, strict=True):
        for metric, alone in predict(shape, profile, workload).items():
            together = prices[metric]
            assert (together.low, together.value, together.high) == pytest.approx((alone.low, alone.value, alone.high))
    assert predict_all([], profile, workload) == []


def test_a_prompt_and_its_steps_take_the_kernel_that_suits_each() -> None:
    """Four bits cost what int8 does for many rows, and what reading four bits does for one."""
    profile = load_profile("raspberry-pi-5")
    shape = llama_shape(layers=8, hidden=1024, heads=16, kv_heads=16, ffn=2816)
    workload = Workload(1, 128, 1, 64)
    four, eight = (predict(formatted(shape, form), profile, workload) for form in ("int4", "int8"))
    blocks = profile.model_copy(update={"formats": {**profile.formats, "int4": ("int4",)}})
    only = predict(formatted(shape, "int4"), blocks, workload)
    assert four["ttft_ms"].value == pytest.approx(eight["ttft_ms"].value)
    assert four["ttft_ms"].value < 0.7 * only["ttft_ms"].value
    assert four["tokens_per_second"].value == only["tokens_per_second"].value > eight["tokens_per_second"].value
    # Both forms of the weights are then kept in memory.
    assert four["memory_bytes"].value > only["memory_bytes"].value


def test_factors_of_an_embedding_table_take_the_kernel_that_suits_them() -> None:
    profile = load_profile("a100")  # on which 8-bit weights are read as they are, or as 16 bits
    shape = replace(llama_shape(), embedding_format="int4", head_format="int4", embedding_rank=32)
    several = profile.formats["int8-weight"]
    assert len(several) > 1
    for workload in (Workload(64, 128, 1), Workload(1, 128, 1)):
        one = ({**profile.formats, "int8-weight": (kernel,)} for kernel in several)
        alone = [predict(shape, profile.model_copy(update={"formats": each}), workload) for each in one]
        times = [each["latency_ms"].value for each in alone]
        assert len(set(times)) > 1
        assert predict(shape, profile, workload)["latency_ms"].value == min(times)


def test_what_is_decoded_when_loaded_is_read_as_what_it_was_decoded_to() -> None:
    profile = load_profile("x86-avx512")
    shape = bert_shape(layers=12, hidden=768, heads=12, ffn=3072)
    found = {form: predict(formatted(shape, form), profile, Workload(1, 128, 1)) for form in FORMATS}
    for stored, read in {"bf16": "fp32", "int8-weight": "fp32", "int7": "int8", "kmeans4": "int8"}.items():
        same = (found[form]["latency_ms"].value for form in (stored, read))
        assert next(same) == pytest.approx(next(same))
        memory, size = (
            found[stored][metric].value - found[read][metric].value for metric in ("memory_bytes", "size_bytes")
        )
        assert memory == pytest.approx(size)  # only the file is another


def test_a_roofline_by_hand() -> None:
    """One layer whose feed-forward is nearly everything, on a device on which all else is free."""
    profile = with_numbers(
        load_profile("pixel8"),
        dispatch=0,
        fixed=0,
        units__0__peak__fp32=100,
        efficiency__fp32__fraction=0.5,
        efficiency__fp32__rows=8,
        efficiency__fp32__columns=0,
        efficiency__fp32__depth=0,
        units__0__peak__attention=1e9,
        units__0__elementwise__activation=1e9,
        units__0__elementwise__normalization=1e9,
        units__0__softmax=1e9,
        cache__bandwidth=1e9,
        cache__size=1e6,
        units__0__scaling=1,
    )
    layer = LayerShape(1, 1, 1, 4096, 0, 0)
    shape = ModelShape("gpt2", (Stack("decoder", 1024, (layer,), causal=True),), 7, 1024, 8, 0)
    found = predict(shape, profile, Workload(1, 8, 4))["latency_ms"].value
    flops = 2 * 8 * 1024 * (3 + 1 + 4096 * 2)
    assert found == pytest.approx(flops / (100e9 * 0.5 / (1 + 8 / 8)) * 1e3, rel=1e-3)
    one_thread = predict(shape, profile, Workload(1, 8, 1))["latency_ms"].value
    assert one_thread == pytest.approx(4 * found, rel=1e-3)
    # Weights that do not fit into the cache: with one row the memory is the roof, with more its stall comes on top.
    nbytes = 4 * 1024 * (3 + 1 + 4096 * 2)
    slow = with_numbers(profile, cache__size=1e-6, memory__bandwidth=0.5, memory__stall=0.25)
    reading = nbytes / 0.5e9 * 1e3
    assert predict(shape, slow, Workload(1, 1, 4))["latency_ms"].value == pytest.approx(reading, rel=1e-3)
    assert predict(shape, slow, Workload(1, 8, 4))["latency_ms"].value == pytest.approx(reading, rel=1e-3)
    many = predict(shape, slow, Workload(1, 4096, 4))["latency_ms"].value
    work = 2 * 4096 * nbytes / 4 / (50e9 / (1 + 8 / 4096)) * 1e3
    assert many == pytest.approx(work + 0.25 * reading, rel=1e-3)


def test_only_the_first_token_passes_through_a_classifiers_last_layer() -> None:
    profile = load_profile("raspberry-pi-5")
    times = [predict(bert_shape(layers=n), profile, Workload(1, 128, 1))["latency_ms"].value for n in (1, 2, 3)]
    assert times[2] - times[1] == pytest.approx(times[1] - times[0], rel=0.05)
    assert times[0] < 0.4 * (times[1] - times[0])


def test_a_language_models_call_is_its_prompt_and_its_steps() -> None:
    profile = load_profile("raspberry-pi-5")
    shape = llama_shape()
    prompt = predict(shape, profile, Workload(1, 64, 1))
    assert prompt["ttft_ms"].value == prompt["latency_ms"].value
    whole = predict(shape, profile, Workload(1, 64, 1, 100))
    steps = 100 / whole["tokens_per_second"].value * 1e3
    assert whole["latency_ms"].value == pytest.approx(whole["ttft_ms"].value + steps)
    # Its query heads share keys and values, of which each step makes a longer copy.
    tokens = (64 + 100) + (64 + 99)
    assert whole["memory_bytes"].value - prompt["memory_bytes"].value == (tokens - 64) * 5 * 2 * 4 * 8 * 4
    batch = predict(shape, profile, Workload(8, 64, 1))
    assert batch["tokens_per_second"].value > 2 * prompt["tokens_per_second"].value


def test_who_generates_computes_the_logits_of_one_token_of_the_prompt() -> None:
    profile, large = load_profile("raspberry-pi-5"), replace(llama_shape(), vocab=50_000, outputs=50_000)
    scored, read = (predict(large, profile, Workload(1, 64, 1, n))["ttft_ms"].value for n in (0, 1))
    alone = predict(replace(large, vocab=50, outputs=50), profile, Workload(1, 64, 1, 1))["ttft_ms"].value
    assert read - alone < 0.1 * (scored - alone)  # a row by itself is bound by reading the weights


def test_who_generates_has_the_logits_of_one_token_in_memory() -> None:
    profile, large = load_profile("raspberry-pi-5"), replace(llama_shape(), vocab=50_000, outputs=50_000)
    scored, read = (predict(large, profile, Workload(3, 64, 1, n))["memory_bytes"].value for n in (0, 1))
    scores = 4 * (2 * 3 * 64 * 64 + 3 * 64 * (64 + 64) + 2 * 3 * 8 * 64**2)  # the most that is alive then
    logits, cache = 4 * 3 * 64 * 50_000, 4 * 2 * 3 * 4 * 8 * 5
    assert scored - read == (logits + 64 * cache) - (max(scores, logits / 64) + (65 + 64) * cache)


def test_shared_layers_are_stored_once_but_computed_each_time() -> None:
    shape = bert_shape()
    layers = tuple(replace(x, attention=0, feed_forward=0) for x in shape.stacks[0].layers)
    profile = load_profile("pixel8")
    shared, apart = (predict(s, profile, Workload(threads=1)) for s in (shape.with_layers(0, layers), shape))
    matrices = 4 * 5 * (4 * 384 * 384 + 2 * 384 * 1536)
    biases = 4 * 5 * (5 * 384 + 1536)
    assert apart["size_bytes"].value - shared["size_bytes"].value == matrices + biases
    assert shared["latency_ms"].value > 0.6 * apart["latency_ms"].value


def test_calibrated_numbers_may_be_surer_than_a_factor_of_one_and_a_half() -> None:
    sure = recast(load_profile("pixel8"), "calibrated", 0.02)
    latency = predict(bert_shape(), sure, Workload())["latency_ms"]
    assert 1.02 < latency.high / latency.value < 1.15
    for kind in ("datasheet", "derived", "assumed"):
        unsure = predict(bert_shape(), recast(sure, kind, 0.02), Workload())
        assert unsure["latency_ms"].high / unsure["latency_ms"].value == pytest.approx(UNCALIBRATED)
        assert unsure["energy_mj"].high / unsure["energy_mj"].value == pytest.approx(UNCALIBRATED)


def test_the_interval_agrees_with_drawing_the_numbers_at_random() -> None:
    """First-order propagation against a Monte Carlo over the two numbers that govern an int8 encoder."""
    sigma, drawn = 0.2, []
    base = recast(load_profile("raspberry-pi-5"), "calibrated", 0)
    data = base.model_dump()
    data["units"][0]["peak"]["int8"]["sigma"] = data["dispatch"]["sigma"] = sigma
    shape, workload = formatted(bert_shape(), "int8"), Workload(1, 64, 1)
    found = predict(shape, Profile.model_validate(data), workload)["latency_ms"]
    generator = torch.Generator().manual_seed(0)
    for peak, dispatch in (0.2 * torch.randn(400, 2, generator=generator)).exp().tolist():
        changes = {
            "units__0__peak__int8": base.unit.peak["int8"].value * peak,
            "dispatch": base.dispatch.value * dispatch,
        }
        drawn.append(predict(shape, with_numbers(base, **changes), workload)["latency_ms"].value)
    low, high = torch.tensor(drawn).quantile(torch.tensor([0.025, 0.975])).tolist()
    assert found.low == pytest.approx(low, rel=0.05)
    assert found.high == pytest.approx(high, rel=0.05)


@pytest.mark.parametrize("shape", [bert_shape(), llama_shape()], ids=["bert", "llama"])
def test_what_two_models_owe_to_the_same_number_cancels_in_their_ratio(shape: ModelShape) -> None:
    # Uncertain only in what both are made of: the peaks are sure, the whole scale of the times is not.
    data = recast(load_profile("raspberry-pi-5"), "calibrated", 0.3).model_dump()
    data["correction"]["sigma"] = 0
    profile, workload = Profile.model_validate(data), Workload(1, 64, 1, 8)
    fewer = shape.with_layers(0, shape.stacks[0].layers[:2])
    slow, fast = (predict(s, profile, workload)["latency_ms"] for s in (shape, fewer))
    found = predict_faster(shape, fewer, profile, workload)
    assert found.value == pytest.approx(slow.value / fast.value)
    assert found.high / found.value < slow.high / slow.value
    same = predict_faster(shape, shape, profile, workload)
    assert (same.low, same.value, same.high) == pytest.approx((1, 1, 1))
    unsure = predict_faster(shape, fewer, load_profile("pixel8"), workload)
    assert unsure.high / unsure.value >= UNCALIBRATED - 1e-9


def test_too_many_threads_and_formats_that_cannot_run_are_refused() -> None:
    profile = load_profile("pixel8")
    with pytest.raises(TargetError, match="threads=8, but big of pixel8 has 4"):
        predict(bert_shape(), profile, Workload(threads=8))
    poor = profile.model_copy(update={"formats": {"fp32": ("fp32",), "int8": ("int8",)}})
    with pytest.raises(TargetError, match="cannot run the number format 'int4'; it runs fp32, int8"):
        predict(formatted(bert_shape(), "int4"), poor, Workload())


MAPPED = [
    ("bert", "text-classification"),
    ("distilbert", "text-classification"),
    ("roberta", "text-classification"),
    ("albert", "text-classification"),
    ("gpt2", "language-modeling"),
    ("llama", "language-modeling"),
    ("qwen2", "language-modeling"),
    ("qwen3", "language-modeling"),
]
# All formats in two families, and one of each layout in the others
SIZED = [
    (family, task, form)
    for family, task in MAPPED
    for form in (
        FORMATS
        if family in ("bert", "gpt2")
        else ("fp32", "bf16", "int8", "int8-static", "int4", "int3-asym", "kmeans6")
    )
]


@pytest.mark.parametrize(("family", "task", "form"), SIZED)
def test_the_size_is_that_of_the_emitted_file(tmp_path: Path, family: str, task: str, form: str) -> None:
    model = tiny_model(family, task)
    with torch.no_grad():  # equal tensors, such as fresh norms, would be stored once
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    ranges = {name: (-1.0, 1.0) for name in model.state_dict()}  # calibrated already
    student = Student(model, shape_of(model), ranges=ranges)
    embedding = form if FORMATS[form].embedding else "fp32"
    config = QuantizeConfig(attention=form, ffn=form, embedding=embedding)
    student = Quantize().apply(student, config, None)  # type: ignore[arg-type]
    emitted = sum(file.stat().st_size for file in OnnxRuntime().emit(student, tmp_path))
    found = predict(student.shape, load_profile("pixel8"), Workload())["size_bytes"].value
    # Names and attributes of a few dozen operators are the difference; in a model of a megabyte that is below 1 %.
    assert abs(found - emitted) < 2500 * len(student.shape.stacks[0].layers)


@pytest.mark.parametrize("kind", KINDS)
def test_a_latency_rests_on_the_kinds_of_the_numbers_behind_it(kind: str) -> None:
    shape, workload = formatted(bert_shape(2), "int8"), Workload(1, 16, 1)
    alike = recast(load_profile("pixel8"), kind, 0.1)
    assert basis(shape, alike, workload) == pytest.approx({kind: 1.0})


def test_the_least_sure_number_behind_a_part_of_a_latency_counts() -> None:
    shape, workload = formatted(bert_shape(2), "int8"), Workload(1, 16, 1)
    data = recast(load_profile("pixel8"), "measured", 0.1).model_dump()
    data["dispatch"]["kind"] = "assumed"
    (unit,) = [each for each in data["units"] if each["name"] == data["default_unit"]]
    unit["peak"]["int8"]["kind"] = "datasheet"  # the fraction of it that is reached was measured
    profile = Profile.model_validate(data)
    found, parts = basis(shape, profile, workload), time_parts(shape, profile, workload)
    assert list(found) == ["measured", "datasheet", "assumed"]
    assert sum(found.values()) == pytest.approx(1)
    assert found["assumed"] == pytest.approx((parts["dispatch"] + parts["around"]) / sum(parts.values()))
    assert found["datasheet"] >= parts["int8.peak"] / sum(parts.values()) - 1e-9
