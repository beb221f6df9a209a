"""Mixed precision: which layers get which number format, so that an average number of bits is kept and the loss rises
least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from autolite import formats
from autolite.architecture import ModelShape
from autolite.errors import PlanError
from autolite.parts import Matrix, layers_of, matrices_of
from autolite.products import matmuls
from autolite.surgery import clone
from autolite.tasks.encoding import fingerprint
from autolite.techniques.base import PARTS, Context, Part
from autolite.techniques.teacher import to_tensors

EXAMPLES = 128  # whose gradients are squared, one by one
UNITS = 2**14  # bytes are counted in such parts of the budget: sums stay few, and exact if it is smaller


@dataclass(frozen=True)
class Block:
    """The attention or feed-forward matrices that some `layers` of the student use, [n, k] each, and the teacher's
    layers that they came from."""

    part: Part
    layers: tuple[int, ...]
    sources: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]

    @property
    def weights(self) -> int:
        """How many weights it has."""
        return sum(n * k for n, k in self.sizes)

    def nbytes(self, format: str) -> int:
        """Return the bytes that it takes in `format`, scales and codebooks included."""
        return sum(formats.nbytes(format, n, k) for n, k in self.sizes)


def allocate(
    shape: ModelShape, average_bits: float, levels: Sequence[str], context: Context
) -> dict[Part, tuple[str, ...]]:
    """Return one of `levels` for the attention and the feed-forward block of every layer of a student of `shape`.

    The sum of the blocks' sensitivities is the least possible while all of their bytes, scales and codebooks included,
    are at most `average_bits` a weight. A block's sensitivity to a format is that of the teacher's layers that it came
    from (`sensitivities`), a weight, times its own number of weights: the student's weights are not known yet. Of
    layers that share a block the sensitivities are summed, for an error in it does harm in each (`origins`).

    Raises:
        PlanError: if even the smallest of `levels` needs more bits.
    """
    blocks = blocks_of(shape)
    found = sensitivities(context, levels)
    costs = [[block.nbytes(level) for level in levels] for block in blocks]
    errors = [
        [
            block.weights * sum(found[block.part, level][i] for i in origins(block, context.teacher.shape))
            for level in levels
        ]
        for block in blocks
    ]
    weights = sum(block.weights for block in blocks)
    budget = int(average_bits * weights / 8)
    least = sum(map(min, costs))
    if least > budget:
        raise PlanError(
            f"quantize.average_bits: {average_bits:g} bits a weight are asked for, but the smallest of levels "
            f"{', '.join(levels)} need {8 * least / weights:.2f} with their scales; give more bits or smaller levels"
        )
    chosen = knapsack(costs, errors, budget)
    count = sum(len(stack.layers) for stack in shape.stacks)
    result = {part: [""] * count for part in PARTS}
    for block, choice in zip(blocks, chosen, strict=True):
        for layer in block.layers:
            result[block.part][layer] = levels[choice]
    return {part: tuple(result[part]) for part in PARTS}


def blocks_of(shape: ModelShape) -> list[Block]:
    """Return the distinct blocks of the student's layers."""
    sizes: dict[str, list[tuple[int, int]]] = {}
    for product in {p.weights: p for p in matmuls(shape)}.values():
        sizes.setdefault(product.weights.rpartition(".")[0], []).append((product.n, product.k))
    blocks, before = [], 0
    for stack, origins in zip(shape.stacks, shape.source_layers, strict=True):
        for part in PARTS:
            ids = [layer.attention if part == "attention" else layer.feed_forward for layer in stack.layers]
            for number in dict.fromkeys(ids):
                users = [index for index, i in enumerate(ids) if i == number]
                sources = tuple(dict.fromkeys(origins[index] for index in users))
                layers = tuple(before + index for index in users)
                blocks.append(Block(part, layers, sources, tuple(sizes[f"{stack.name}.{part}.{number}"])))
        before += len(stack.layers)
    return blocks


def origins(block: Block, teacher: ModelShape) -> list[int]:
    """Return the places of the teacher's layers that a student's block came from; of those that share a block in the
    teacher, one: what is known of it is of all its uses already."""
    layers = teacher.stacks[0].layers
    places = [teacher.source_layers[0].index(source) for source in block.sources]
    blocks = {layers[i].attention if block.part == "attention" else layers[i].feed_forward: i for i in reversed(places)}
    return sorted(blocks.values())


def knapsack(costs: Sequence[Sequence[int]], errors: Sequence[Sequence[float]], budget: int) -> list[int]:
    """Return the choice for each item whose errors have the least sum while its costs have at most the sum `budget`.

    Exact dynamic programming over the sums of costs that nothing beats (a multiple-choice knapsack). Costs are rounded
    up to 1/16384 of a larger budget: the budget always holds, and at most that much of it an item stays unused.
    """
    unit = -(-budget // UNITS) or 1
    units = [np.array([-(-cost // unit) for cost in row]) for row in costs]
    room = max(budget // unit, sum(int(row.min()) for row in units))  # what surely fits is not lost to rounding
    rest = room - sum(int(row.min()) for row in units)
    spent, lost = np.zeros(1, np.int64), np.zeros(1)
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    for row, error in zip(units, errors, strict=True):
        extra = row - row.min()  # what is spent above the least
        total = (spent[:, None] + extra).ravel()
        loss = (lost[:, None] + np.asarray(error)).ravel()
        order = np.lexsort((loss, total))
        order = order[total[order] <= rest]
        best = np.minimum.accumulate(loss[order])
        order = order[np.concatenate(([True], best[1:] < best[:-1]))]
        trail.append((order // len(row), order % len(row)))
        spent, lost = total[order], loss[order]
    place, choices = int(lost.argmin()), []
    for parents, options in reversed(trail):
        choices.append(int(options[place]))
        place = int(parents[place])
    return choices[::-1]


def sensitivities(context: Context, levels: Sequence[str]) -> dict[tuple[Part, str], list[float]]:
    """Return, for each part and format, how much the loss rises a weight in each layer of the teacher if the part is
    rounded to the format: the mean of F * (rounding error)^2 over its weights, F the Fisher information.

    To second order a loss rises by half of delta^T H delta, and the diagonal of H is estimated by F, the mean of the
    squared gradients of the loss of 128 training examples (Dong et al. 2019, "HAWQ"; Nvidia's ModelOpt, auto_quantize).
    Both F and the sensitivities are kept in `context.memory`.
    """
    name = f"{fingerprint([context.train])[:12]}-{context.seed}"
    fisher: dict[str, torch.Tensor] = context.memory.get(f"fisher-{name}") or _fisher(context)
    context.memory[f"fisher-{name}"] = fisher
    known: dict[tuple[str, str], float] = context.memory.setdefault(f"sensitivity-{name}", {})
    found: dict[tuple[Part, str], list[float]] = {}
    for layer in layers_of(context.teacher.model):
        groups: dict[Part, tuple[Matrix, ...]] = {"attention": layer.attention_matrices, "ffn": layer.ffn_matrices}
        for part, matrices in groups.items():
            for level in dict.fromkeys(levels):
                for matrix in matrices:
                    if (matrix.key, level) not in known:
                        known[matrix.key, level] = _error(matrix, level, fisher[matrix.key])
                total = sum(known[matrix.key, level] for matrix in matrices)
                found.setdefault((part, level), []).append(total / sum(m.weight.numel() for m in matrices))
    return found


@torch.no_grad()
def _error(matrix: Matrix, level: str, fisher: torch.Tensor) -> float:
    rounded = formats.decode(formats.encode(matrix.weight, level))
    return float(((rounded - matrix.weight.cpu()).square_() * fisher).sum())


def _fisher(context: Context) -> dict[str, torch.Tensor]:
    """Return the mean of squared gradients of the loss of single examples, [n, k] for each matrix of the layers."""
    twin: Any = clone(context.teacher.model)
    twin.to(context.device).train(False).requires_grad_(False)
    groups = matrices_of(twin)
    matrices = {key: matrix for part in PARTS for key, matrix in groups[part].items()}
    parameters = dict(twin.named_parameters())
    wanted = [parameters[key].requires_grad_() for key in matrices]
    rng = np.random.default_rng(context.seed)
    chosen = np.sort(rng.choice(len(context.train), min(EXAMPLES, len(context.train)), replace=False))
    sums = {key: torch.zeros_like(parameters[key]) for key in matrices}
    for batch in context.task.batches(context.train.take(chosen), 1, context.pad_id):
        inputs, labels = to_tensors(batch, context.device)
        loss = context.task.loss(twin(**inputs).logits, labels)
        for key, gradient in zip(matrices, torch.autograd.grad(loss, wanted), strict=True):
            sums[key].addcmul_(gradient, gradient, value=1 / len(chosen))
    return {key: (total.T if matrices[key].transposed else total).cpu() for key, total in sums.items()}
