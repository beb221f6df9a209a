"""Scores say what a unit's removal would do; checked against derivatives by finite differences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from autolite.families import family_of
from autolite.parts import layer_modules
from autolite.surgery import keep_neurons, share_layers
from autolite.techniques.base import Context
from autolite.techniques.importance import importance, magnitude, taylor, weights_digest

MakeContext = Callable[..., Context]


def mask_derivatives(model: Any, context: Context, part: str, channels: int, step: float = 1e-4) -> list[torch.Tensor]:
    """For each use of each layer's block: |d loss / d mask| of every unit, the mean over examples, by differences."""
    family = family_of(model.config)
    path = family.out if part == "heads" else family.ffn_out
    modules = [layer.get_submodule(path) for layer in layer_modules(model)]
    use = -1
    changed = (0, torch.ones(1))

    def scale(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        nonlocal use
        use += 1
        return (arguments[0] * changed[1],) if use == changed[0] else None

    hooks = [module.register_forward_pre_hook(scale) for module in dict.fromkeys(modules)]

    @torch.no_grad()
    def losses() -> torch.Tensor:
        nonlocal use
        found = []
        for ids, label in zip(context.train.input_ids, context.train.labels, strict=True):
            use = -1
            logits = model(input_ids=torch.from_numpy(ids)[None]).logits
            found.append(F.cross_entropy(logits, torch.tensor([label])))
        return torch.stack(found)

    scores = []
    for index, module in enumerate(modules):
        weight: Any = module.weight
        width = weight.shape[0 if family.transposed else 1]
        layer = []
        for unit in range(width // channels):
            both = []
            for sign in (1, -1):
                mask = torch.ones(width, dtype=torch.float64)
                mask[unit * channels : (unit + 1) * channels] += sign * step
                changed = (index, mask)
                both.append(losses())
            layer.append(((both[0] - both[1]) / (2 * step)).abs().mean())
        scores.append(torch.stack(layer))
    for hook in hooks:
        hook.remove()
    return scores


@pytest.mark.parametrize(
    ("family", "group", "step", "tolerance"),
    [
        ("bert", 8, 1e-4, 1e-6),
        ("gpt2", 8, 1e-4, 1e-6),
        ("llama", 16, 1e-2, 1e-3),
    ],  # RMSNorm is in float32, whatever the model
)
def test_taylor_scores_are_the_mask_derivatives(
    family: str, group: int, step: float, tolerance: float, make_context: MakeContext
) -> None:
    context = make_context(family, examples=5, layers=2)
    model: Any = context.teacher.model.double()
    scores = taylor(model, context.task, context.train, context.pad_id)
    for found, expected in zip(scores.heads, mask_derivatives(model, context, "heads", group, step), strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    keep_neurons(model, 0, range(8))
    keep_neurons(model, 1, range(8))
    scores = taylor(model, context.task, context.train, context.pad_id)
    for found, expected in zip(scores.neurons, mask_derivatives(model, context, "neurons", 1, step), strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", ["albert", "bert"])
def test_scores_of_a_shared_block_are_summed_over_its_uses(family: str, make_context: MakeContext) -> None:
    context = make_context(family, examples=4, layers=3)
    model: Any = context.teacher.model.double()
    if family == "bert":
        share_layers(model, attention=[0, 0, 0])
    expected = torch.stack(mask_derivatives(model, context, "heads", 8)).sum(0)
    for found in taylor(model, context.task, context.train, context.pad_id).heads:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_taylor_scores_of_a_language_model(make_context: MakeContext) -> None:
    context = make_context("qwen3", "language-modeling")
    scores = importance(context.teacher, "taylor", context)
    assert [tuple(s.shape) for s in scores.heads + scores.neurons] == [(2,)] * 3 + [(64,)] * 3
    assert all((s > 0).all() for s in scores.heads + scores.neurons)


def test_frozen_parameters_do_not_hinder(make_context: MakeContext) -> None:
    context = make_context()
    free = taylor(context.teacher.model, context.task, context.train, context.pad_id)
    context.teacher.model.requires_grad_(False)
    frozen = taylor(context.teacher.model, context.task, context.train, context.pad_id)
    assert all(torch.equal(a, b) for a, b in zip(free.heads + free.neurons, frozen.heads + frozen.neurons, strict=True))


def test_magnitude_is_the_norm_of_the_weights_that_go(make_context: MakeContext) -> None:
    model: Any = make_context("bert").teacher.model
    layer = model.bert.encoder.layer[1]
    own = layer.attention.self
    head = slice(8, 16)
    parts = [w[head] for m in (own.query, own.key, own.value) for w in (m.weight, m.bias)]
    parts.append(layer.attention.output.dense.weight[:, head])
    neuron = [layer.intermediate.dense.weight[5], layer.intermediate.dense.bias[5:6], layer.output.dense.weight[:, 5]]
    scores = magnitude(model)
    torch.testing.assert_close(scores.heads[1][1], torch.cat([p.flatten() for p in parts]).norm())
    torch.testing.assert_close(scores.neurons[1][5], torch.cat(neuron).norm())


def test_magnitude_of_gated_and_grouped_blocks(make_context: MakeContext) -> None:
    model: Any = make_context("llama").teacher.model
    layer = model.model.layers[0]
    own, mlp = layer.self_attn, layer.mlp
    parts = [own.q_proj.weight[16:32], own.k_proj.weight[8:16], own.v_proj.weight[8:16], own.o_proj.weight[:, 16:32]]
    neuron = [mlp.gate_proj.weight[3], mlp.up_proj.weight[3], mlp.down_proj.weight[:, 3]]
    scores = magnitude(model)
    torch.testing.assert_close(scores.heads[0][1], torch.cat([p.flatten() for p in parts]).norm())
    torch.testing.assert_close(scores.neurons[0][3], torch.cat(neuron).norm())


def test_equal_weights_are_scored_once(make_context: MakeContext) -> None:
    context = make_context()
    first = importance(context.teacher, "taylor", context)
    assert importance(context.teacher, "taylor", context) is first
    assert importance(context.teacher, "taylor", replace(context, seed=1)) is not first
    with torch.no_grad():
        next(context.teacher.model.parameters()).add_(1)
    assert importance(context.teacher, "taylor", context) is not first


def test_the_digest_sees_every_weight_and_its_name(make_context: MakeContext) -> None:
    model: Any = make_context().teacher.model
    digest = weights_digest(model)
    assert weights_digest(make_context().teacher.model) == digest
    with torch.no_grad():
        model.classifier.bias[0] += 1
    assert weights_digest(model) != digest
