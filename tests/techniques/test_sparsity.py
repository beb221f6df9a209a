"""Zeros: where the pattern puts them, that they stay, and where they are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autolite.errors import PlanError
from autolite.formats import FORMATS, decode, encode
from autolite.parts import matrices_of
from autolite.techniques.base import Context
from autolite.techniques.distill import Distill, DistillConfig
from autolite.techniques.prune import Prune, PruneConfig
from autolite.techniques.quantize import Quantize, QuantizeConfig
from autolite.techniques.sparsity import kept, parse

MakeContext = Callable[..., Context]
PRUNE = Prune()


def layer_matrices(model: Any) -> dict[str, Any]:
    groups = matrices_of(model)
    return {key: m.weight for name in ("attention", "ffn") for key, m in groups[name].items()}


@given(st.integers(1, 7), st.integers(2, 8), st.integers(1, 5), st.integers(0, 10**6))
def test_of_m_inputs_the_n_best_stay(n: int, m: int, groups: int, seed: int) -> None:
    n = min(n, m - 1)
    scores = torch.rand(3, m * groups, generator=torch.Generator().manual_seed(seed))
    mask = kept(scores, f"{n}:{m}").reshape(3, groups, m)
    assert (mask.sum(-1) == n).all()
    split = scores.reshape(3, groups, m)
    assert (split.masked_fill(~mask, 2).amin(-1) >= split.masked_fill(mask, -1).amax(-1)).all()


@given(st.integers(1, 99), st.integers(2, 40))
def test_a_part_of_each_row_goes(percent: int, width: int) -> None:
    mask = kept(torch.rand(3, width), f"{percent}%")
    assert (~mask).sum(-1).tolist() == [round(percent / 100 * width)] * 3


@pytest.mark.parametrize("pattern", ["2", "2:2", "0:4", "100%", "0%", "half", "2:4 "])
def test_what_is_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="no pattern of zeros"):
        parse(pattern)


def test_wanda_weighs_by_what_the_weights_multiply(make_tiny: MakeContext) -> None:
    """An input that is always zero loses its weights, however large they are."""
    context = make_tiny("bert")
    model: Any = context.teacher.model
    layer = model.bert.encoder.layer[0]
    with torch.no_grad():
        layer.intermediate.dense.weight[4].zero_()
        layer.intermediate.dense.bias[4].zero_()  # gelu(0) = 0
        layer.output.dense.weight[:, 4] = 100
    for mask, there in (("wanda", False), ("magnitude", True)):
        student = PRUNE.apply(context.teacher, PruneConfig(sparsity="2:4", mask=mask), context)
        assert bool(student.model.bert.encoder.layer[0].output.dense.weight[:, 4].any()) is there  # type: ignore[union-attr,index]


@pytest.mark.parametrize("family", ["bert", "albert", "gpt2", "qwen3"])
def test_training_and_formats_keep_the_zeros(family: str, make_tiny: MakeContext) -> None:
    context = make_tiny(family)
    sparse = PRUNE.apply(context.teacher, PruneConfig(heads=0.5, ffn=0.5, round_to=8, sparsity="2:4"), context)
    trained = Distill().apply(sparse, DistillConfig(steps=3, batch_size=8, hidden=0), context)
    before, after = layer_matrices(sparse.model), layer_matrices(trained.model)
    for key, weight in after.items():
        assert not torch.equal(weight, before[key])
        assert (weight.reshape(len(weight), -1, 4) != 0).sum(-1).max() <= 2
    assert trained.shape.sparsity == {"2:4"}
    for name in (f.name for f in FORMATS.values() if f.linear):
        weight = next(iter(after.values())).detach()
        assert (decode(encode(weight, name))[weight == 0] == 0).all(), name
    quantized = Quantize().apply(trained, QuantizeConfig(ffn="int8"), context)
    assert quantized.shape.sparsity == {"2:4"}
    with pytest.raises(PlanError, match="exact zero"):
        Quantize().shape(trained.shape, QuantizeConfig(ffn="kmeans4"))
