"""Search spaces: the shipped ones are sound, and a bad one is refused with its place and the remedy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import optuna
import pytest

from autolite import contracts
from autolite.compress import resolve, shape_after
from autolite.errors import PlanError, SpaceError
from autolite.space import STAGES, Space, load_space, space_names
from autolite.testing import tiny_tokenizer
from tests.shapes import bert_shape, llama_shape


@pytest.mark.parametrize("name", [n for n in space_names() if n not in ("thorough", "default")])
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


def test_the_thorough_space_has_every_method_and_says_what_does_not_go_together() -> None:
    space = load_space("thorough")
    context = replace(contracts.tiny_context("bert", contracts.tiny_task("bert")), tokenizer=tiny_tokenizer())
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [*space.start, *(space.suggest(study.ask(), "confirm") for _ in range(40))]
    refused = 0
    for params in drawn:
        try:
            plan = resolve(space.plan(params, 5, seed=0), context)
            shape_after(plan, context.teacher.shape)
        except PlanError:
            refused += 1
    assert refused < len(drawn) / 2


def test_a_setting_of_a_later_stage_has_its_default_before_it() -> None:
    space = load_space("uniform")
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1)).ask()
    assert "distill.temperature" not in space.suggest(trial, "screen")
    plan = space.plan({}, 7, 0)
    distill = next(s.config for s in plan.steps if s.technique == "distill").model_dump()
    assert (distill["temperature"], distill["steps"]) == (4.0, 7)


def test_variants_change_number_formats_only() -> None:
    space = load_space("uniform")
    params = space.complete({"prune.heads": 0.5})
    variants = list(space.variants(params))
    assert len(variants) == 5 * 5 * 3 * 2 - 1
    assert all(v["prune.heads"] == 0.5 for v in variants)


def test_a_choice_that_goes_is_replaced_in_start_plans_and_defaults() -> None:
    space = load_space("quantize-only")
    gone = {"int4": "kmeans4", "bf16": "fp32"}
    less = space.without({"quantize.attention": gone, "quantize.embedding": {"int4": "int8"}})
    choices = {name: setting.choices or () for name, setting in less.settings.items()}
    before = {name: setting.choices or () for name, setting in space.settings.items()}
    assert choices["quantize.attention"] == tuple(c for c in before["quantize.attention"] if c not in gone)
    assert choices["quantize.embedding"] == ("fp32", "bf16", "int8")
    assert choices["quantize.ffn"] == before["quantize.ffn"]
    # The first two start plans differed only in what went; the third was all int4.
    assert len(less.start) == len(space.start) - 1
    assert less.start[0] == space.start[0]
    assert less.start[1] == {**space.start[2], "quantize.attention": "kmeans4", "quantize.embedding": "int8"}
    assert less.without({}) == less
    assert Space.model_validate(less.model_dump(mode="json")) == less


def test_a_default_that_goes_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "late.yaml"
    late = GOOD.replace(
        "prune:\n      heads: {low: 0.5, high: 1.0}",
        "quantize:\n      ffn: {choices: [int8, int7], stage: recover, default: int7}",
    )
    file.write_text(late, encoding="utf-8")
    space = load_space(str(file)).without({"quantize.ffn": {"int7": "int8"}})
    assert space.complete({}) == {"quantize.ffn": "int8"}
    assert space.settings["quantize.ffn"].stage == "recover"


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


def test_a_copy_with_other_steps_has_their_settings() -> None:
    space = load_space("default")
    assert {"prune.heads", "quantize.ffn"} <= space.settings.keys()
    fewer = space.model_copy(update={"steps": ({"quantize": {"ffn": space.settings["quantize.ffn"]}},), "start": ()})
    assert [name for name, _ in fewer.techniques] == ["quantize"]
    assert {name for name in fewer.settings if not name.startswith("frontier.")} == {"quantize.ffn"}
    assert fewer.layered.keys() == {"quantize.ffn"}
    assert "prune.heads" in space.settings
