"""The command line parses, calls one function, and ends in one sentence and the right exit code."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from autolite.cli import main
from autolite.front import Result as Run
from autolite.registry import data_dir


def invoke(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.mark.parametrize("command", [(), *[(name,) for name in main.commands], ("targets", "show")])
def test_every_command_has_help_with_an_example(command: tuple[str, ...]) -> None:
    done = invoke(*command, "--help")
    assert done.exit_code == 0
    assert re.search(r"^  Examples?:\n    autolite ", done.output, flags=re.M)  # on lines of their own


def test_search_front_and_export_as_a_user_types_them(
    tiny_teacher: Path, tiny_data: Path, tiny_space: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    usual = ("--model", tiny_teacher, "--data", tiny_data, "--space", tiny_space, "--budget", "4trials")
    done = invoke("search", *usual, "--target", "pixel8", "--out", out)
    assert done.exit_code == 0, done.output
    assert "front.json" in done.output
    shown = invoke("front", out)
    assert shown.exit_code == 0
    assert "teacher" in shown.output
    exported = invoke("export", out, "--max-drop", "90%", tmp_path / "deploy")
    assert exported.exit_code == 0, exported.output
    assert (tmp_path / "deploy" / "autolite.json").is_file()


def test_json_is_json_on_every_line(tiny_teacher: Path, tiny_data: Path, tiny_space: Path, tmp_path: Path) -> None:
    usual = ("--model", tiny_teacher, "--data", tiny_data, "--space", tiny_space, "--budget", "2trials")
    done = invoke("search", *usual, "--target", "pixel8", "--out", tmp_path / "run", "--json")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[-1]["event"] == "front"
    assert events[-1]["candidates"]
    assert {e["event"] for e in events[:-1]} == {"progress"}


def test_front_as_json_is_front_json(finished: Run) -> None:
    done = invoke("front", finished.path, "--json")
    assert json.loads(done.stdout) == json.loads((finished.path / "front.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("search",), 2, "--target"),
        (("search", "--target", "pixle8"), 2, "did you mean 'pixel8'"),
        (("search", "--target", "pixel8", "--budget", "soon"), 2, "15m"),
        (("search", "--target", "pixel8", "--max-drop", "200%"), 2, "--max-drop"),
        (("search", "--target", "pixel8", "--cache-size", "much"), 2, "--cache-size 'much'"),
        (("search", "--target", "pixel8", "--unlabelled", "no/such.txt"), 2, "no file"),
        (("front", "no/such/run"), 2, "no such run"),
        (("export", "no/such/run", "out"), 2, "no such run"),
        (("targets", "show", "pixel9"), 2, "did you mean 'pixel8'"),
    ],
)
def test_bad_usage_is_one_sentence(words: tuple[str, ...], code: int, message: str) -> None:
    done = invoke(*words)
    assert done.exit_code == code
    assert message in done.output
    assert "Traceback" not in done.output


def test_a_run_without_a_candidate_ends_with_3_and_shows_the_misses(
    tiny_teacher: Path, hopeless_data: Path, tiny_space: Path, tmp_path: Path
) -> None:
    usual = ("--model", tiny_teacher, "--data", hopeless_data, "--space", tiny_space, "--budget", "2trials")
    done = invoke("search", *usual, "--target", "pixel8", "--out", tmp_path / "run", "--min-quality", "0.95")
    assert done.exit_code == 3
    assert "min_quality" in done.output
    assert invoke("front", tmp_path / "run").exit_code == 0


def test_a_front_of_another_version_or_a_broken_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "front.json").write_text("{", encoding="utf-8")
    done = invoke("front", tmp_path)
    assert done.exit_code == 2
    assert "cannot be read" in done.output
    (tmp_path / "front.json").write_text('{"schema": 99}', encoding="utf-8")
    assert "schema 99" in invoke("front", tmp_path).output


def test_every_shipped_target_is_listed_with_the_provenance_of_its_numbers() -> None:
    names = [path.stem for path in data_dir("hardware_profiles").glob("*.yaml")]
    listed = invoke("targets").output
    for name in [*names, "local"]:
        assert name in listed
    shown = invoke("targets", "show", "pixel8").output
    for provenance in ("datasheet", "measured", "derived", "assumed", "vfpbench", "2024-07-06", "when it is warm"):
        assert provenance in shown
