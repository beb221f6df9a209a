"""Limits on what a language model generates: what nothing meets is refused, what is left meets them, and so on another
target and in the export."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from click.testing import CliRunner
from rich.console import Console

from autolite import reprice
from autolite.cli import main
from autolite.errors import InputError, NoCandidateError
from autolite.front import Front, Result, read_front
from autolite.report.tables import misses_table
from autolite.search import engine
from tests.conftest import RunSearch
from tests.search.test_families import folder_of, search_text

SCHEMA = Path(__file__).parents[2] / "docs" / "front.schema.json"
CALL = {"target": "pixel8", "workload": "tokens=32,generated=16", "budget": "3trials"}
Write = Callable[..., Result]


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """Return a search for a small Llama, always in the same folder: limits choose anew among what it found."""
    folder = tmp_path_factory.mktemp("llama")
    model = folder_of("llama", "language-modeling", folder / "model")
    return lambda **changes: search_text(model, folder, **{**CALL, **changes})


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
    data = json.loads((result.path / "front.json").read_text(encoding="utf-8"))
    jsonschema.validate(data, json.loads(SCHEMA.read_text(encoding="utf-8")))
    assert data["constraints"]["max_ttft_ms"] == 3.6e6
    assert data["constraints"]["min_tokens_per_second"] == best


def test_the_nearest_misses_say_by_how_much_they_are_too_slow(write: Write, best: float) -> None:
    tried = write()
    with pytest.raises(NoCandidateError, match=r"the nearest misses min_tokens_per_second by 16\.7%"):
        write(min_tokens_per_second=1.2 * best)  # predictions are not so sure that it were refused
    front = read_front(tried.path)
    assert next(each["blocked_by"] for each in front.nearest_misses) == {"min_tokens_per_second": pytest.approx(1 / 6)}
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(misses_table(front))
    assert "min_tokens_per_second (16.7% beyond)" in console.export_text()


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
