"""Second-order pruning against least squares solved directly, and against trying every removal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autolite.architecture import shape_of
from autolite.families import FAMILIES
from autolite.parts import layers_of
from autolite.residual import keep_hidden
from autolite.surgery import clone, share_layers
from autolite.techniques.base import Context, Student
from autolite.techniques.importance import importance
from autolite.techniques.prune import Prune, PruneConfig
from autolite.techniques.reconstruct import Moments, cut_blocks, eliminate, removal_errors
from autolite.testing import tiny_inputs

MakeContext = Callable[..., Context]
PRUNE = Prune()


def problem(tokens: int, k: int, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Moments, float]:
    """Correlated inputs, outputs that W0 nearly explains, W0, their moments, and the ridge."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(k, k, generator=random, dtype=torch.float64)
    x = torch.randn(tokens, k, generator=random, dtype=torch.float64) @ mixing
    weight = torch.randn(k, n, generator=random, dtype=torch.float64)
    y = x @ weight + 0.3 * torch.randn(tokens, n, generator=random, dtype=torch.float64)
    return x, y, weight, Moments.of(x, y, weight), 0.01 * float((x.T @ x).diagonal().mean())


def directly(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, ridge: float, rows: list[int]) -> torch.Tensor:
    """The weights of the rows that are left, by a QR of the inputs with the ridge as further examples."""
    a = torch.cat((x[:, rows], ridge**0.5 * torch.eye(x.shape[1], dtype=torch.float64)[:, rows]))
    return torch.linalg.lstsq(a, torch.cat((y, ridge**0.5 * weight))).solution


def error(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, ridge: float, rows: list[int], fit: torch.Tensor
) -> float:
    whole = torch.zeros_like(weight)
    whole[rows] = fit
    return float((y - x @ whole).square().sum() + ridge * (whole - weight).square().sum())


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(3, 6), st.integers(1, 4), st.integers(0, 10**6))
def test_every_removal_is_the_cheapest_and_costs_what_it_says(size: int, units: int, n: int, seed: int) -> None:
    x, y, weight, moments, ridge = problem(40, size * units + 1, n, seed)  # the last row stands for a bias
    order, losses = eliminate(moments, size, units, units - 1)
    left = list(range(units))

    def least(units_left: list[int]) -> float:
        rows = [u * size + i for u in units_left for i in range(size)] + [size * units]
        return error(x, y, weight, ridge, rows, directly(x, y, weight, ridge, rows))

    before = least(left)
    for unit, loss in zip(order, losses, strict=True):
        tried = {u: least([v for v in left if v != u]) for u in left}
        assert tried[unit] <= min(tried.values()) * (1 + 1e-9)
        assert tried[unit] - before == pytest.approx(loss, rel=1e-6, abs=1e-6 * moments.energy)
        left.remove(unit)
        before = tried[unit]


@given(st.integers(0, 10**6))
def test_the_fit_is_the_least_squares_solution(seed: int) -> None:
    x, y, weight, moments, ridge = problem(30, 8, 3, seed)
    rows = [0, 2, 3, 7]
    expected = directly(x, y, weight, ridge, rows)
    found = moments.fit(torch.tensor(rows))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    whole = torch.zeros_like(weight)
    whole[rows] = found
    assert moments.error(whole) == pytest.approx(error(x, y, weight, ridge, rows, expected), rel=1e-9)


def test_more_eliminations_than_are_collected_are_exact() -> None:
    x, y, weight, moments, ridge = problem(400, 160, 5, 0)
    order, losses = eliminate(moments, 1, 160, 150)
    rows = sorted(set(range(160)) - set(order))
    least = error(x, y, weight, ridge, rows, directly(x, y, weight, ridge, rows))
    start = error(x, y, weight, ridge, list(range(160)), directly(x, y, weight, ridge, list(range(160))))
    assert start + sum(losses) == pytest.approx(least, rel=1e-8)


def test_silent_and_repeated_channels_do_no_harm() -> None:
    """G is singular: one channel is always zero, two are equal."""
    x, _, weight, _, _ = problem(50, 6, 4, 0)
    x[:, 1], x[:, 2] = 0, x[:, 3]
    moments = Moments.of(x, x @ weight, weight)
    order, losses = eliminate(moments, 1, 6, 2)
    assert set(order) <= {1, 2, 3}
    assert torch.isfinite(torch.tensor(losses)).all()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_block_that_keeps_all_its_units_is_left_as_it_is(family: str, make_tiny: MakeContext) -> None:
    context = make_tiny(family)
    model = clone(context.teacher.model)
    cut_blocks(model, context.teacher.model, None, context.teacher.shape.stacks[0].layers, None, context)
    inputs = tiny_inputs(model)
    with torch.no_grad():
        expected, found = context.teacher.model(**inputs).logits, model(**inputs).logits
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_fitting_brings_the_hidden_states_back(family: str, make_tiny: MakeContext) -> None:
    """On the calibration examples, which it is fitted to, whatever units were chosen."""
    context = make_tiny(family)
    errors = {}
    for name, more in (("cut", {}), ("fitted", {"reconstruct": True}), ("second", {"importance": "second-order"})):
        config = PruneConfig(**{"heads": 0.5, "ffn": 0.5, "round_to": 8, "importance": "magnitude", **more})
        errors[name] = hidden_error(PRUNE.apply(context.teacher, config, context).model, context)
    assert errors["fitted"] < errors["cut"]
    assert errors["second"] < errors["cut"]


@torch.no_grad()
def hidden_error(model: torch.nn.Module, context: Context) -> float:
    total = 0.0
    for batch in context.task.batches(context.train, 8, context.pad_id):
        inputs = {name: torch.from_numpy(array) for name, array in batch.inputs.items()}
        states = [m(**inputs, output_hidden_states=True).hidden_states[-1] for m in (model, context.teacher.model)]
        mask = inputs.get("attention_mask", torch.ones(states[0].shape[:2])).bool()
        total += float((states[0] - states[1])[mask].square().sum())
    return total


def test_blocks_that_layers_share_are_fitted_to_all_their_uses(make_tiny: MakeContext) -> None:
    context = make_tiny("bert")
    model = clone(context.teacher.model)
    share_layers(model, attention=[0, 1, 0], feed_forward=[0, 0, 0])
    student = Student(model, shape_of(model))
    pruned = PRUNE.apply(student, PruneConfig(heads=0.5, ffn=0.5, round_to=8, importance="second-order"), context)
    assert pruned.shape == shape_of(pruned.model)
    assert [(x.attention, x.feed_forward) for x in pruned.shape.stacks[0].layers] == [(0, 0), (1, 0), (0, 0)]


def test_fewer_hidden_channels_are_fitted_to_those_of_the_original(make_tiny: MakeContext) -> None:
    context = make_tiny("gpt2")
    kept = [i for i in range(32) if i % 4]
    cut = clone(context.teacher.model)
    keep_hidden(cut, kept)
    fitted = clone(cut)
    cut_blocks(fitted, context.teacher.model, kept, context.teacher.shape.stacks[0].layers, None, context)
    assert shape_of(fitted) == shape_of(cut)
    before, after = layers_of(cut)[0].out, layers_of(fitted)[0].out
    assert not torch.equal(before.weight, after.weight)


def test_scores_give_the_order_of_removal_back(make_tiny: MakeContext) -> None:
    context = make_tiny("bert")
    scores = importance(context.teacher, "second-order", context)
    again = removal_errors(context.teacher.model, replace(context, memory={}))
    assert all(torch.equal(a, b) for a, b in zip(scores.neurons, again.neurons, strict=True))
    for score in (*scores.heads, *scores.neurons):
        assert score.unique().numel() == len(score)
        assert (score > 0).all()
