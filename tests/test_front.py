"""Constraints mean what the definitions say."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autolite.front import Candidate, Interval, Quality
from autolite.limits import Constraints
from autolite.measure import Measurement
from autolite.plan import Plan, make_step


def number(metric: str, value: float) -> Measurement:
    return Measurement(metric, value, value / 2, value * 2, "predicted", "onnxruntime", "batch=1")


def candidate(kept: float = 0.99, low: float = 0.97, latency: float = 5.0, size: float = 1e6) -> Candidate:
    return Candidate(
        id="abc",
        path="candidates/abc",
        plan=Plan((make_step("quantize", {"ffn": "int8"}),), 3),
        quality=Quality("accuracy", "maximize", 0.9, 0.88, 0.92, "selection"),
        test=None,
        kept=Interval(kept, low, 1.0),
        latency_ms=number("latency_ms", latency),
        faster=number("faster", 3.0),
        size_bytes=number("size_bytes", size),
        memory_bytes=number("memory_bytes", 2 * size),
        energy_mj=number("energy_mj", 1.0),
        artifacts=({"runtime": "onnxruntime", "version": "1", "files": ["model.onnx"]},),
    )


def test_json_carries_all_of_a_candidate() -> None:
    one = replace(candidate(), further={"kl_to_teacher_nats": Interval(0.1, 0.08, 0.12)})
    assert Candidate.from_json(json.loads(json.dumps(one.to_json()))) == one


def test_max_drop_is_on_the_point_estimate_and_strict_on_the_lower_bound() -> None:
    assert not Constraints(max_drop=0.01).violations(candidate(kept=0.99, low=0.90))
    assert Constraints(max_drop=0.01, strict=True).violations(candidate(kept=0.99, low=0.90)) == {
        "max_drop": pytest.approx(0.09)
    }
    assert "max_drop" in Constraints(max_drop=0.01).violations(candidate(kept=0.9899))


def test_min_quality_follows_the_direction_of_the_metric() -> None:
    perplexity = replace(candidate(), quality=Quality("perplexity", "minimize", 12.0, 11.0, 13.0, "selection"))
    assert "min_quality" in Constraints(min_quality=10.0).violations(perplexity)
    assert not Constraints(min_quality=15.0).violations(perplexity)
    assert "min_quality" in Constraints(min_quality=0.95).violations(candidate())


@given(st.floats(0.1, 100), st.floats(0.1, 100))
def test_a_limit_is_violated_exactly_above_it(latency: float, limit: float) -> None:
    found = Constraints(max_latency_ms=limit).violations(candidate(latency=latency))
    assert bool(found) == (latency / limit - 1 > 1e-9), "the last bits of a float violate nothing"
    assert all(excess == pytest.approx(latency / limit - 1) for excess in found.values())
