"""How much each attention group and each feed-forward neuron matters, as scores to prune by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from autolite.parts import LayerParts, Matrix, layers_of
from autolite.surgery import clone
from autolite.tasks.encoding import fingerprint
from autolite.techniques.base import Context, Student, weights_digest
from autolite.techniques.observe import BATCH, owner, real, recorded, sample
from autolite.techniques.teacher import to_tensors

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from autolite.tasks.base import Split, Task

Kind = Literal["magnitude", "activation", "wanda", "taylor", "fisher", "second-order"]


@dataclass(frozen=True, eq=False)
class Importance:
    """Scores by layer, the larger the more important: `heads` [attention groups] and `neurons` [ffn width].

    A group is a key/value head with the query heads that read it. Layers that share a block have the same scores.
    """

    heads: tuple[torch.Tensor, ...]
    neurons: tuple[torch.Tensor, ...]


def importance(student: Student, kind: Kind, context: Context) -> Importance:
    """Return the scores of the student as it is, from `context.memory` if these weights were scored before.

    All but magnitude are taken from at most 256 examples of `context.train`, drawn by `context.seed`.
    """
    if kind == "magnitude":
        return magnitude(student.model)
    key = f"{scored_on(student, context)}-{kind}"
    if key not in context.memory:
        context.memory[key] = _score(student.model, kind, context)
    scores: Importance = context.memory[key]
    return scores


def scored_on(student: Student, context: Context) -> str:
    """Name the weights and the examples that scores are taken from, by their content."""
    if student is not context.teacher:
        return f"scores-{weights_digest(student.model)}-{fingerprint([context.train])[:12]}-{context.seed}"
    # Every trial asks for the teacher's, whose bytes take half a second to read; torch counts changes in place.
    name, state = f"teacher-scores-{context.seed}", [each._version for each in student.model.parameters()]
    known = context.memory.get(name)
    if known is None or known[0] is not context.train or known[1] != state:
        digests = f"{weights_digest(student.model)}-{fingerprint([context.train])[:12]}"
        known = context.memory[name] = context.train, state, f"scores-{digests}-{context.seed}"
    return str(known[2])


def _score(model: PreTrainedModel, kind: Kind, context: Context) -> Importance:
    if kind == "second-order":
        from autolite.techniques.reconstruct import removal_errors  # which is built on these scores

        return removal_errors(model, context)
    examples = (context.task, sample(context), context.pad_id, context.device)
    return {"activation": activation, "wanda": wanda, "taylor": taylor, "fisher": fisher}[kind](model, *examples)


def best(scores: torch.Tensor, count: int) -> list[int]:
    """Return the indices of the `count` highest scores, ascending; of equal ones the first."""
    return sorted(torch.argsort(scores, descending=True, stable=True)[:count].tolist())


def magnitude(model: PreTrainedModel) -> Importance:
    """Return the L2 norm of all the weights (biases included) that go with a group or a neuron."""
    heads, neurons = [], []
    with torch.no_grad():
        for layer in layers_of(model):
            inputs = layer.attention_readers
            heads.append(_norm([m.weight for m in inputs], [m.bias for m in inputs], layer.out.weight, layer.kv_heads))
            inner = layer.ffn_readers
            width = layer.ffn_out.weight.shape[1]
            neurons.append(_norm([m.weight for m in inner], [m.bias for m in inner], layer.ffn_out.weight, width))
    return Importance(tuple(heads), tuple(neurons))


def _norm(rows: list[torch.Tensor], biases: list[torch.Tensor | None], out: torch.Tensor, units: int) -> torch.Tensor:
    parts = [*rows, *(bias for bias in biases if bias is not None), out.T]
    squares = torch.stack([part.float().reshape(units, -1).square().sum(1) for part in parts])
    return squares.sum(0).sqrt().cpu()


def activation(model: PreTrainedModel, task: Task, split: Split, pad_id: int, device: str = "cpu") -> Importance:
    """Return the energy (sum of squares over all tokens) of each unit's activations at the input of the block's
    output projection.

    What is silent there can go (Hu et al. 2016, "Network Trimming", for ReLU, whose zeros can be counted; after a
    smooth activation nothing is exactly zero, but its energy is small).
    """
    return _by_energy(model, task, split, pad_id, device, lambda energy, weight: energy)


def wanda(model: PreTrainedModel, task: Task, split: Split, pad_id: int, device: str = "cpu") -> Importance:
    """Return the sum over a unit's weights in the output projection of |w| times the L2 norm of the activation that
    it multiplies. Source: Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models"."""
    return _by_energy(model, task, split, pad_id, device, lambda energy, weight: weight.abs().sum(0) * energy.sqrt())


def _by_energy(
    model: PreTrainedModel,
    task: Task,
    split: Split,
    pad_id: int,
    device: str,
    score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> Importance:
    """Score units by the sum over their channels of what `score` makes of energies [k] and a weight [n, k]."""
    parts = layers_of(model)
    energies = input_energy(model, [m.key for p in parts for m in (p.out, p.ffn_out)], task, split, pad_id, device)

    def units(matrix: Matrix, count: int) -> torch.Tensor:
        channels = score(energies[matrix.key], matrix.weight.detach().cpu().float())
        return channels.reshape(count, -1).sum(1)

    heads = tuple(units(p.out, p.kv_heads) for p in parts)
    return Importance(heads, tuple(units(p.ffn_out, p.ffn_out.weight.shape[1]) for p in parts))


@torch.no_grad()
def input_energy(
    model: PreTrainedModel, keys: list[str], task: Task, split: Split, pad_id: int, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """Return the sum over tokens of the squared inputs [channels] of each matrix whose parameter is called one of
    `keys`, padding excluded; those of a shared matrix are summed over its uses."""
    twin: Any = clone(model)
    twin.to(device).train(False)
    modules = {owner(twin, key): key for key in keys}
    found: dict[str, torch.Tensor] = {}
    with recorded(modules) as uses:
        for batch in task.batches(split, BATCH, pad_id):
            uses.clear()
            inputs, _ = to_tensors(batch, device)
            twin(**inputs)
            for module, state in uses:
                energy = real(state, inputs).float().square().sum(0).cpu()
                found[modules[module]] = found[modules[module]] + energy if modules[module] in found else energy
    return found


def taylor(model: PreTrainedModel, task: Task, split: Split, pad_id: int, device: str = "cpu") -> Importance:
    """Return the mean over examples of |d loss / d mask|, the first-order change of the loss if a unit is removed.

    With a mask m = 1 on a unit's activations a at the input of the block's output projection, d loss / d m is the sum
    of (d loss / d a) * a over the example's tokens and the unit's channels; one backward pass gives it for all units.
    Where layers share a block, the scores of its uses are summed. The loss is the task's hard loss of the batch, and
    `model` stays untouched. Sources: Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning";
    Michel, Levy & Neubig 2019, "Are Sixteen Heads Really Better than One?".
    """
    return _by_gradient(model, task, split, pad_id, device, torch.abs)


def fisher(model: PreTrainedModel, task: Task, split: Split, pad_id: int, device: str = "cpu") -> Importance:
    """Return the mean over examples of (d loss / d mask)^2, with the masks of `taylor`: the diagonal of the empirical
    Fisher information, by which removing a unit raises the loss to second order. Sources: Molchanov et al. 2019;
    Kwon et al. 2022, "A Fast Post-Training Pruning Framework for Transformers"."""
    return _by_gradient(model, task, split, pad_id, device, torch.square)


def _by_gradient(
    model: PreTrainedModel,
    task: Task,
    split: Split,
    pad_id: int,
    device: str,
    size: Callable[[torch.Tensor], torch.Tensor],
) -> Importance:
    twin: Any = clone(model)
    twin.to(device).train(False)
    parts = layers_of(twin)
    modules = [(owner(twin, layer.out.key), owner(twin, layer.ffn_out.key)) for layer in parts]
    totals: dict[nn.Module, torch.Tensor] = {}
    with recorded([module for pair in modules for module in pair], gradients=True) as uses:
        for batch in task.batches(split, BATCH, pad_id):
            uses.clear()
            inputs, labels = to_tensors(batch, device)
            loss = task.loss(twin(**inputs).logits, labels)
            gradients = torch.autograd.grad(loss, [activation for _, activation in uses])
            for (module, activation), gradient in zip(uses, gradients, strict=True):
                # [batch, channels]; the loss is the batch's mean, so that the gradient of one example is that times it.
                change = (activation.detach() * gradient).sum(1) * len(batch.indices)
                score = size(change.reshape(len(change), _units(module, parts, modules), -1).sum(2)).sum(0)
                totals[module] = totals[module] + score if module in totals else score
    scores = {module: (total / len(split)).cpu() for module, total in totals.items()}
    return Importance(tuple(scores[out] for out, _ in modules), tuple(scores[ffn] for _, ffn in modules))


def _units(module: nn.Module, parts: list[LayerParts], modules: list[tuple[nn.Module, nn.Module]]) -> int:
    """Number of units whose channels `module` reads: groups for attention, channels for the feed-forward block."""
    for layer, (out, ffn) in zip(parts, modules, strict=True):
        if module is out:
            return layer.kv_heads
        if module is ffn:
            return int(layer.ffn_out.weight.shape[1])
    raise KeyError(module)
