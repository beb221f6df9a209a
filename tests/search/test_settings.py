"""What the user types is understood or refused with the value, the limit and an example."""

from __future__ import annotations

import pytest

from autolite.errors import InputError
from autolite.limits import Constraints
from autolite.search.settings import (
    Budget,
    parse_budget,
    parse_bytes,
    parse_fraction,
    parse_limits,
    parse_milliseconds,
    parse_objectives,
    parse_rate,
    parse_targets,
)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("90s", Budget(seconds=90)),
        ("15m", Budget(seconds=900)),
        ("1.5h", Budget(seconds=5400)),
        ("1h30m", Budget(seconds=5400)),
        ("40trials", Budget(trials=40)),
        ("1 trial", Budget(trials=1)),
    ],
)
def test_a_budget_is_a_time_or_a_number_of_trials(text: str, budget: Budget) -> None:
    assert parse_budget(text) == budget
    assert parse_budget(str(budget)) == budget


@pytest.mark.parametrize("text", ["", "15", "m", "5s", "0trials", "-3m", "15m20", "trials", "nan", "1e3m"])
def test_other_budgets_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="15m"):
        parse_budget(text)


def test_a_budget_grows_only_by_more_of_the_same_or_by_another_kind() -> None:
    assert Budget(trials=5).exceeds(Budget(trials=4))
    assert not Budget(trials=4).exceeds(Budget(trials=4))
    assert not Budget(seconds=60).exceeds(Budget(seconds=90))
    assert Budget(seconds=60).exceeds(Budget(trials=90))


def test_fractions_sizes_and_times() -> None:
    assert parse_fraction("1%", "--max-drop") == pytest.approx(0.01)
    assert parse_fraction(0.02, "--max-drop") == 0.02
    assert parse_bytes("6MB", "--max-size") == 6e6
    assert parse_bytes("1KiB", "--max-size") == 1024
    assert parse_milliseconds("0.2s", "--max-latency") == pytest.approx(200)


@pytest.mark.parametrize("text", ["150%", "-1%", "1", "one", ""])
def test_an_impossible_drop_names_the_option_and_the_range(text: str) -> None:
    with pytest.raises(InputError, match="--max-drop"):
        parse_fraction(text, "--max-drop")


@pytest.mark.parametrize("text", ["0", "-3MB", "6 parsecs", "MB"])
def test_an_impossible_size_names_the_option_and_the_units(text: str) -> None:
    with pytest.raises(InputError, match=r"--max-size.*MB"):
        parse_bytes(text, "--max-size")


@pytest.mark.parametrize("text", ["0", "-1", "inf", "nan", "fast", "20 tokens"])
def test_an_impossible_rate_names_the_option_and_an_example(text: str) -> None:
    with pytest.raises(InputError, match=r"--min-tokens-per-second.*such as 20"):
        parse_rate(text, "--min-tokens-per-second")


def test_limits_are_read_by_their_units() -> None:
    assert parse_limits() == Constraints()
    assert parse_limits(
        max_drop="1%",
        max_latency=5,
        max_ttft="0.2s",
        min_tokens_per_second="20",
        max_size="6MB",
        max_memory="1GB",
    ) == Constraints(
        max_drop=0.01,
        max_latency_ms=5,
        max_ttft_ms=200,
        min_tokens_per_second=20,
        max_size_bytes=6e6,
        max_memory_bytes=1e9,
    )


def test_objectives_are_quality_and_what_it_is_traded_for() -> None:
    assert parse_objectives("size, quality") == ("quality", "size")
    assert parse_objectives(("quality", "latency", "size")) == ("quality", "latency", "size")
    for bad, why in (
        ("quality", "name quality, and latency or size"),
        ("latency,size", "name quality"),
        ("speed", "unknown objective"),
    ):
        with pytest.raises(InputError, match=why):
            parse_objectives(bad)


def test_several_targets_are_named_once_each() -> None:
    assert parse_targets("pixel8, local") == ("pixel8", "local")
    assert parse_targets(["a.yaml"]) == ("a.yaml",)
    for bad in ("", "pixel8,", "pixel8,pixel8"):
        with pytest.raises(InputError, match="name one, or several different ones by comma"):
            parse_targets(bad)
    with pytest.raises(InputError, match="two are called board"):
        parse_targets("pixel8,a/board.yaml,b/board.yaml")
