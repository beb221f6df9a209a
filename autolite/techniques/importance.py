"""How much each attention group and each feed-forward neuron matters, as scores to prune by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from autolite.parts import LayerParts, layers_of
from autolite.surgery import clone
from autolite.tasks.encoding import fingerprint
from autolite.techniques.base import Context, Student, weights_digest
from autolite.techniques.teacher import to_tensors

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from autolite.tasks.base import Split, Task

EXAMPLES = 256  # calibration examples of the Taylor scores
BATCH = 32

Kind = Literal["taylor", "magnitude"]


@dataclass(frozen=True, eq=False)
class Importance:
    """Scores by layer, float32, the larger the more important: `heads` [attention groups] and `neurons` [ffn width].

    A group is a key/value head with the query heads that read it. Layers that share a block have the same scores.
    """

    heads: tuple[torch.Tensor, ...]
    neurons: tuple[torch.Tensor, ...]


def importance(student: Student, kind: Kind, context: Context) -> Importance:
    """Return the scores of the student as it is, from `context.memory` if these weights were scored before.

    Taylor scores use at most 256 examples of `context.train`, drawn by `context.seed`.
    """
    if kind == "magnitude":
        return magnitude(student.model)
    key = f"taylor-{weights_digest(student.model)}-{fingerprint([context.train])[:12]}-{context.seed}"
    if key not in context.memory:
        count = len(context.train)
        chosen = np.random.default_rng(context.seed).choice(count, min(EXAMPLES, count), replace=False)
        split = context.train.take(np.sort(chosen))
        context.memory[key] = taylor(student.model, context.task, split, context.pad_id, context.device)
    scores: Importance = context.memory[key]
    return scores


def magnitude(model: PreTrainedModel) -> Importance:
    """Return the L2 norm of all the weights (biases included) that go with a group or a neuron."""
    heads, neurons = [], []
    with torch.no_grad():
        for layer in layers_of(model):
            inputs = (layer.query, layer.key, layer.value)
            heads.append(_norm([m.weight for m in inputs], [m.bias for m in inputs], layer.out.weight, layer.kv_heads))
            inner = [m for m in (layer.ffn_in, layer.ffn_gate) if m is not None]
            width = layer.ffn_out.weight.shape[1]
            neurons.append(_norm([m.weight for m in inner], [m.bias for m in inner], layer.ffn_out.weight, width))
    return Importance(tuple(heads), tuple(neurons))


def _norm(rows: list[torch.Tensor], biases: list[torch.Tensor | None], out: torch.Tensor, units: int) -> torch.Tensor:
    parts = [*rows, *(bias for bias in biases if bias is not None), out.T]
    squares = torch.stack([part.float().reshape(units, -1).square().sum(1) for part in parts])
    return squares.sum(0).sqrt().cpu()


def taylor(model: PreTrainedModel, task: Task, split: Split, pad_id: int, device: str = "cpu") -> Importance:
    """Return the mean over examples of |d loss / d mask|, the first-order change of the loss if a unit is removed.

    With a mask m = 1 on a unit's activations a at the input of the block's output projection, d loss / d m is the sum
    of (d loss / d a) * a over the example's tokens and the unit's channels; one backward pass gives it for all units.
    Where layers share a block, the scores of its uses are summed. The loss is the task's hard loss of the batch, and
    `model` stays untouched. Sources: Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning";
    Michel, Levy & Neubig 2019, "Are Sixteen Heads Really Better than One?".
    """
    twin: Any = clone(model)
    twin.to(device).train(False)
    parts = layers_of(twin)
    modules = [(_owner(twin, layer.out.key), _owner(twin, layer.ffn_out.key)) for layer in parts]
    totals: dict[nn.Module, torch.Tensor] = {}
    with _recorded({module for pair in modules for module in pair}) as uses:
        for batch in task.batches(split, BATCH, pad_id):
            uses.clear()
            inputs, labels = to_tensors(batch, device)
            loss = task.loss(twin(**inputs).logits, labels)
            gradients = torch.autograd.grad(loss, [activation for _, activation in uses])
            for (module, activation), gradient in zip(uses, gradients, strict=True):
                # [batch, channels]; the loss is the batch's mean, so that the gradient of one example is that times it.
                change = (activation.detach() * gradient).sum(1) * len(batch.indices)
                score = change.reshape(len(change), _units(module, parts, modules), -1).sum(2).abs().sum(0)
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


def _owner(model: PreTrainedModel, key: str) -> nn.Module:
    return model.get_submodule(key.rpartition(".")[0])


@contextmanager
def _recorded(modules: set[nn.Module]) -> Iterator[list[tuple[nn.Module, torch.Tensor]]]:
    """Collect (module, its input) for every call of the modules, in order; inputs require gradients."""
    uses: list[tuple[nn.Module, torch.Tensor]] = []

    def record(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        # True already unless the model's own parameters are frozen.
        uses.append((module, arguments[0].requires_grad_() if not arguments[0].requires_grad else arguments[0]))

    hooks = [module.register_forward_pre_hook(record) for module in modules]
    try:
        yield uses
    finally:
        for hook in hooks:
            hook.remove()
