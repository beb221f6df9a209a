"""A Plan is a value: equal settings are equal plans, and JSON carries all of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autolite import registry
from autolite.errors import InputError, PlanError
from autolite.plan import Plan, make_step

fractions = st.floats(0.1, 1.0)
steps = st.one_of(
    st.builds(lambda h, f: make_step("prune", {"heads": h, "ffn": f}), fractions, fractions),
    st.builds(lambda g: make_step("share", {"part": "ffn", "groups": g}), st.integers(1, 6)),
    st.builds(lambda t, a: make_step("distill", {"temperature": t, "alpha": a}), st.floats(1, 8), st.floats(0, 1)),
    st.builds(lambda f: make_step("quantize", {"ffn": f}), st.sampled_from(["int8", "int4", "kmeans4"])),
)
plans = st.builds(lambda s, seed: Plan(tuple(s), seed), st.lists(steps, max_size=4), st.integers(0, 99))


@given(plans)
def test_json_round_trip_is_exact(plan: Plan) -> None:
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert again.digest == plan.digest
    assert hash(again) == hash(plan)


@given(plans, plans)
def test_digests_differ_exactly_when_plans_do(one: Plan, other: Plan) -> None:
    assert (one == other) == (one.digest == other.digest)


@pytest.mark.parametrize("name", registry.names("technique"))
def test_every_technique_has_defaults_that_change_nothing_but_training(name: str) -> None:
    assert Plan((make_step(name, {}),)).describe() == "unchanged"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"seed": 0}, "not a plan"),
        ({"seed": 0, "steps": [{"technique": "prune", "config": {"head": 1.0}}]}, "did you mean 'heads'"),
        ({"seed": 0, "steps": [{"technique": "prune", "config": {"heads": 2.0}}]}, "prune.heads"),
    ],
)
def test_what_is_no_plan_is_refused_with_the_reason(data: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.from_json(data)


def test_an_unknown_technique_is_named_with_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'prune'"):
        make_step("prunes", {})
