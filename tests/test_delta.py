"""Low-rank differences against numpy's decomposition, and against copies whose weights are written out."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from autolite.architecture import LayerShape, shape_of
from autolite.delta import Delta
from autolite.parts import layers_of, matrices_of
from autolite.surgery import add_deltas, clone, keep_heads, keep_layers, keep_neurons, share_layers
from autolite.testing import tiny_model
from tests.relaxed import FAMILIES, logits, relaxed, written_out


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 12), st.integers(2, 12), st.integers(0, 2**31 - 1), st.data())
def test_a_fit_errs_by_the_singular_values_left_out(out: int, inner: int, seed: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(out, inner)))
    difference = torch.randn(out, inner, generator=torch.Generator().manual_seed(seed))
    delta = Delta(nn.Linear(inner, out), rank)
    delta.fit(difference)
    error = np.square((difference - delta.up.weight @ delta.down.weight).detach().numpy()).sum()
    values = np.linalg.svd(difference.double().numpy(), compute_uv=False)
    assert error == pytest.approx(np.square(values[rank:]).sum(), abs=1e-4)
    torch.testing.assert_close(delta.down.weight @ delta.down.weight.T, torch.eye(rank), atol=1e-5, rtol=0)


@pytest.mark.parametrize("base", [nn.Linear(6, 5), Conv1D(5, 6)])
def test_it_computes_the_shared_product_and_its_own(base: Any) -> None:
    delta, x = Delta(base, 2), torch.randn(3, 4, 6)
    assert torch.equal(delta(x), base(x))  # it starts at zero
    delta.fit(difference := torch.randn(5, 2) @ torch.randn(2, 6), bias := torch.randn(5))
    torch.testing.assert_close(delta(x), base(x) + x @ difference.T + bias, atol=1e-5, rtol=1e-5)
    assert delta.weight is base.weight
    assert delta.bias is base.bias


def test_a_difference_of_nothing_can_still_be_trained() -> None:
    delta = Delta(nn.Linear(6, 5), 2)
    delta.fit(torch.zeros(5, 6))
    torch.testing.assert_close(delta.down.weight @ delta.down.weight.T, torch.eye(2))
    assert delta.down.weight[0].abs().min() > 0.1  # whatever inputs are pruned, some are left
    torch.autograd.backward(delta(torch.randn(3, 6)).square().sum())
    assert delta.up.weight.grad is not None
    assert delta.up.weight.grad.abs().min() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_one_with_the_sums_written_out(family: str) -> None:
    plain, shared = relaxed(family)
    torch.testing.assert_close(logits(shared), logits(written_out(shared, plain)), atol=1e-5, rtol=1e-5)
    shape = shape_of(shared)
    assert [x.attention for x in shape.stacks[0].layers] == [0, 0, 2, 2]
    assert {(x.attention_rank, x.ffn_rank) for x in shape.stacks[0].layers} == {(3, 2)}


@pytest.mark.parametrize("family", FAMILIES)
def test_cutting_equals_masking_the_sums_written_out(family: str) -> None:
    plain, shared = relaxed(family)
    masked = written_out(shared, plain)
    for index, layer in enumerate(layers_of(masked)):
        width = layer.head_dim * layer.heads // layer.kv_heads
        with torch.no_grad():
            if index < 2:  # one set of attention
                layer.out.weight[:, :width] = 0
            if index % 2:  # one set of feed-forward blocks
                layer.ffn_out.weight[:, 7:] = 0
    keep_heads(shared, 1, range(1, layers_of(shared)[0].kv_heads))
    keep_neurons(shared, 3, range(7))
    torch.testing.assert_close(logits(shared), logits(masked), atol=1e-5, rtol=1e-5)
    found = shape_of(shared).stacks[0].layers
    assert [x.ffn for x in found] == [64, 7, 64, 7]
    assert found[0].kv_heads == found[1].kv_heads == found[2].kv_heads - 1
    for layer in layers_of(shared):
        for matrix in (*layer.attention_matrices, *layer.ffn_matrices):
            assert matrix.delta is not None
            down, up = matrix.delta
            assert (up.weight @ down.weight).shape == matrix.weight.shape


@pytest.mark.parametrize("family", FAMILIES)
def test_clones_and_dropped_layers_keep_each_their_own(family: str) -> None:
    plain, shared = relaxed(family)
    twin = clone(shared)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in shared.parameters()}
    assert shape_of(twin) == shape_of(shared)
    reference = written_out(shared, plain)
    for model in (twin, reference):
        keep_layers(model, [1, 2, 3])
    torch.testing.assert_close(logits(twin), logits(reference), atol=1e-5, rtol=1e-5)
    stored = {name for name in twin.state_dict() if ".base." in name}
    assert stored == {name for name, _ in twin.named_parameters() if ".base." in name}  # each under one name


def test_layers_that_share_more_keep_their_differences() -> None:
    _, shared = relaxed("bert")
    before, own = logits(shared), [layer.out.delta for layer in layers_of(shared)]
    share_layers(shared, [0, 0, 2, 2], [0, 1, 0, 1])
    assert torch.equal(logits(shared), before)
    share_layers(shared, [0, 0, 0, 0])
    for layer, delta in zip(layers_of(shared), own, strict=True):
        assert layer.out.delta is not None
        assert delta is not None
        assert layer.out.delta[1].weight is delta[1].weight
    assert len({layer.out.key for layer in layers_of(shared)}) == 1


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_factors_are_matrices_of_their_block(family: str) -> None:
    _, shared = relaxed(family)
    found = matrices_of(shared)
    for group in ("attention", "ffn"):
        factors = [m for m in found[group].values() if m.factor]
        shared_ones = [m for m in found[group].values() if not m.factor]
        assert len(factors) == 4 * len(shared_ones)  # two layers for each that is stored, two factors for each layer
    every = {key for group in found.values() for key in group}
    assert every <= set(shared.state_dict())


def test_layers_without_a_rank_stay_as_they_are() -> None:
    model = tiny_model("bert")
    before = logits(model)
    layers = shape_of(model).stacks[0].layers
    add_deltas(model, (layers[0], LayerShape(4, 4, 8, 64, 1, 1, ffn_rank=2), layers[2]))
    assert [x.ffn_rank for x in shape_of(model).stacks[0].layers] == [0, 2, 0]
    assert torch.equal(logits(model), before)
