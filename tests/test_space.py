"""Search spaces: the shipped ones are sound, and a bad one is refused with its place and the remedy."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest

from autolite.compress import shape_after
from autolite.errors import SpaceError
from autolite.space import STAGES, load_space, space_names
from tests.shapes import bert_shape, llama_shape


@pytest.mark.parametrize("name", space_names())
def test_every_plan_of_a_shipped_space_can_be_applied(name: str) -> None:
    space = load_space(name)
    shape = llama_shape() if name == "decoder" else bert_shape()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for stage in STAGES:
        for _ in range(60):
            params = space.suggest(study.ask(), stage)
            plan = space.plan(params, 5, seed=0)
            shape_after(plan, shape)
    assert space.start
    for start in space.start:
        shape_after(space.plan(start, 5, 0), shape)


def test_a_setting_of_a_later_stage_has_its_default_before_it() -> None:
    space = load_space("default")
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1)).ask()
    assert "distill.temperature" not in space.suggest(trial, "screen")
    plan = space.plan({}, 7, 0)
    distill = next(s.config for s in plan.steps if s.technique == "distill").model_dump()
    assert (distill["temperature"], distill["steps"]) == (4.0, 7)


def test_variants_change_number_formats_only() -> None:
    space = load_space("default")
    params = space.complete({"prune.heads": 0.5})
    variants = list(space.variants(params))
    assert len(variants) == 4 * 4 * 3 * 2 - 1
    assert all(v["prune.heads"] == 0.5 for v in variants)


GOOD = """
name: mine
description: d
steps:
  - prune:
      heads: {low: 0.5, high: 1.0}
stages:
  screen: {trials: 2, effort: 0}
  recover: {trials: 2, effort: 0}
  confirm: {trials: 2, effort: 0}
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("prune:", "prunes:", "did you mean 'prune'"),
        ("heads:", "haeds:", "did you mean 'heads'"),
        ("low: 0.5, high: 1.0", "low: 1.0, high: 0.5", "low <= high must hold"),
        ("low: 0.5, high: 1.0", "low: 0.5, high: 3.0", "prune.heads"),
        ("{low: 0.5, high: 1.0}", "[]", "empty"),
        ("low: 0.5, high: 1.0", "low: 0.5, high: 1.0, stage: recover", "needs a default"),
        ("  recover: {trials: 2, effort: 0}\n", "", "'recover' is missing"),
        ("name: mine", "name: [", "not YAML"),
        (GOOD, "just text", "a mapping is needed"),
        ("stages:", "start: [{prune.head: 1.0}]\nstages:", "did you mean 'prune.heads'"),
        ("stages:", "start: [{prune.heads: 0.1}]\nstages:", "not among"),
    ],
)
def test_a_bad_space_is_refused_with_the_place(tmp_path: Path, old: str, new: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(GOOD, encoding="utf-8")
    load_space(str(file))
    assert old in GOOD
    file.write_text(GOOD.replace(old, new), encoding="utf-8")
    with pytest.raises(SpaceError, match=message):
        load_space(str(file))


def test_an_unknown_space_is_named_with_the_nearest() -> None:
    with pytest.raises(SpaceError, match="did you mean 'quick'"):
        load_space("quik")
