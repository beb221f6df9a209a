"""Models whose layers share weights with low-rank differences, and the same models with every weight written out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from autolite import contracts
from autolite.architecture import shape_of
from autolite.parts import layers_of
from autolite.surgery import add_deltas, clone, share_layers
from autolite.testing import tiny_inputs, tiny_model

FAMILIES = tuple(name for name in contracts.FAMILIES if name != "albert")  # whose layers are one already


@torch.no_grad()
def logits(model: Any) -> Tensor:
    result: Tensor = model(**tiny_inputs(model)).logits
    return result


def task_of(family: str) -> str:
    return "language-modeling" if family in contracts.DECODERS else "text-classification"


@torch.no_grad()
def relaxed(family: str, **config: Any) -> tuple[Any, Any]:
    """A model of four layers, and one that shares its attention in a sequence and its feed-forward blocks in a cycle,
    with random differences of rank 3 and 2."""
    plain = tiny_model(family, task_of(family), layers=4, **config)
    shared = clone(plain)
    share_layers(shared, [0, 0, 2, 2], [0, 1, 0, 1])
    layers = shape_of(shared).stacks[0].layers
    add_deltas(shared, [replace(x, attention_rank=3, ffn_rank=2) for x in layers])
    generator = torch.Generator().manual_seed(0)
    for name, parameter in shared.named_parameters():
        if ".down." in name or ".up." in name:
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return plain, shared


@torch.no_grad()
def written_out(shared: Any, plain: Any) -> Any:
    """A copy of `plain`, which shares nothing, whose layers hold the sums that those of `shared` compute with."""
    twin = clone(plain)
    for source, target in zip(layers_of(shared), layers_of(twin), strict=True):
        matrices = zip(
            (*source.attention_matrices, *source.ffn_matrices),
            (*target.attention_matrices, *target.ffn_matrices),
            strict=True,
        )
        for ours, theirs in matrices:
            weight, bias = ours.weight, ours.bias
            if ours.delta is not None:
                down, up = ours.delta
                weight = weight + up.weight @ down.weight
                bias = bias if bias is None or up.bias is None else bias + up.bias
            theirs.weight.copy_(weight)
            if theirs.bias is not None and bias is not None:
                theirs.bias.copy_(bias)
    return twin
