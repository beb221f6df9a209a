"""Zeros are for targets that say they gain from them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from autolite.architecture import shape_of
from autolite.errors import PlanError
from autolite.hardware.predict import predict
from autolite.hardware.profile import Profile
from autolite.hardware.profile_files import load_profile, profile_names
from autolite.measure import Workload
from autolite.plan import Plan, make_step
from autolite.runtime.onnxruntime import OnnxRuntime
from autolite.search.problem import Problem
from autolite.testing import tiny_model

PLAN = Plan((make_step("prune", {"sparsity": "2:4"}),))


def gaining(time: float) -> Profile:
    """A target whose products with 2:4 zeros take this part of the dense ones' time."""
    data = load_profile("pixel8").model_dump()
    half = {"value": time, "unit": "1", "kind": "measured", "source": "a test", "date": "2025-01-01", "sigma": 0.1}
    return Profile.model_validate({**data, "sparsity": {"2:4": half}})


def shape(profile: Profile) -> Any:
    teacher = SimpleNamespace(shape=shape_of(tiny_model("bert")))
    return Problem.shape(SimpleNamespace(teacher=teacher, runtime=OnnxRuntime(), profile=profile), PLAN)  # type: ignore[arg-type]


def test_a_target_that_does_not_gain_refuses_them_before_anything_is_trained() -> None:
    with pytest.raises(PlanError, match=r"pixel8 gains nothing from 2:4 zeros \(it does from: none\)"):
        shape(load_profile("pixel8"))
    assert all(not load_profile(name).sparsity for name in profile_names())


def test_a_target_that_gains_takes_them_at_its_price() -> None:
    workload = Workload(tokens=64, threads=1)
    dense, sparse = shape_of(tiny_model("bert")), shape(gaining(0.5))
    assert sparse.sparsity == {"2:4"}
    prices = [predict(dense, gaining(0.5), workload), predict(sparse, gaining(0.5), workload)]
    assert prices[1]["latency_ms"].value < prices[0]["latency_ms"].value
    assert prices[1]["size_bytes"].value == prices[0]["size_bytes"].value  # zeros are stored as any other number
    assert predict(sparse, gaining(1.0), workload)["latency_ms"].value == prices[0]["latency_ms"].value
