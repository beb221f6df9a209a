"""A profile whose numbers are wrong is corrected by models that were timed, and says how sure it is then."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from autolite.architecture import ModelShape
from autolite.hardware.calibration import Sample, calibrated, scaled
from autolite.hardware.predict import predict, time_parts
from autolite.hardware.profile import Profile
from autolite.hardware.profile_files import load_profile
from autolite.measure import Workload
from tests.shapes import bert_shape

PROFILE = load_profile("x86-avx2")
OFF = {"fp32.peak": 1.4, "int8.peak": 0.7, "memory": 1.3, "softmax": 2.0, "dispatch": 1.6, "normalization": 0.8}
NOISE = 0.03


def shapes(count: int, seed: int) -> list[tuple[ModelShape, Workload, str]]:
    """Random encoders and calls, and the families that they are said to be of."""
    rng, found = np.random.default_rng(seed), []
    for i in range(count):
        heads = int(rng.integers(1, 13))
        attention, ffn, embedding = (str(rng.choice(["fp32", "int8"])) for _ in range(3))
        shape = bert_shape(
            layers=int(rng.integers(1, 9)), hidden=heads * 32, heads=heads, ffn=8 * int(rng.integers(2, 200))
        ).with_formats(attention, ffn, embedding, "fp32")
        found.append((shape, Workload(int(rng.integers(1, 5)), int(rng.integers(4, 200)), 1), f"family {i % 5}"))
    return found


def samples(truth: Profile, count: int, seed: int) -> list[Sample]:
    """What they take on a device of which everything is known, give or take the noise of a timing."""
    rng = np.random.default_rng(seed)
    return [
        Sample(s, w, predict(s, truth, w)["latency_ms"].value * float(np.exp(NOISE * rng.standard_normal())), group)
        for s, w, group in shapes(count, seed)
    ]


def errors(profile: Profile, known: list[Sample]) -> np.ndarray:
    found = [predict(each.shape, profile, each.workload)["latency_ms"].value / each.milliseconds for each in known]
    return np.abs(np.array(found) - 1)


@pytest.fixture(scope="module")
def truth() -> Profile:
    return scaled(PROFILE, OFF)


def test_models_that_were_timed_put_the_numbers_right(truth: Profile) -> None:
    found = calibrated(PROFILE, samples(truth, 40, 0), "a test")
    new = samples(truth, 40, 1)
    assert errors(PROFILE, new).mean() > 0.15
    assert errors(found.profile, new).mean() < 0.05
    assert np.abs(found.before).mean() > 0.15
    assert np.abs(found.errors).mean() < 0.06
    for key in ("fp32.peak", "int8.peak"):
        assert found.factors[key] == pytest.approx(OFF[key], rel=0.15)


def test_nineteen_of_twenty_new_models_are_within_the_intervals(truth: Profile) -> None:
    found = calibrated(PROFILE, samples(truth, 40, 2), "a test").profile
    inside, widths = [], []
    for each in samples(truth, 100, 3):
        price = predict(each.shape, found, each.workload)["latency_ms"]
        inside.append(price.low <= each.milliseconds <= price.high)
        widths.append(price.high / price.value)
    assert np.mean(inside) >= 0.9
    assert np.median(widths) < 1.4, "and they say something"


def test_what_changed_says_what_it_is_from(truth: Profile) -> None:
    found = calibrated(PROFILE, samples(truth, 20, 4), "20 models")
    number = found.profile.unit.peak["fp32"]
    assert (number.kind, number.source) == ("calibrated", "20 models")
    assert number.sigma < PROFILE.unit.peak["fp32"].sigma + PROFILE.efficiency["fp32"].fraction.sigma
    assert found.profile.efficiency["fp32"].fraction.kind == "calibrated"
    assert found.profile.memory.size == PROFILE.memory.size


def test_a_kernel_that_no_model_used_stays_as_it_was_and_as_unsure(truth: Profile) -> None:
    found = calibrated(PROFILE, samples(truth, 20, 5), "a test").profile
    assert found.unit.peak["int4"].value == pytest.approx(PROFILE.unit.peak["int4"].value, rel=1e-6)
    assert found.unit.peak["int4"].sigma >= PROFILE.unit.peak["int4"].sigma


def test_samples_survive_json(truth: Profile) -> None:
    for each in samples(truth, 5, 6):
        assert Sample.from_json(each.to_json()) == each


@pytest.mark.parametrize("key", ["fp32.peak", "fp32.rows", "fp32.columns", "fp32.depth", "cache", "memory", "stall"])
def test_a_factor_multiplies_the_part_it_is_of_and_no_other(key: str) -> None:
    check({key: 1.1})


@pytest.mark.parametrize(
    "key", ["activation", "approximation", "normalization", "softmax", "dispatch", "around", "fixed"]
)
def test_so_do_those_of_what_is_between_the_products(key: str) -> None:
    check({key: 3.0})


def test_factors_of_all_parts_at_once() -> None:
    check({"fp32.peak": 1.05, "fp32.rows": 0.97, "memory": 1.1, "stall": 0.95, "softmax": 2.0, "dispatch": 0.5})


def check(factors: Mapping[str, float]) -> None:
    for shape, workload, _ in shapes(8, 7):
        plain = shape.without_formats()
        before = time_parts(plain, PROFILE, workload)
        after = time_parts(plain, scaled(PROFILE, factors), workload)
        expected = sum(part * factors.get(name, 1.0) for name, part in before.items())
        if sum(after.values()) < (1 - 1e-9) * expected:
            continue  # another way of computing it is the fastest now
        for name, part in before.items():
            assert after[name] == pytest.approx(part * factors.get(name, 1.0), rel=1e-6), name
