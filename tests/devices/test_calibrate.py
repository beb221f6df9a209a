"""`autolite calibrate`: a profile of a device whose times are known, what is kept of it, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from click.testing import CliRunner

from autolite.cli import main
from autolite.devices import calibrate as calibrating
from autolite.devices.base import Device
from autolite.devices.calibrate import calibrate, destination, keep
from autolite.devices.submodels import FAMILIES, FORMATS, Recipe, made, recipes
from autolite.devices.timing import Artifact, Session
from autolite.errors import DeviceError, InputError
from autolite.hardware import load_target
from autolite.hardware.calibration import scaled
from autolite.hardware.predict import predict
from autolite.hardware.profile import Profile
from autolite.measure import Timing, Workload
from autolite.runtime.onnxruntime import OnnxRuntime
from tests.hardware.test_local import timings, world

OFF = {"fp32.peak": 1.5, "int8.peak": 0.8, "dispatch": 2.0, "normalization": 1.5}


class World:
    """A device whose probes take the times of `tests.hardware.test_local`, and its models others than those say."""

    kept: ClassVar[dict[Recipe, tuple[Any, Artifact]]] = {}

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.probes = 0
        self.models: list[str] = []
        self.shapes: dict[str, Any] = {}
        self.truth: Profile | None = None
        self.slow = 1.0

    def made(self, recipe: Recipe, folder: Path) -> tuple[Any, Artifact]:
        """What a recipe gives, made once for all tests."""
        if recipe not in self.kept:
            self.kept[recipe] = made(recipe, self.folder / str(len(self.kept)))
        shape, artifact = self.kept[recipe]
        self.shapes[artifact.files[0]] = (shape, recipe.workload)
        return shape, artifact

    def time_on(
        self, device: Device, artifacts: Mapping[str, Artifact], threads: int, seconds: float, **how: Any
    ) -> Session:
        times, _ = world()
        if set(artifacts) == set(times):
            self.probes += 1
            return Session(timings(times), {}, (), "onnxruntime")
        assert self.truth is not None
        found = {}
        for name, artifact in artifacts.items():
            shape, workload = self.shapes[artifact.files[0]]
            milliseconds = predict(shape, self.truth, workload)["latency_ms"].value * self.slow
            found[name] = Timing(((milliseconds,), (3 * milliseconds,), (milliseconds,)))  # something else ran
        self.models += list(artifacts)[1:]
        self.slow *= 1.2  # the longer it takes, the more others there are
        return Session(found, {}, (), "onnxruntime")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, own_cache: None, folder: Path) -> World:
    found = World(folder)
    probed = calibrating._probed

    def known(*words: Any) -> Profile:
        base = probed(*words)
        found.truth = scaled(base, OFF)
        return base

    monkeypatch.setattr(calibrating, "_probed", known)
    monkeypatch.setattr(calibrating, "time_on", found.time_on)
    monkeypatch.setattr(calibrating, "made", found.made)
    monkeypatch.setattr(calibrating, "probes", lambda cache, saturated: world()[1])
    monkeypatch.setattr(calibrating, "_stored", lambda models, folder: dict.fromkeys(models))
    monkeypatch.setattr(calibrating, "_LEAST", 0.0)
    monkeypatch.setattr(calibrating, "recipes", small)
    return found


def small(threads: int, flops: tuple[float, float]) -> Any:
    return recipes(threads, (1e5, 3e7))


def test_whole_models_correct_what_the_probes_say(device: World) -> None:
    found = calibrate(threads=1, budget=0.001)
    assert len(found.errors) == 15
    assert np.abs(found.before).mean() > 0.1
    assert np.abs(found.errors).mean() < 0.06
    assert device.truth is not None
    shape, workload = next(iter(device.shapes.values()))
    right = predict(shape, device.truth, workload)["latency_ms"].value
    assert predict(shape, found.profile, workload)["latency_ms"].value == pytest.approx(right, rel=0.05)
    assert "15 models" in found.profile.description


def test_it_goes_on_where_it_was(device: World, monkeypatch: pytest.MonkeyPatch) -> None:
    said = list[str]()

    def stopped(*words: Any, **how: Any) -> Session:
        if len(device.models) == 10:
            raise KeyboardInterrupt
        return device.time_on(*words, **how)

    with monkeypatch.context() as patched:
        patched.setattr(calibrating, "time_on", stopped)
        with pytest.raises(KeyboardInterrupt):
            calibrate(threads=1, budget=0.001, progress=said.append)
    assert (device.probes, len(device.models)) == (1, 10)
    assert calibrate(threads=1, budget=0.001, progress=said.append).errors.size == 15
    assert (device.probes, len(device.models)) == (1, 15), "what was timed is known"
    assert sum("probes" in line for line in said) == 1


def test_this_machines_becomes_the_target_local(device: World) -> None:
    found = calibrate(threads=1, budget=0.001)
    keep(found.profile, destination("local", [], None))
    assert load_target("local", 1).unit.peak == found.profile.unit.peak


def test_anothers_is_a_file_to_search_for(device: World, tmp_path: Path) -> None:
    found = calibrate(threads=1, budget=0.001)
    file = tmp_path / "board.yaml"
    assert destination("ssh://board", [], str(file)) == file
    keep(found.profile, file)
    assert load_target(file).unit.peak == found.profile.unit.peak
    assert load_target(file).name == "board"
    assert destination("ssh://pi@board:22", [], None) == Path("pi-board-22.yaml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("local", [], "x.json"), r"ends in \.yaml or \.yml"),
        (("local", [], "local.yaml"), "not called local"),
        (("local", [3], None), "give the profile of some cores a file with --out"),
    ],
)
def test_a_profile_that_could_not_be_used_is_refused(words: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        destination(*words)


def test_models_that_do_not_run_there_are_left_out(device: World, monkeypatch: pytest.MonkeyPatch) -> None:
    said, calls = list[str](), list[int]()

    def failing(*words: Any, **how: Any) -> Session:
        calls.append(1)
        if len(calls) in (2, 4):  # after the probes
            raise DeviceError("its memory is too small")
        return device.time_on(*words, **how)

    monkeypatch.setattr(calibrating, "time_on", failing)
    assert calibrate(threads=1, budget=0.001, progress=said.append).errors.size == 15
    assert said.count("left out: its memory is too small") == 2


def test_what_never_runs_is_an_error(device: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*words: Any, **how: Any) -> Session:
        if device.probes:
            raise DeviceError("its memory is too small")
        return device.time_on(*words, **how)

    monkeypatch.setattr(calibrating, "time_on", failing)
    with pytest.raises(DeviceError, match="its memory is too small"):
        calibrate(threads=1, budget=0.001)


def test_the_command_says_how_far_off_it_is(device: World, tmp_path: Path) -> None:
    file = tmp_path / "board.yaml"
    done = CliRunner().invoke(main, ["calibrate", "--threads", "1", "--budget", "10s", "--out", str(file)])
    assert done.exit_code == 0, done.output
    assert "by the probes alone" in done.stdout
    assert f"next: autolite search --target {file} --workload threads=1" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--budget", "30s"), "a budget of 30 s is too small to calibrate with: give 60 s at least"),
        (("--budget", "40trials"), "give a time, such as 5m"),
        (("--threads", "4000"), "threads=4000, but local has"),
        (("nonsense",), "'nonsense' is no device"),
    ],
)
def test_nonsense_is_told_in_a_sentence(words: tuple[str, ...], message: str) -> None:
    done = CliRunner().invoke(main, ["calibrate", *words])
    assert done.exit_code == 2
    assert message in done.output


# Models to calibrate by


def test_recipes_cover_families_formats_and_sizes() -> None:
    found = list(islice(recipes(1, (1e6, 1e9)), 300))
    assert {each.family for each in found} == set(FAMILIES)
    assert {each.attention for each in found} == {each.feed_forward for each in found} == set(FORMATS)
    assert all(1e6 <= each.flops <= 1e9 for each in found)
    assert min(each.hidden for each in found) < 100 < 500 < max(each.hidden for each in found)
    assert any(each.workload.batch > 1 for each in found)
    assert found[:50] == list(islice(recipes(1, (1e6, 1e9)), 50)), "the same every time"
    assert found[:50] != list(islice(recipes(1, (1e6, 1e9), seed=1), 50))


@pytest.mark.parametrize("family", [*FAMILIES, "roberta", "qwen2", "qwen3"])
def test_a_recipe_is_made_as_it_says(family: str, tmp_path: Path) -> None:
    recipe = Recipe(family, 2, 3, 16, 72, 600, "int8", "kmeans4", "int4", Workload(2, 7, 1))
    shape, artifact = made(recipe, tmp_path)
    (stack,) = shape.stacks
    assert (stack.hidden, len(stack.layers), shape.vocab) == (48, 2, 600)
    assert {(each.heads, each.ffn, each.attention_format, each.ffn_format) for each in stack.layers} == {
        (3, 72, "int8", "kmeans4")
    }
    assert artifact.inputs["input_ids"].shape == (2, 7)
    assert OnnxRuntime().load(artifact.files[0]).run(artifact.inputs)["logits"].shape[0] == 2


@pytest.mark.slow
def test_this_machine(own_cache: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(calibrating, "recipes", small)
    found = calibrate(threads=1, budget=60.0)
    (file,) = (tmp_path / "cache").rglob("models.jsonl")
    assert len([json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]) == found.errors.size >= 15
    assert np.abs(found.errors).mean() < 1
