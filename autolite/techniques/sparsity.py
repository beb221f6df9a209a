"""Zeros inside matrices, for targets that multiply faster with them: N of M inputs in a row, or a part of each row.

There is no state beside the weights: the shape says that a layer is sparse, and the zeros themselves are the mask.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch

from autolite.architecture import LayerShape, ModelShape
from autolite.parts import Matrix, layers_of, matrices_of
from autolite.techniques.base import Context
from autolite.techniques.importance import input_energy
from autolite.techniques.observe import sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Criterion = Literal["magnitude", "wanda"]


def parse(pattern: str) -> tuple[int, int] | float | None:
    """Return (n, m) of "n:m" (of m inputs in a row at most n are not zero), the part of zeros of "50%", or None for
    "none".

    Raises:
        ValueError: if it is none of these.
    """
    if pattern == "none":
        return None
    if found := re.fullmatch(r"(\d+):(\d+)", pattern):
        n, m = int(found[1]), int(found[2])
        if 0 < n < m:
            return n, m
    elif (found := re.fullmatch(r"(\d+)%", pattern)) and 0 < int(found[1]) < 100:
        return int(found[1]) / 100
    raise ValueError("is no pattern of zeros; use none, n:m such as 2:4, or a part of zeros such as 50%")


def unfit(pattern: str, hidden: int, layer: LayerShape) -> int | None:
    """Return an input width of the layer's matrices that groups of the pattern do not divide, None if all fit."""
    found = parse(pattern)
    widths = (hidden, layer.heads * layer.head_dim, layer.ffn)
    if not isinstance(found, tuple):
        return None
    return next((width for width in widths if width % found[1]), None)


def zero(model: PreTrainedModel, pattern: str, criterion: Criterion, context: Context) -> None:
    """Set the least important weights of every matrix in the layers to zero, in place.

    Weights compare within an output row, for n:m within each m inputs in a row: by |w|, or by |w| times the L2 norm of
    the input they multiply (Wanda, Sun et al. 2023).
    """
    matrices = _matrices(model)
    energy: dict[str, torch.Tensor] = {}
    if criterion == "wanda":
        split = sample(context)
        energy = input_energy(model, list(matrices), context.task, split, context.pad_id, context.device)
    with torch.no_grad():
        for key, matrix in matrices.items():
            score = matrix.weight.abs() * (energy[key].sqrt() if key in energy else 1)
            matrix.weight.mul_(kept(score, pattern))


def kept(scores: torch.Tensor, pattern: str) -> torch.Tensor:
    """Return the mask, bool [n, k], of the weights that stay by scores [n, k]; of equal ones the first stay.

    Raises:
        ValueError: if the pattern is not one, or its groups do not divide k.
    """
    found = parse(pattern)
    if found is None:
        return torch.ones_like(scores, dtype=torch.bool)
    rows = scores.reshape(len(scores), -1, found[1]) if isinstance(found, tuple) else scores[:, None]
    count = found[0] if isinstance(found, tuple) else rows.shape[-1] - round(found * rows.shape[-1])
    order = rows.argsort(dim=-1, descending=True, stable=True)
    chosen = torch.zeros_like(rows, dtype=torch.bool).scatter_(-1, order[..., :count], True)
    return chosen.flatten(1)


def hold(model: PreTrainedModel, shape: ModelShape) -> Callable[[], None]:
    """Return what puts the zeros of sparse layers back after a training step; it does nothing for dense ones."""
    if not shape.sparsity:
        return lambda: None
    masks = [(parameter := model.get_parameter(key), parameter != 0) for key in _matrices(model)]

    @torch.no_grad()
    def restore() -> None:
        for parameter, there in masks:
            parameter.mul_(there)

    return restore


def _matrices(model: PreTrainedModel) -> dict[str, Matrix]:
    """Every stored matrix of the layers by its key, each once, thin factors left out."""
    layers_of(model)  # a model that the map does not have is refused here
    groups = matrices_of(model)
    return {key: matrix for key, matrix in (groups["attention"] | groups["ffn"]).items() if not matrix.factor}
