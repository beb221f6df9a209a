"""Second-order pruning against least squares solved directly, and against trying every removal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autolite.architecture import shape_of
from autolite.families import FAMILIES
from autolite.parts import layers_of
from autolite.residual import keep_hidden
from autolite.surgery import clone, keep_layers, share_layers
from autolite.techniques.base import Context, Student
from autolite.techniques.elimination import Moments, eliminate, removal_scores
from autolite.techniques.importance import importance
from autolite.techniques.prune import Prune, PruneConfig
from autolite.techniques.reconstruct import bridge_gaps, cut_blocks, removal_errors
from autolite.techniques.streams import streams_of
from autolite.techniques.walk import Walk
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
    return x, y, weight, Moments.of(x, y).damped(weight), 0.01 * float((x.T @ x).diagonal().mean())


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
    order, losses = eliminate([moments], size, units, units - 1)
    left = list(range(units))

    def least(units_left: list[int]) -> float:
        rows = [u * size + i for u in units_left for i in range(size)] + [size * units]
        return error(x, y, weight, ridge, rows, directly(x, y, weight, ridge, rows))

    before = least(left)
    for unit, loss in zip(order, losses, strict=True):
        tried = {u: least([v for v in left if v != u]) for u in left}
        assert tried[unit] <= min(tried.values()) * (1 + 1e-9)
        assert (tried[unit] - before) / moments.energy == pytest.approx(loss, rel=1e-6, abs=1e-6)
        left.remove(unit)
        before = tried[unit]


@settings(max_examples=25, deadline=None)
@given(st.integers(3, 6), st.integers(2, 3), st.integers(0, 10**6))
def test_a_channel_goes_from_all_its_readers_at_their_common_cost(units: int, readers: int, seed: int) -> None:
    """Some readers have more outputs than inputs, and the last one no bias."""
    problems = [problem(40, units + (i < readers - 1), 3 * i + 1, seed + i) for i in range(readers)]
    order, losses = eliminate([moments for *_, moments, _ in problems], 1, units, units - 1)
    left = list(range(units))

    def least(channels: list[int]) -> float:
        total = 0.0
        for x, y, weight, moments, ridge in problems:
            rows = [*channels, *range(units, x.shape[1])]
            total += error(x, y, weight, ridge, rows, directly(x, y, weight, ridge, rows)) / moments.energy
        return total

    before = least(left)
    for unit, loss in zip(order, losses, strict=True):
        tried = {u: least([v for v in left if v != u]) for u in left}
        assert tried[unit] <= min(tried.values()) * (1 + 1e-9)
        assert tried[unit] - before == pytest.approx(loss, rel=1e-6, abs=1e-6)
        left.remove(unit)
        before = tried[unit]
    scores = removal_scores([moments for *_, moments, _ in problems], 1, units)
    assert scores.argsort().tolist() == [*order, *left]


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
    order, losses = eliminate([moments], 1, 160, 150)
    rows = sorted(set(range(160)) - set(order))
    least = error(x, y, weight, ridge, rows, directly(x, y, weight, ridge, rows))
    start = error(x, y, weight, ridge, list(range(160)), directly(x, y, weight, ridge, list(range(160))))
    assert start + sum(losses) * moments.energy == pytest.approx(least, rel=1e-8)


def test_silent_and_repeated_channels_do_no_harm() -> None:
    """G is singular: one channel is always zero, two are equal."""
    x, _, weight, _, _ = problem(50, 6, 4, 0)
    x[:, 1], x[:, 2] = 0, x[:, 3]
    moments = Moments.of(x, x @ weight).damped(weight)
    order, losses = eliminate([moments], 1, 6, 2)
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


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_the_original_does_is_run_once_for_all_of_its_cuts(
    family: str, make_tiny: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = make_tiny(family, layers=4)
    config = PruneConfig(heads=0.5, ffn=0.5, round_to=8, importance="wanda", depth=(0, 2), reconstruct=True)
    cut = PRUNE.apply(context.teacher, config, context).model
    streams = streams_of(context.teacher, context)
    assert streams is not None
    monkeypatch.setattr(Walk, "observe", None)
    assert streams_of(context.teacher, context) is streams
    monkeypatch.undo()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    again = replace(context, memory={})
    assert streams_of(context.teacher, again) is None, "there is no room for it"
    anew = PRUNE.apply(context.teacher, config, again).model
    for (name, ours), theirs in zip(cut.named_parameters(), anew.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5, msg=name)


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


class Seen:
    """What a module reads and gives at the tokens that are no padding, all calibration examples together."""

    def __init__(self, model: Any, paths: list[str], context: Context):
        self.read: dict[str, list[torch.Tensor]] = {path: [] for path in paths}
        self.given: dict[str, list[torch.Tensor]] = {path: [] for path in paths}
        mask = torch.empty(0)

        def look(path: str, inputs: torch.Tensor, output: Any) -> None:
            state = output if isinstance(output, torch.Tensor) else output[0]
            self.read[path].append(inputs[mask].double())
            self.given[path].append(state[mask].double())

        modules = [(path, model.get_submodule(path)) for path in paths]
        hooks = [m.register_forward_hook(lambda _, a, y, path=path: look(path, a[0], y)) for path, m in modules]
        for batch in context.task.batches(context.train, 32, context.pad_id):
            inputs = {name: torch.from_numpy(array) for name, array in batch.inputs.items()}
            mask = inputs.get("attention_mask", torch.ones(len(batch.labels), 17)).bool()  # images: 16 patches, a class
            with torch.no_grad():
                model(**inputs)
        for hook in hooks:
            hook.remove()

    def of(self, path: str) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat(self.read[path]), torch.cat(self.given[path])


def best_map(x: torch.Tensor, y: torch.Tensor, module: Any) -> torch.Tensor:
    """[k, n] of least error, the bias as its last row, with the ridge towards the weights of `module`."""
    weight = module.weight.detach().double()
    weight = weight if module.__class__.__name__ == "Conv1D" else weight.T
    if module.bias is not None:
        x = torch.cat((x, torch.ones(len(x), 1, dtype=x.dtype)), 1)
        weight = torch.cat((weight, module.bias.detach().double()[None]))
    return directly(x, y, weight, 0.01 * float(x.square().sum(0).mean()), list(range(x.shape[1])))


def found_map(module: Any) -> torch.Tensor:
    weight = module.weight.detach().double()
    weight = weight if module.__class__.__name__ == "Conv1D" else weight.T
    return weight if module.bias is None else torch.cat((weight, module.bias.detach().double()[None]))


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"albert"}))
def test_readers_are_fitted_to_what_they_gave_in_the_original(name: str, make_tiny: MakeContext) -> None:
    """All that runs before a reader has been fitted before it, so that it reads in the end what it was fitted on."""
    context, family = make_tiny(name), FAMILIES[name]
    original: Any = context.teacher.model
    kept = [i for i in range(32) if i % 4]
    cut: Any = clone(original)
    keep_hidden(cut, kept)
    fitted: Any = clone(cut)
    cut_blocks(fitted, original, kept, context.teacher.shape.stacks[0].layers, None, context)
    layers = f"{original.base_model_prefix}.{family.layers}"
    paths = [family.query, family.key, family.value, family.fused_qkv, family.ffn_in, family.ffn_gate]
    paths = [f"{layers}.{index}.{path}" for index in range(3) for path in paths if path]
    ours, theirs = Seen(fitted, paths, context), Seen(original, paths, context)
    for path in paths:
        expected = best_map(ours.of(path)[0], theirs.of(path)[1], cut.get_submodule(path))
        torch.testing.assert_close(found_map(fitted.get_submodule(path)), expected, atol=2e-4, rtol=2e-3)


def test_the_head_is_fitted_at_the_position_that_it_reads(make_tiny: MakeContext) -> None:
    context = make_tiny("bert")
    kept, outputs = [i for i in range(32) if i % 4], list(range(24))
    cut: Any = clone(context.teacher.model)
    keep_hidden(cut, kept, outputs)
    fitted: Any = clone(cut)
    cut_blocks(fitted, context.teacher.model, kept, context.teacher.shape.stacks[0].layers, None, context, outputs)
    states = []
    for model in (fitted, context.teacher.model):
        with torch.no_grad():
            texts = [torch.from_numpy(ids)[None] for ids in context.train.input_ids]
            found = [model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, 0] for ids in texts]
        states.append(torch.stack(found))
    with torch.no_grad():
        y = context.teacher.model.bert.pooler.dense(states[1])[:, outputs]
    expected = best_map(states[0].double(), y.double(), cut.bert.pooler.dense)
    torch.testing.assert_close(found_map(fitted.bert.pooler.dense), expected, atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("stay", [(0, 1, 3), (0, 2), (0, 1)])
def test_a_gap_is_bridged_by_the_projection_before_it(name: str, stay: tuple[int, ...], make_tiny: MakeContext) -> None:
    """To the stream that the original has behind the layers removed."""
    context, family = make_tiny(name, layers=4), FAMILIES[name]
    original: Any = context.teacher.model
    shallow: Any = clone(original)
    keep_layers(shallow, stay)
    bridged: Any = clone(shallow)
    bridge_gaps(bridged, original, context)
    layers, index = f"{original.base_model_prefix}.{family.layers}", len(stay) - 1 if stay[-1] != 3 else len(stay) - 2
    path, norm = (f"{layers}.{index}.{part}" for part in (family.ffn_out, family.ffn_norm))
    end = stay[index + 1] - 1 if index + 1 < len(stay) else 3
    stream = Seen(bridged, [norm], context).of(norm)[0]
    target = Seen(original, [f"{layers}.{end}"], context).of(f"{layers}.{end}")[1]
    x, _ = Seen(bridged, [path], context).of(path)
    expected = best_map(x, target - stream, shallow.get_submodule(path))
    torch.testing.assert_close(found_map(bridged.get_submodule(path)), expected, atol=2e-4, rtol=2e-3)


def test_after_a_gap_the_stream_comes_out_of_the_last_norm_removed(make_tiny: MakeContext) -> None:
    context = make_tiny("bert", layers=4)
    with torch.no_grad():
        for layer in layers_of(context.teacher.model):
            layer.ffn_norm.weight.add_(layer.index)
    found = PRUNE.apply(context.teacher, PruneConfig(depth=(1, 3), reconstruct=True), context)
    for ours, theirs in ((0, 2), (1, 3)):
        expected = layers_of(context.teacher.model)[theirs].ffn_norm.weight
        assert torch.equal(layers_of(found.model)[ours].ffn_norm.weight, expected)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_is_left_of_removed_layers_and_channels_is_fitted(family: str, make_tiny: MakeContext) -> None:
    context = make_tiny(family, layers=4)
    cut, fitted = (
        hidden_error(PRUNE.apply(context.teacher, PruneConfig(depth=(0, 2), reconstruct=fits), context).model, context)
        for fits in (False, True)
    )
    assert fitted < cut
    settings = {"hidden": 0.75, "round_to": 8, "importance": "second-order", "depth": (1, 3)}
    narrow = PRUNE.apply(context.teacher, PruneConfig(**settings), context)
    assert shape_of(narrow.model) == narrow.shape


def test_scores_give_the_order_of_removal_back(make_tiny: MakeContext) -> None:
    context = make_tiny("bert")
    scores = importance(context.teacher, "second-order", context)
    again = removal_errors(context.teacher.model, replace(context, memory={}))
    assert all(torch.equal(a, b) for a, b in zip(scores.neurons, again.neurons, strict=True))
    for score in (*scores.heads, *scores.neurons):
        assert score.unique().numel() == len(score)
        assert (score > 0).all()
