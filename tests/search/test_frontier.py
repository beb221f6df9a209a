"""Levels by layer: what is chosen is what trying all combinations would choose; estimates are kept between runs."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from autolite.architecture import ModelShape, shape_of
from autolite.compress import resolve, shape_after
from autolite.errors import SpaceError
from autolite.search.frontier import Frontier, first_plans
from autolite.search.sensitivity import damages
from autolite.search.studies import read_trials
from autolite.space import BY_LAYER, Params, Scalar, Space, load_space
from autolite.surgery import clone, keep_layers
from autolite.techniques.base import Student
from autolite.techniques.importance import importance
from autolite.techniques.prune import Prune
from tests.conftest import RunSearch
from tests.search.layers import SPACE, context_of, price

pytestmark = pytest.mark.usefixtures("own_cache")


def shape_of_plan(frontier: Frontier, params: Params) -> ModelShape:
    plan = frontier.space.plan(params, 1, 0, frontier.levels(params))
    return shape_after(resolve(plan, frontier.context), frontier.context.teacher.shape)


def test_what_is_chosen_has_the_least_estimated_loss_and_price_of_all_combinations(space: Space) -> None:
    frontier = Frontier(space, context_of(), price)
    params = space.complete({"frontier.latency": 0.02, "frontier.size": 0.05, "frontier.prune.ffn": 3.0})
    chosen = frontier.levels(params)
    damage, teacher = damages(space, frontier.context), price([frontier.context.teacher.shape])[0]
    # Costs of single levels, found with whole models in which one layer has it, of each pair of settings of a part.
    mildest = {n: s.levels[int(damage[n].sum(1).argmin())] for n, s in space.layered.items()}

    def cost(levels: dict[str, tuple[Scalar, ...]]) -> float:
        everywhere = {n: (v, v, v) for n, v in mildest.items()}
        plan = space.plan(params, 1, 0, {**everywhere, **levels})
        shape = shape_after(resolve(plan, frontier.context), frontier.context.teacher.shape)
        loss = 0.0
        for name, row in levels.items():
            indices = [space.layered[name].levels.index(v) for v in row]
            loss += params[f"frontier.{name}"] * float(damage[name][indices, range(3)].sum())
        latency, size = (price([shape])[0][i] / teacher[i] for i in range(2))
        return float(loss + params["frontier.latency"] * latency + params["frontier.size"] * size)

    for names in (("prune.heads", "quantize.attention"), ("prune.ffn", "quantize.ffn")):
        for layer in range(3):
            options = list(itertools.product(*(space.layered[n].levels for n in names)))
            costs = []
            for option in options:
                rows = {
                    n: tuple(v if i == layer else mildest[n] for i in range(3))
                    for n, v in zip(names, option, strict=True)
                }
                costs.append(cost(rows))
            best = options[int(np.argmin(costs))]
            assert tuple(chosen[n][layer] for n in names) == best


def test_without_a_price_nothing_is_pruned_and_at_the_highest_all_is(space: Space) -> None:
    frontier = Frontier(space, context_of(), price)
    nothing = {"frontier.latency": 1e-4, "frontier.size": 1e-4, "frontier.prune.heads": 8.0}
    assert frontier.levels(nothing)["prune.heads"] == (1.0, 1.0, 1.0)
    cheapest = space.cheapest()
    layered = cheapest | dict.fromkeys(space.layered, BY_LAYER)
    smallest, found = (shape_of_plan(frontier, params).stacks[0].layers for params in (cheapest, layered))
    assert [(x.heads, x.ffn) for x in found] == [(x.heads, x.ffn) for x in smallest]


def test_a_setting_that_is_the_same_in_all_layers_is_left_alone(space: Space) -> None:
    frontier = Frontier(space, context_of(), price)
    found = frontier.levels({"prune.heads": 0.5, "quantize.attention": "int4"})
    assert set(found) == {"prune.ffn", "quantize.ffn"}
    everything = {"prune.heads": 1.0, "prune.ffn": 1.0, "quantize.attention": "int8", "quantize.ffn": "int8"}
    assert frontier.levels(everything) == {}
    assert frontier.sweep(everything, 5) == [space.complete(everything)]


@pytest.mark.parametrize("family", ["bert", "albert", "llama", "vit"])
def test_layers_that_share_a_block_have_one_level_and_every_plan_can_be_made(family: str, space: Space) -> None:
    frontier = Frontier(space, context_of(family), price)
    for params in ({}, {"share.part": "ffn"}, {"prune.depth": 0.67}, {"share.part": "ffn", "prune.depth": 0.67}):
        for one in frontier.sweep(params, 4):
            layers = shape_of_plan(frontier, one).stacks[0].layers
            levels = frontier.levels(one)
            assert {len(row) for row in levels.values()} == {len(layers)}
            for name, row in levels.items():
                part = "attention" if name in ("prune.heads", "quantize.attention") else "feed_forward"
                for number in {getattr(layer, part) for layer in layers}:
                    assert len({v for v, layer in zip(row, layers, strict=True) if getattr(layer, part) == number}) == 1


def test_a_sweep_goes_from_the_slightest_to_the_strongest_cut(space: Space) -> None:
    frontier = Frontier(space, context_of(), price)
    found = frontier.sweep({}, 12)
    assert len(found) == len({str(frontier.levels(each)) for each in found})
    sizes = sorted(price([shape_of_plan(frontier, each)])[0][1] for each in found)
    assert sizes[-1] > 1.1 * sizes[0]
    first = first_plans(frontier, 6)
    assert first[0] == dict(space.start[0])
    assert len(first) == 6


def test_damage_of_pruning_is_half_of_the_fisher_information_of_what_goes() -> None:
    context = context_of()
    scores = importance(context.teacher, "fisher", context)
    ((head_damage,),) = (zip(Prune().damage("heads", [0.5], context)),)
    kept = len(scores.heads[0]) // 2
    wanted = [float(torch.sort(each).values[: len(each) - kept].sum()) / 2 for each in scores.heads]
    assert list(head_damage[0]) == pytest.approx(wanted)
    (none,) = Prune().damage("ffn", [1.0], context)
    assert none == [0.0] * 3


def test_a_teacher_that_lost_layers_has_estimates_and_levels_for_those_it_has(space: Space) -> None:
    whole = context_of()
    model = clone(whole.teacher.model)
    keep_layers(model, [0, 2])
    context = replace(whole, teacher=Student(model, shape_of(model)), memory={})
    assert context.teacher.shape.source_layers == ((0, 2),)
    assert all(found.shape[1] == 2 for found in damages(space, context).values())
    assert {len(row) for row in Frontier(space, context, price).levels({}).values()} == {2}


def test_estimates_are_made_once_and_read_by_later_runs(space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    first = damages(space, context_of())
    monkeypatch.setattr(Prune, "damage", lambda *_: pytest.fail("made again"))
    again = damages(space, context_of())
    assert all(np.array_equal(first[name], again[name]) for name in first)


def test_a_setting_that_cannot_differ_between_layers_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(SPACE.replace("part: [none, ffn]", "part: [by-layer, none]"), encoding="utf-8")
    with pytest.raises(SpaceError, match=r"steps\.share\.part: cannot differ between layers; of share's .*: none"):
        load_space(str(file))


@pytest.mark.parametrize("sampler", ["additive", pytest.param("tpe", marks=pytest.mark.slow)])
def test_a_search_tries_levels_by_layer_and_ends_with_a_front(
    sampler: str, run_search: RunSearch, space_file: Path, tmp_path: Path
) -> None:
    result = run_search(space=str(space_file), budget="14trials", sampler=sampler, out=tmp_path / "run")
    assert len(result.front)
    assert {candidate.stage for candidate in result.front} == {"confirm"}
    trials = read_trials(f"sqlite:///{result.path / 'study.db'}", "run")
    assert [len(each) for each in trials.values()] == [8, 3, 3]
    assert len({t.user_attrs["effort"] for t in trials["recover"]}) == 2, "two rungs"
    configs = [step["config"] for t in trials["screen"] for step in t.user_attrs["plan"]["steps"]]
    assert any(isinstance(config.get("ffn"), list) and len(set(config["ffn"])) > 1 for config in configs)
    plans = {t.user_attrs["recipe"] for t in trials["recover"]}
    assert len(plans) < len(trials["recover"]), "the second rung trains what the first one did, for longer"
