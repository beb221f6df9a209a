"""Options are measured once, kept, and chosen only where they compute the same and are clearly faster."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autolite.runtime import tune
from autolite.runtime.tune import Found, bucket, fastest, measure
from autolite.runtime.variants import Place, usual
from autolite.store import Store

PLACES = [
    Place("product", "int4", (16, 64, 48)),
    Place("product", "kmeans4", (16, 64, 48)),
    Place("qkv", "fp32", (8, 32, 32, 16)),
    Place("qkv", "int8", (8, 32, 32, 32)),
    Place("qkv", "int8-static", (8, 32, 32, 32)),
    Place("attention", sizes=(2, 8, 4, 2, 8, 1)),
    Place("attention", sizes=(1, 8, 4, 4, 8, 0)),
    Place("cached", sizes=(2, 8, 3, 4, 2, 8)),
    Place("cached", sizes=(1, 8, 0, 4, 4, 8)),
    Place("first", "fp32", (2, 8, 4, 8, 32)),
    Place("first", "int8", (2, 8, 4, 8, 32)),
    Place("gelu", "int8", (8, 32)),
    Place("norm", sizes=(8, 32)),
    Place("lookup", "int4", (8, 64)),
]
named = pytest.mark.parametrize("place", PLACES, ids=lambda p: f"{p.kind}-{p.format}-{len(p.options)}")


@named
def test_every_option_is_measured_and_agrees_with_the_reference(place: Place) -> None:
    found = measure(place, threads=1)
    assert tuple(each.option for each in found) == place.options
    assert all(each.equivalent for each in found), found
    assert all(0 < each.low <= each.microseconds <= each.high for each in found)


@named
def test_what_is_usual_is_an_option(place: Place) -> None:
    assert usual(place) in place.options


def test_the_approximate_gelu_is_no_option_where_activations_stay_in_floating_point() -> None:
    assert Place("gelu", "fp32", (8, 32)).options == Place("gelu", "bf16", (8, 32)).options == ("erf",)
    assert "tanh" in Place("gelu", "int8", (8, 32)).options


def test_a_measurement_is_made_once_and_read_by_the_next_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Place] = []

    def count(place: Place, threads: int) -> list[Found]:
        made.append(place)
        return [Found(o, 10.0 * (i + 1), 9.0, 11.0, 0.0, True) for i, o in enumerate(place.options)]

    monkeypatch.setattr(tune, "measure", count)
    url = f"sqlite:///{tmp_path / 'variants.db'}"
    for _ in range(2):
        store = Store(url, "a processor")
        choose = tune.tuned(1, store)
        assert choose(Place("gelu", "int8", (130, 1536))) == "erf"
        assert choose(Place("gelu", "int8", (128, 1500))) == "erf"  # of the same bucket
        store.close()
    assert made == [Place("gelu", "int8", (128, 1536))]
    other = Store(url, "another processor")
    tune.tuned(1, other)(Place("gelu", "int8", (128, 1536)))
    other.close()
    assert len(made) == 2


def test_an_option_that_computes_something_else_is_never_chosen() -> None:
    place = Place("gelu", "int8", (8, 32))
    found = [Found("erf", 9.0, 8.0, 10.0, 0.0, True), Found("tanh", 1.0, 1.0, 1.0, 0.3, False)]
    assert fastest(place, found) == "erf"


@given(erf=st.floats(1, 100), tanh=st.floats(1, 100))
def test_the_usual_option_stays_unless_another_is_clearly_faster(erf: float, tanh: float) -> None:
    place = Place("gelu", "int8", (8, 32))
    found = [Found("erf", erf, erf, erf, 0.0, True), Found("tanh", tanh, tanh, tanh, 0.0, True)]
    assert fastest(place, found) == ("erf" if erf <= tune.CLEARLY * tanh else "tanh")


@given(st.integers(1, 10**5))
def test_a_bucket_is_near_and_its_own_bucket(n: int) -> None:
    (rounded,) = bucket(Place("gelu", "int8", (n,))).sizes
    assert abs(rounded - n) <= n / 8
    assert bucket(Place("gelu", "int8", (rounded,))).sizes == (rounded,)


def test_where_the_cache_cannot_be_written_measurements_are_kept_for_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    store = tune.machine_store.__wrapped__(1)
    store.put("key", 1)
    assert store.get("key") == 1
