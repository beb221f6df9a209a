"""Limits mean what the definitions say: how far a number is beyond one, what surely is, and what cannot be asked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autolite.errors import InputError
from autolite.front import Candidate, Interval
from autolite.limits import LIMITS, Constraints
from autolite.measure import Workload
from autolite.search.choose import blocked, choose
from tests.test_front import candidate, number

WRITES, READS = Workload(tokens=128, generated=64), Workload(tokens=128)


def writer(first: float = 100.0, rate: float = 20.0) -> Candidate:
    """A language model's candidate."""
    one = candidate()
    return replace(one, ttft_ms=number("ttft_ms", first), tokens_per_second=number("tokens_per_second", rate))


def test_options_and_fields_go_by_the_names_of_limits() -> None:
    assert {limit.option for limit in LIMITS} == {
        "--max-latency",
        "--max-ttft",
        "--min-tokens-per-second",
        "--max-size",
        "--max-memory",
    }
    ones: dict[str, Any] = {limit.field: 1.0 for limit in LIMITS}
    every = Constraints(**ones)
    assert [limit for limit, _ in every.asked] == list(LIMITS)


@settings(deadline=None)
@given(st.floats(0.1, 100), st.floats(0.1, 100))
def test_the_first_token_may_not_be_later_and_the_rate_not_lower(value: float, limit: float) -> None:
    late = Constraints(max_ttft_ms=limit).excesses(writer(first=value))
    slow = Constraints(min_tokens_per_second=limit).excesses(writer(rate=value))
    assert late == {"max_ttft": pytest.approx((value - limit) / limit)}
    assert slow == {"min_tokens_per_second": pytest.approx((1 / value - 1 / limit) * limit, abs=1e-9)}
    assert bool(Constraints(min_tokens_per_second=limit).violations(writer(rate=value))) == (limit / value - 1 > 1e-9)


def test_a_number_that_is_not_there_meets_no_limit() -> None:
    limits = Constraints(max_ttft_ms=1e9, min_tokens_per_second=1e-9)
    assert limits.violations(candidate()) == {"max_ttft": 1.0, "min_tokens_per_second": 1.0}


def test_as_much_too_slow_is_as_far_beyond_both_limits() -> None:
    limits = Constraints(max_ttft_ms=200, min_tokens_per_second=20)
    assert limits.excesses(writer(first=600, rate=20 / 3)) == pytest.approx(
        {"max_ttft": 2.0, "min_tokens_per_second": 2.0}
    )
    assert limits.excesses(writer(rate=0.0))["min_tokens_per_second"] == float("inf")


def test_the_front_is_of_what_meets_them() -> None:
    """The best in everything else is beyond one of both limits."""
    late, slow, good = (
        replace(writer(first, rate), id=name, kept=Interval(kept, kept, kept))
        for name, first, rate, kept in (("late", 300, 30, 0.99), ("slow", 100, 10, 0.99), ("good", 200, 20, 0.9))
    )
    limits, objectives = Constraints(max_ttft_ms=200, min_tokens_per_second=20), ("quality", "latency", "size")
    assert choose([late, slow, good], limits, objectives) == ([good], [])
    _, misses = choose([late, slow], limits, objectives)
    named = {each["id"]: each["blocked_by"] for each in blocked(misses, limits)}
    assert named == {"late": {"max_ttft": 0.5}, "slow": {"min_tokens_per_second": 1.0}}


def test_only_what_the_whole_interval_is_beyond_is_surely_beyond() -> None:
    """Intervals of `number` reach from half of its value to twice that."""
    predicted = {"ttft_ms": number("ttft_ms", 100.0), "tokens_per_second": number("tokens_per_second", 10.0)}
    assert Constraints(max_ttft_ms=51, min_tokens_per_second=19).surely_violated(predicted) == {}
    assert not Constraints(max_ttft_ms=51).hold(predicted)
    assert not Constraints(min_tokens_per_second=19).hold(predicted)
    assert Constraints(max_ttft_ms=100, min_tokens_per_second=10).hold(predicted)
    assert Constraints(max_ttft_ms=40, min_tokens_per_second=25).surely_violated(predicted) == {
        "max_ttft": pytest.approx(0.25),
        "min_tokens_per_second": pytest.approx(0.25),
    }


def test_limits_are_replaced_by_those_that_are_given() -> None:
    own = Constraints(max_drop=0.01, max_ttft_ms=5, strict=True)
    assert own.replaced_by(Constraints()) == own
    assert own.replaced_by(Constraints(max_drop=0.0, max_size_bytes=9)) == Constraints(
        max_drop=0.0, max_ttft_ms=5, max_size_bytes=9, strict=True
    )


@pytest.mark.parametrize(
    ("limits", "generates", "workload", "words"),
    [
        (Constraints(max_ttft_ms=5), False, READS, r"--max-ttft 5 is for language models.*--max-latency"),
        (Constraints(min_tokens_per_second=2), False, WRITES, r"--min-tokens-per-second 2 is for language models"),
        (
            Constraints(max_ttft_ms=5, min_tokens_per_second=2.5),
            True,
            READS,
            r"--min-tokens-per-second 2\.5: .*tokens=128,threads=1 generates nothing; .*tokens=128,generated=64",
        ),
    ],
)
def test_what_nothing_is_generated_for_cannot_be_limited(
    limits: Constraints, generates: bool, workload: Workload, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        limits.check_generation(generates, workload)


def test_what_is_generated_can_be_limited_and_so_can_a_prompt() -> None:
    Constraints(max_ttft_ms=5, min_tokens_per_second=2).check_generation(True, WRITES)
    Constraints(max_ttft_ms=5).check_generation(True, READS)
    Constraints(max_drop=0.1, max_latency_ms=5).check_generation(False, READS)
