"""Formats that gain nothing are not tried: what stays is exactly what no other format beats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autolite.architecture import ModelShape
from autolite.compress import shape_after
from autolite.errors import SpaceError
from autolite.formats import FORMATS, decode, encode
from autolite.hardware.profile_files import load_profile
from autolite.measure import Workload
from autolite.search.narrow import EQUAL, Option, beaten, narrow, rounding, slower
from autolite.search.prices import Prices
from autolite.search.progress import Snapshot
from autolite.space import load_space
from tests.conftest import RunSearch
from tests.shapes import bert_shape, llama_shape

LEVELS = st.sampled_from([1.0, 1.01, 1.019, 1.03, 2.0])


@st.composite
def offers(draw: st.DrawFn) -> list[Option]:
    plans = draw(st.integers(1, 3))
    per_plan = st.lists(LEVELS, min_size=plans, max_size=plans).map(tuple)
    made = st.builds(Option, st.just(""), st.sampled_from([0.0, 1e-4, 1e-3]), per_plan, per_plan)
    drawn = draw(st.lists(made, min_size=1, max_size=7))
    return [Option(f"f{i}", one.error, one.latencies, one.sizes) for i, one in enumerate(drawn)]


def worse(one: Option, other: Option) -> bool:
    """The definition, written out: `other` beats `one`."""
    plans = range(len(one.sizes))
    equal_but_for_time = one.error == other.error and one.sizes == other.sizes
    slack = 1.0 if equal_but_for_time else EQUAL
    no_worse = (
        other.error <= one.error
        and all(other.sizes[i] <= one.sizes[i] for i in plans)
        and all(other.latencies[i] <= slack * one.latencies[i] for i in plans)
    )
    better = not equal_but_for_time or any(other.latencies[i] * EQUAL < one.latencies[i] for i in plans)
    return no_worse and better


@given(offers())
def test_what_stays_is_exactly_what_no_other_beats(options: list[Option]) -> None:
    gone = beaten(options)
    assert set(gone) == {one.format for one in options if any(worse(one, other) for other in options)}
    assert len(gone) < len(options), "something always stays"
    by_name = {option.format: option for option in options}
    for form, best in gone.items():
        assert best not in gone
        assert by_name[best].error <= by_name[form].error
        assert all(a <= b for a, b in zip(by_name[best].sizes, by_name[form].sizes, strict=True))


@given(offers())
def test_what_is_tried_although_it_is_slower_is_smaller_somewhere(options: list[Option]) -> None:
    gone = beaten(options)
    kept = {option.format: option for option in options if option.format not in gone}
    for form, fast in slower(list(kept.values())).items():
        one, other = kept[form], kept[fast]
        assert other.error < one.error
        assert all(a < b for a, b in zip(other.latencies, one.latencies, strict=True))
        assert any(a > b for a, b in zip(other.sizes, one.sizes, strict=True))


def test_the_rounding_of_a_format_grows_with_what_it_leaves_out() -> None:
    error = {form: rounding(form) for form in FORMATS}
    assert error["fp32"] == 0
    assert error["fp32"] < error["bf16"] < error["int8-weight"] < error["int8"] < error["int7"] < error["int4"]
    assert error["int8"] == error["int8-static"]
    # Even steps err by a twelfth of their square (Widrow 1956), and those of 7 bits are twice as wide.
    weights = (error[form] - (error["int8"] - error["int8-weight"]) for form in ("int7", "int8"))
    assert next(weights) / next(weights) == pytest.approx((127 / 63) ** 2, rel=0.02)


def problem(
    shape: ModelShape, space: str, target: str = "x86-avx512", runnable: Sequence[str] = tuple(FORMATS), **workload: int
) -> Any:
    """What `narrow` reads of a problem, without a model or data."""
    profile = load_profile(target)
    loaded = load_space(space)
    asked = Workload(**{"threads": profile.threads, **workload})
    return SimpleNamespace(
        space=loaded,
        plan=lambda params, effort: loaded.plan(params, effort, 0),
        profile=profile,
        workload=asked,
        prices=(Prices(shape, profile, asked),),
        settings=SimpleNamespace(seed=0),
        others=(),
        runtime=SimpleNamespace(name="onnxruntime", formats=frozenset(runnable)),
        shape=lambda plan: shape_after(plan, shape),
    )


def left_out(one: Any, group: str) -> tuple[set[str], list[str]]:
    """The formats of a group that are not tried, and what was said."""
    said: list[str] = []
    narrowed = narrow(one, said.append)
    before, after = (set(space.settings[f"quantize.{group}"].choices or ()) for space in (one.space, narrowed))
    return {str(form) for form in before - after}, said


@pytest.mark.parametrize("space", ["uniform", "quick", "quantize-only"])
def test_seven_bits_are_not_tried_where_eight_are_as_fast(space: str) -> None:
    gone, said = left_out(problem(bert_shape(), space), "ffn")
    assert "int7" in gone
    assert any(
        line.startswith("ffn: ") and "int7 is neither smaller nor faster than int8 here" in line for line in said
    )


def test_seven_bits_are_tried_where_they_are_faster() -> None:
    one = problem(bert_shape(), "uniform")
    data = one.profile.model_dump()
    data["units"][0]["peak"]["int7"] = {**data["units"][0]["peak"]["int8"]}
    data["units"][0]["peak"]["int8"]["value"] /= 1.3
    data["efficiency"]["int7"] = data["efficiency"]["int8"]
    data["formats"]["int7"] = "int7"
    one.profile = type(one.profile).model_validate(data)
    one.prices = (replace(one.prices[0], profile=one.profile),)
    gone, _ = left_out(one, "ffn")
    assert "int7" not in gone


def test_slower_formats_are_tried_for_their_size_and_that_is_said() -> None:
    shape = llama_shape(layers=8, hidden=512, heads=8, kv_heads=8, ffn=1376)
    gone, said = left_out(problem(shape, "decoder", tokens=128, generated=64), "attention")
    assert "kmeans4" not in gone
    (attention,) = [line for line in said if line.startswith("attention: ")]
    assert "kmeans4 is slower than int4 here: tried for its size only" in attention


def test_a_format_larger_and_less_exact_than_another_is_not_tried() -> None:
    """Sixteen levels for a row of 32 take more bytes than 8 bits."""
    gone, _ = left_out(problem(bert_shape(2, 32, 4, 32), "uniform"), "ffn")
    assert "kmeans4" in gone


def test_what_the_runtime_or_the_target_lacks_is_left_out_and_said() -> None:
    one = problem(bert_shape(), "quantize-only", runnable=("fp32", "int8", "int4", "kmeans4"))
    one.profile = one.profile.model_copy(update={"formats": {"fp32": ("fp32",), "int8": ("int8",), "int4": ("int4",)}})
    gone, said = left_out(one, "ffn")
    assert gone >= {"bf16", "int8-static", "int8-weight", "int7", "kmeans4"}
    (ffn,) = [line for line in said if line.startswith("ffn: ")]
    assert "onnxruntime cannot run bf16, int8-static, int8-weight, int7: not tried" in ffn
    assert "x86-avx512 cannot run kmeans4: not tried" in ffn
    with pytest.raises(
        SpaceError, match=r"quantize\.attention offers only .*, which onnxruntime cannot run; it runs nf4"
    ):
        narrow(problem(bert_shape(), "quantize-only", runnable=("nf4",)), lambda text: None)


def test_nothing_is_said_of_the_speed_of_a_runtime_that_the_prices_are_not_of() -> None:
    one = problem(bert_shape(), "quantize-only", runnable=("fp32", "bf16", "int8", "int7"))
    one.runtime.name = "other"
    gone, said = left_out(one, "ffn")
    assert gone == {"int8-static", "int8-weight", "int4", "kmeans4"}
    assert not any("faster" in line or "slower" in line for line in said)


def test_groups_that_one_format_decides_for_both_are_compared_where_that_is_possible() -> None:
    """The head of this Llama is its embedding: formats that differ from it are refused, not compared."""
    shape = llama_shape()
    said: list[str] = []
    narrowed = narrow(problem(shape, "quantize-only"), said.append)
    for start in narrowed.start:
        shape_after(narrowed.plan(start, 1, 0), shape)


def test_a_search_tells_what_it_leaves_out_and_goes_on_with_the_same_space(
    run_search: RunSearch, tmp_path: Path
) -> None:
    space = tmp_path / "formats.yaml"
    space.write_text(
        "name: formats\ndescription: d\nsteps:\n  - quantize: {attention: [int7, int8, kmeans4], ffn: [int8, fp32]}\n"
        "stages:\n" + "".join(f"  {s}: {{trials: 3, effort: 0}}\n" for s in ("screen", "recover", "confirm")),
        encoding="utf-8",
    )
    seen: list[Snapshot] = []
    run_search(space=str(space), out=tmp_path / "r", budget="3trials", observer=seen.append)
    told = {snapshot.doing for snapshot in seen if snapshot.doing.startswith("attention: ")}
    assert told == {
        "attention: int7 is neither smaller nor faster than int8 here: not tried; "
        "kmeans4 is neither smaller nor faster than int8 here: not tried"
    }
    more: list[Snapshot] = []
    result = run_search(space=str(space), out=tmp_path / "r", budget="5trials", observer=more.append)
    assert not any(snapshot.doing.startswith("attention: ") for snapshot in more)
    for candidate in result.front:
        (step,) = candidate.plan.to_json()["steps"] or [{"config": {"attention": "int8"}}]
        assert step["config"]["attention"] == "int8"


def test_rounding_is_that_of_the_reference() -> None:
    import torch

    weights = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))[0]
    for form in ("int4", "kmeans4", "int8-weight", "bf16"):
        found = decode(encode(weights, form))
        assert rounding(form) == pytest.approx(float((found - weights).norm() ** 2 / weights.norm() ** 2), rel=1e-5)
