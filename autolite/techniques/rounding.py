"""How matrices are rounded to number formats: to nearest, by what their inputs weigh, or with errors compensated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from autolite import formats
from autolite.families import is_mapped
from autolite.formats import Encoded
from autolite.parts import Matrix, embeddings_of, matrices_of
from autolite.surgery import clone
from autolite.techniques.base import Context
from autolite.techniques.hqq import half_quadratic
from autolite.techniques.inputs import Inputs, examples, second_moments

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DAMPING = 0.01  # of the mean of the diagonal
COLUMNS = 128  # after which the errors reach the rest of the matrix

Rounding = Literal["nearest", "weighted", "gptq", "hqq"]


def rounded(
    model: PreTrainedModel, wanted: Mapping[str, str], rounding: Rounding, order: bool, context: Context
) -> dict[str, Encoded]:
    """Return the matrices whose keys `wanted` has, each in the format that it gives; the model stays untouched.

    "weighted" fits scales and codebooks to weights that count by the mean square of their inputs (the diagonal of the
    Hessian of the outputs' error; as in Kim et al. 2023, "SqueezeLLM"); "gptq" is `compensated`, "hqq" is
    `half_quadratic`. The inputs are those of training examples, for "gptq" in a model whose earlier matrices are
    rounded already. A table that rows are only looked up in has no inputs: its rows count by how often their tokens or
    positions occur. What stays in floating point is rounded to nearest.
    """
    matrices = _chosen(model, wanted)
    found = {
        key: formats.encode(matrix.weight.cpu(), wanted[key])
        for key, matrix in matrices.items()
        if rounding == "nearest" or formats.get(wanted[key]).bits > 8
    }
    if rounding == "hqq":
        rest = {key: m.weight.detach().cpu() for key, m in matrices.items() if key not in found}
        return found | {key: half_quadratic(weight, wanted[key]) for key, weight in rest.items()}
    if len(found) == len(matrices):
        return found
    twin = clone(model)
    twin.to(context.device).train(False)  # type: ignore[arg-type]
    matrices = {key: m for key, m in _chosen(twin, wanted).items() if key not in found}
    inputs = Inputs(twin, list(matrices), examples(context), context.device)
    for stage in inputs.stages:
        moments = second_moments(inputs, stage).cpu()
        for key in stage.keys:
            weight = matrices[key].weight.detach().float().cpu()
            if rounding == "weighted":
                found[key] = formats.encode(weight, wanted[key], moments.diagonal())
                continue
            found[key] = compensated(weight, moments, wanted[key], order)
            with torch.no_grad():
                matrices[key].weight.copy_(formats.decode(found[key]))
    for key, matrix in matrices.items():
        if key not in found:
            occurrences = _occurrences(context, len(matrix.weight), _first_position(model, key))
            found[key] = formats.encode(matrix.weight.cpu(), wanted[key], occurrences)
    return found


def _first_position(model: PreTrainedModel, key: str) -> int | None:
    """Return the row of a sequence's first token in the table of positions; None if `key` is another table."""
    embeddings = embeddings_of(model) if is_mapped(model) else None
    if embeddings is None or embeddings.position is None or embeddings.position.key != key:
        return None
    return embeddings.position_offset


def _occurrences(context: Context, rows: int, first: int | None) -> Tensor | None:
    """Return how often each row of a table is looked up for the training examples, plus one, [rows, 1]: of tokens, or
    of positions that count from the row `first`; None if the examples are no tokens."""
    ids = context.train.input_ids
    if not len(ids) or ids[0].ndim != 1:
        return None
    if first is None:
        counts = np.bincount(np.concatenate(list(ids)), minlength=rows)
    else:
        lengths = np.sort([len(example) for example in ids])
        positions = np.arange(rows) - first
        counts = np.where(positions < 0, 0, len(lengths) - np.searchsorted(lengths, positions, side="right"))
    return torch.from_numpy(counts).float()[:, None] + 1 if len(counts) == rows else None


def _chosen(model: PreTrainedModel, wanted: Mapping[str, str]) -> dict[str, Matrix]:
    return {key: m for group in matrices_of(model).values() for key, m in group.items() if key in wanted}


@torch.no_grad()
def compensated(weight: Tensor, moments: Tensor, format: str, order: bool) -> Encoded:
    """Encode a matrix [n, k] column by column, each time changing the columns still to come so that they make up for
    the error: with the second moments [k, k] of the inputs, the least squared error of the outputs is aimed at.

    With `order` the columns with the largest inputs come first, while the most can still be made up for. Scales and
    codebooks are fitted before, by the inputs' mean squares. Zeros, which pruning may have made, stay and make up for
    nothing (Frantar & Alistarh 2023, "SparseGPT"). Source: Frantar et al. 2022, "GPTQ".
    """
    n, k = weight.shape
    grid = formats.get(format).fit(weight, moments.diagonal())
    hessian = moments.double()
    unused = hessian.diagonal() <= 0
    hessian = hessian + torch.diag(unused.double()) + DAMPING * hessian.diagonal().mean() * torch.eye(k).double()
    columns = torch.argsort(hessian.diagonal(), descending=True, stable=True) if order else torch.arange(k)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[columns][:, columns]))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    left, there = weight[:, columns].clone(), weight != 0
    codes: list[Tensor] = [weight] * k
    for start in range(0, k, COLUMNS):
        end = min(start + COLUMNS, k)
        block, spread = left[:, start:end], factor[start:end, start:end]
        errors = torch.empty(n, end - start)
        for i in range(end - start):
            column = int(columns[start + i])
            value = block[:, i : i + 1]
            codes[column] = grid.quantize(torch.where(there[:, column, None], value, 0.0), column)
            errors[:, i : i + 1] = (value - grid.dequantize(codes[column], column)) / spread[i, i]
            block[:, i + 1 :].addr_(errors[:, i], spread[i, i + 1 :], alpha=-1)
        left[:, end:].addmm_(errors, factor[start:end, end:], alpha=-1)
    return Encoded(format, (n, k), grid.tensors(torch.cat(codes, dim=1)))
