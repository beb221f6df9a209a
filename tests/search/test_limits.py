"""Limits on what a language model generates: what nothing meets is refused, what is left meets them, and so on another
target and in the export."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import optuna
import pytest
from click.testing import CliRunner
from rich.console import Console
from transformers import AutoModelForCausalLM

from autolite import reprice
from autolite.architecture import shape_of
from autolite.cli import main
from autolite.compress import shape_after
from autolite.errors import InputError, NoCandidateError
from autolite.front import Front, Result, read_front
from autolite.hardware.predict import predict
from autolite.hardware.profile_files import load_profile
from autolite.limits import Constraints
from autolite.measure import Workload
from autolite.plan import Plan, make_step
from autolite.report.tables import front_table, misses_table
from autolite.search import engine, proposal
from autolite.search.prices import Prices
from tests.conftest import RunSearch
from tests.search.test_families import folder_of, reloaded, search_text
from tests.shapes import llama_shape

SCHEMA = Path(__file__).parents[2] / "docs" / "front.schema.json"
CALL = {"target": "pixel8", "workload": "tokens=32,generated=16", "budget": "3trials"}
Write = Callable[..., Result]


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """Return a search for a small Llama, always in the same folder: limits choose anew among what it found."""
    folder = tmp_path_factory.mktemp("llama")
    model = folder_of("llama", "language-modeling", folder / "model")
    return lambda **changes: search_text(model, folder, **{**CALL, **changes})


def shown(table: Any) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def rates(front: Front) -> dict[str, float]:
    """The tokens a second of each candidate."""
    return {c.id: c.tokens_per_second.value for c in front if c.tokens_per_second}


@pytest.fixture(scope="module")
def best(write: Write) -> float:
    """The highest rate of a search without limits."""
    return max(rates(write().front).values())


def test_what_is_chosen_meets_both_limits(write: Write, best: float) -> None:
    result = write(max_ttft="3600s", min_tokens_per_second=best)
    assert set(rates(result.front).values()) == {best}
    assert f"{1e3 / best:.3g}" in shown(front_table(result.front)), "the milliseconds of each further token"
    data = json.loads((result.path / "front.json").read_text(encoding="utf-8"))
    jsonschema.validate(data, json.loads(SCHEMA.read_text(encoding="utf-8")))
    assert data["constraints"]["max_ttft_ms"] == 3.6e6
    assert data["constraints"]["min_tokens_per_second"] == best


def test_the_nearest_misses_say_by_how_much_they_are_too_slow(write: Write, best: float) -> None:
    tried = write()
    with pytest.raises(NoCandidateError, match=r"the nearest misses min_tokens_per_second by 20\.0%"):
        write(min_tokens_per_second=1.2 * best)  # predictions are not so sure that it were refused
    front = read_front(tried.path)
    assert next(each["blocked_by"] for each in front.nearest_misses) == {"min_tokens_per_second": pytest.approx(0.2)}
    assert "min_tokens_per_second (20.0% beyond)" in shown(misses_table(front))


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ({"max_ttft": "1ns"}, r"'1ns' is not understood"),
        (
            {"max_ttft": "0.001us"},
            r"--max-ttft 1e-06 ms cannot be met: the least that space .* on pixel8 is .* ms; raise",
        ),
        ({"min_tokens_per_second": 1e9}, r"cannot be met: the most that space .* is .* tokens/s; lower the limit"),
    ],
)
def test_what_no_plan_comes_near_is_refused_before_training(
    write: Write, monkeypatch: pytest.MonkeyPatch, limit: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr(engine, "evaluate", None)
    with pytest.raises(InputError, match=words):
        write(**limit)


def test_a_call_that_generates_nothing_has_no_rate(tmp_path: Path) -> None:
    model = folder_of("llama", "language-modeling", tmp_path / "model")
    with pytest.raises(InputError, match=r"generates nothing; .*--workload tokens=128,generated=64"):
        search_text(model, tmp_path, target="pixel8", workload="tokens=32", budget="1trials", min_tokens_per_second=5)


def test_a_classifier_has_neither(run_search: RunSearch, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--max-ttft 5 is for language models.*--max-latency"):
        run_search(out=tmp_path / "run", max_ttft="5ms")


@pytest.mark.parametrize(
    ("limits", "others", "expected"),
    [
        (Constraints(), False, "fp32"),
        (Constraints(min_tokens_per_second=1.0), False, "fp32"),
        (Constraints(max_ttft_ms=1.0), False, "none"),
        ("between", False, "int8"),
        ("between", True, "fp32"),  # the first target's predictions do not decide there
    ],
)
def test_plans_that_are_predicted_to_be_too_slow_are_not_proposed(
    limits: Any, others: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = llama_shape(22, 2048, 16, 16, 5632)
    prices = Prices(shape, load_profile("pixel8"), Workload(1, 128, 1, 64))
    plans = {form: Plan((make_step("quantize", {"attention": form, "ffn": form}),)) for form in ("fp32", "int8")}
    slow, fast = (prices.of_shape(shape_after(plan, shape))["tokens_per_second"] for plan in plans.values())
    assert slow.value < fast.value < 2 * slow.high, "the intervals overlap, so that nothing is surely beyond"
    if limits == "between":
        limits = Constraints(min_tokens_per_second=min(math.sqrt(slow.value * fast.value), slow.high))
    problem: Any = SimpleNamespace(
        frontier=None,
        workload=prices.workload,
        teacher=SimpleNamespace(shape=shape),
        settings=SimpleNamespace(constraints=limits, objectives=("quality", "latency", "size")),
        others=(prices,) if others else (),
        prices=(prices, prices) if others else (prices,),
        plan=lambda params, effort: plans[params["form"]],
        shape=lambda plan: shape_after(plan, shape),
        space=SimpleNamespace(complete=dict),
    )
    study: Any = SimpleNamespace(trials=list, asked=list, next_seed=lambda: 0)
    offered = [{"form": form} for form in plans]
    monkeypatch.setattr(
        proposal, "propose", lambda frontier, seen, is_new, *more: next(filter(is_new, offered), {"form": "none"})
    )
    assert proposal.proposal(problem, study, 1) == {"form": expected}


def board(folder: Path, limit: float) -> str:
    """Write the profile of a pixel8 with so many bytes of memory; returns its path."""
    given = [limit / 1e9, "GB", "assumed", "a test's", "2026-01-01", 0.0]
    profile = {"extends": "pixel8", "name": "board", "description": "small", "memory": {"size": given}}
    (folder / "board.yaml").write_text(json.dumps(profile), encoding="utf-8")
    return str(folder / "board.yaml")


SPACE = """
name: two
description: Half of a model in 8 bits, or all of it.
steps:
  - quantize: {attention: [int8], ffn: [int8, fp32], embedding: [int8, fp32], head: [int8, fp32]}
stages: {screen: {trials: 2, effort: 0}, recover: {trials: 1, effort: 0}, confirm: {trials: 1, effort: 0}}
start:
  - {quantize.ffn: fp32, quantize.embedding: fp32, quantize.head: fp32}
  - {quantize.ffn: int8, quantize.embedding: int8, quantize.head: int8}
"""


def test_a_plan_that_does_not_fit_is_refused_with_what_it_needs_and_what_there_is(tmp_path: Path) -> None:
    model = folder_of("llama", "language-modeling", tmp_path / "model")
    (tmp_path / "two.yaml").write_text(SPACE, encoding="utf-8")
    teacher = shape_of(reloaded(AutoModelForCausalLM, model))
    call = Workload(1, 32, load_profile("pixel8").threads, 16)
    large, small = (
        predict(shape_after(Plan((make_step("quantize", formats),)), teacher), load_profile("pixel8"), call)
        for formats in (
            {"attention": "int8"},
            {"attention": "int8", "ffn": "int8", "embedding": "int8", "head": "int8"},
        )
    )
    limit = math.sqrt(large["memory_bytes"].low * small["memory_bytes"].low)
    result = search_text(
        model, tmp_path, **{**CALL, "target": board(tmp_path, limit), "space": str(tmp_path / "two.yaml")}
    )
    assert all(c.memory_bytes.low <= limit for c in result.front)
    study = optuna.load_study(study_name="r/screen", storage=f"sqlite:///{result.path / 'study.db'}")
    refused = [t for t in study.trials if "infeasible" in t.user_attrs]
    assert all(t.constraints["memory"] > 0 for t in refused)
    need = large["memory_bytes"].low / 1e9
    assert (
        f"a call with {call} needs at least {need:.3g} GB of memory, but a program has at most {limit / 1e9:.3g} GB on "
        "board"
    ) in {t.user_attrs["infeasible"] for t in refused}


def test_a_model_that_fits_in_no_plan_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "evaluate", None)
    model = folder_of("llama", "language-modeling", tmp_path / "model")
    with pytest.raises(InputError, match=r"no plan of space 'quantize-only' fits: of the smallest, a call with .* GB"):
        search_text(model, tmp_path, **{**CALL, "target": board(tmp_path, 5e3)})


def test_keys_and_values_count_for_what_fits() -> None:
    """The weights of a Llama with a billion parameters fit into a phone, the contexts of eight long texts do not."""
    shape, phone = (
        llama_shape(22, 2048, 16, 16, 5632).with_formats("int8", "int8", "int8", "int8"),
        load_profile("pixel8"),
    )
    for generated, fits in ((64, True), (8000, False)):
        prices = Prices(shape, phone, Workload(8, 128, 1, generated))
        assert ("memory" not in prices.surely_beyond(shape, Constraints())) == fits


def test_a_run_is_held_to_them_on_another_target_and_in_its_export(write: Write, best: float, tmp_path: Path) -> None:
    run = str(write().path)
    there = max(rates(reprice(run, "raspberry-pi-5").front).values())
    kept = reprice(run, "raspberry-pi-5", min_tokens_per_second=there).front
    assert set(rates(kept).values()) == {there}
    assert not reprice(run, "raspberry-pi-5", min_tokens_per_second=1.01 * there).front.candidates
    with pytest.raises(InputError, match="generates nothing"):
        reprice(run, "raspberry-pi-5", workload="generated=0", min_tokens_per_second=1)
    words = ["export", run, str(tmp_path / "out"), "--min-tokens-per-second"]
    done = CliRunner().invoke(main, [*words, "1e9"])
    assert done.exit_code == 3
    assert "meets min_tokens_per_second: the nearest" in done.output
    assert "tokens/s)" in done.output
    done = CliRunner().invoke(main, [*words, str(best)])
    (chosen,) = (name for name, rate in rates(read_front(Path(run))).items() if rate == best)
    assert f"candidate {chosen}" in done.output
