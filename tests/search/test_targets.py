"""Several targets at once: each has its front, of candidates that are there, at its own prices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from autolite import reprice
from autolite.cli import main
from autolite.errors import InputError, RunError, TargetError
from autolite.front import Result, read_front
from autolite.limits import Constraints
from autolite.registry import data_dir
from autolite.search.identity import run_identity
from autolite.search.settings import Budget, Settings
from autolite.space import load_space
from autolite.tasks.base import DataSpec
from tests.conftest import RunSearch

TARGETS = ("pixel8", "raspberry-pi-5")


@pytest.fixture(scope="module")
def several(run_search: RunSearch, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run_search(target=TARGETS, budget="12trials", out=tmp_path_factory.mktemp("runs") / "several")


def test_each_target_has_a_front_whose_folders_are_there(several: Result) -> None:
    other = read_front(several.path, "raspberry-pi-5")
    assert several.front.target["name"] == "pixel8"
    assert other.target["name"] == "raspberry-pi-5"
    assert len(several.front)
    assert len(other)
    for candidate in [*several.front, *other]:
        assert (several.path / candidate.path / "autolite.json").is_file()
        assert candidate.test is not None


def test_prices_are_those_of_the_target_and_quality_is_the_same(several: Result) -> None:
    other = read_front(several.path, "raspberry-pi-5")
    again = reprice(several.path, "raspberry-pi-5").front
    assert [c.to_json() for c in other] == [c.to_json() for c in again]
    both = {c.id: c for c in several.front}.keys() & {c.id: c for c in other}.keys()
    for name in both:
        here, there = (next(c for c in front if c.id == name) for front in (several.front, other))
        assert here.kept == there.kept
        assert here.latency_ms.value != there.latency_ms.value


def test_a_candidate_is_picked_from_the_front_of_a_target(several: Result, tmp_path: Path) -> None:
    other = read_front(several.path, "raspberry-pi-5")
    best = min(other, key=lambda c: c.latency_ms.value)
    assert several.pick(0.99, target="raspberry-pi-5").candidate == best
    assert several.pick(0.99, target="pixel8").candidate == several.pick(0.99).candidate
    done = CliRunner().invoke(
        main, ["export", str(several.path), str(tmp_path / "out"), "--target", "raspberry-pi-5", "--max-drop", "99%"]
    )
    assert f"candidate {best.id}" in done.output
    with pytest.raises(RunError, match="no front for x86-avx512, only for pixel8, raspberry-pi-5"):
        several.pick(target="x86-avx512")


def test_a_finished_run_answers_at_once_and_belongs_to_its_targets(several: Result, run_search: RunSearch) -> None:
    before = (several.path / "front-raspberry-pi-5.json").read_bytes()
    run_search(target=TARGETS, budget="12trials", out=several.path)
    assert (several.path / "front-raspberry-pi-5.json").read_bytes() == before
    file = several.path / "front-raspberry-pi-5.json"
    file.write_text(json.dumps({**json.loads(before), "objectives": ["quality", "size"]}), encoding="utf-8")
    run_search(target=TARGETS, budget="12trials", out=several.path)  # as if it had been killed between the two
    assert read_front(several.path, "raspberry-pi-5").objectives == several.front.objectives
    with pytest.raises(RunError, match="made with another other targets"):
        run_search(target="pixel8,x86-avx512", budget="12trials", out=several.path)


def test_profiles_of_the_users_own_are_known_by_content_wherever_a_process_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = load_space("quick")
    for name in ("mine.yaml", "other.yaml"):
        (tmp_path / name).write_text((data_dir("hardware_profiles") / "pixel8.yaml").read_text(encoding="utf-8"))
    asked = Settings(
        "mine.yaml", tmp_path, None, DataSpec(None), "text-classification", "quick", Budget(trials=1),
        Constraints(), None, "onnxruntime", None, 0, "cpu", others=("other.yaml", "pixel8"),
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    identity = run_identity(asked, space)
    (tmp_path / "elsewhere").mkdir()
    sent = asked.to_json()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run_identity(Settings.from_json(sent, tmp_path, None), space) == identity
    with (tmp_path / "other.yaml").open("a") as file:
        file.write("# a comment\n")
    assert run_identity(Settings.from_json(sent, tmp_path, None), space) == identity
    for name, text in (("base.yaml", "idle: [9, W, assumed, a guess, 2026-01-01, 0.5]"), ("other.yaml", "")):
        above = "pixel8" if text else "base.yaml"
        (tmp_path / name).write_text(f"extends: {above}\nname: pixel8\ndescription: tuned\n{text}\n")
    changed = run_identity(Settings.from_json(sent, tmp_path, None), space)
    assert {key for key in identity if identity[key] != changed[key]} == {"other targets"}
    (tmp_path / "base.yaml").write_text("extends: pixel8\nname: pixel8\ndescription: tuned\n")
    assert run_identity(Settings.from_json(sent, tmp_path, None), space) != changed
    (tmp_path / "other.yaml").unlink()
    with pytest.raises(InputError, match=r"the target of the run in .*other.yaml, does not exist here"):
        Settings.from_json(sent, tmp_path, None)


def test_a_limit_that_only_a_further_target_meets_is_held_there(
    several: Result, run_search: RunSearch, tmp_path: Path
) -> None:
    slow, fast = "raspberry-pi-5", "x86-avx512"  # several times as fast
    limit = 0.75 * min(candidate.latency_ms.value for candidate in read_front(several.path, slow))
    found = run_search(target=(slow, fast), budget="4trials", max_latency=limit, out=tmp_path / "run")
    there = read_front(found.path, fast)
    assert not found.front.candidates
    assert found.front.nearest_misses[0]["latency_ms"]["value"] > limit
    assert len(there)
    assert all(candidate.test is not None for candidate in there)
    assert there.teacher["test"] is not None


def test_a_wrong_target_is_told_before_anything_is_done(run_search: RunSearch, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(TargetError, match="pixel9"):
        run_search(target="pixel8,pixel9", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
