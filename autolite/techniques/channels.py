"""How much each channel of the residual stream (the hidden width) matters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from autolite.parts import LayerParts, Matrix, embeddings_of, head_of, layer_modules, layers_of
from autolite.surgery import clone
from autolite.techniques.base import Context, Student
from autolite.techniques.importance import Kind, input_energy, scored_on
from autolite.techniques.observe import BATCH, hidden_output, recorded, sample
from autolite.techniques.reconstruct import channel_errors
from autolite.techniques.teacher import to_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def channel_importance(student: Student, kind: Kind, context: Context) -> torch.Tensor:
    """Return a score for each hidden channel [hidden], the larger the more important.

    "magnitude" is the L2 norm of all weights that read or write the channel; "activation" its energy at the inputs of
    the layers' matrices; "wanda" the sum over the weights that read it of |w| times the L2 norm of what they read;
    "taylor" and "fisher" the mean over examples of |d loss / d mask| and of its square, the mask being on the channel
    of every layer's input and of the last one's output; "second-order" what it costs all matrices that read the
    channel if they are re-fitted (`autolite.techniques.reconstruct.channel_errors`).
    """
    if kind == "magnitude":
        return _magnitude(student.model)
    key = f"{scored_on(student, context)}-{kind}-channels"
    if key not in context.memory:
        if kind == "second-order":
            context.memory[key] = channel_errors(student.model, context)
        else:
            score = _by_gradient if kind in ("taylor", "fisher") else _by_energy
            context.memory[key] = score(student.model, kind, context)
    scores: torch.Tensor = context.memory[key]
    return scores


def head_outputs(model: PreTrainedModel, count: int) -> list[int] | None:
    """Return which outputs of the head's own matrix (BERT's pooler) stay if it keeps `count`: those of the largest
    norm in, times norm out. None if the head has no such matrix."""
    dense = head_of(model).dense
    if len(dense) < 2:
        return None
    (inner, _), (last, _) = dense[0], dense[-1]
    with torch.no_grad():
        score = inner.weight.float().norm(dim=1) * last.weight.float().norm(dim=0)
    return sorted(torch.argsort(score, descending=True, stable=True)[:count].tolist())


def _readers(layer: LayerParts) -> tuple[Matrix, ...]:
    return (*layer.attention_readers, *layer.ffn_readers)


@torch.no_grad()
def _magnitude(model: PreTrainedModel) -> torch.Tensor:
    layers, embeddings, head = layers_of(model), embeddings_of(model), head_of(model)
    hidden = len(layers[0].attention_norm.weight)
    reading = {id(m.weight): m.weight for layer in layers for m in _readers(layer)}
    writing = {m.key: m.weight.T for layer in layers for m in (layer.out, layer.ffn_out)}
    first = [m.weight.T for m in (embeddings.projection or embeddings.patch,) if m is not None] or [
        m.weight for m in (embeddings.word, embeddings.position, embeddings.token_type) if m is not None
    ]
    last = [m.weight for m, _ in head.dense[:1] if not head.tied]
    stored = {(w.data_ptr(), w.shape): w for w in [*reading.values(), *writing.values(), *first, *last]}
    total = torch.zeros(hidden, dtype=torch.float64)
    for weight in stored.values():
        total += weight.double().square().sum(0).cpu()
    return total.sqrt()


def _by_energy(model: PreTrainedModel, kind: Kind, context: Context) -> torch.Tensor:
    layers = layers_of(model)
    matrices = {(m.key, m.rows): m for layer in layers for m in _readers(layer)}
    keys = sorted({key for key, _ in matrices})
    energies = input_energy(model, keys, context.task, sample(context), context.pad_id, context.device)
    if kind == "activation":
        return torch.stack([energies[key] for key in keys]).sum(0)
    weights = [(m.weight.detach().float().abs().sum(0).cpu(), energies[m.key]) for m in matrices.values()]
    return torch.stack([weight * energy.sqrt() for weight, energy in weights]).sum(0)


def _by_gradient(model: PreTrainedModel, kind: Kind, context: Context) -> torch.Tensor:
    twin: Any = clone(model)
    twin.to(context.device).train(False)
    layers, outputs = layer_modules(twin), list[torch.Tensor]()
    hook = layers[-1].register_forward_hook(lambda _, args, output: outputs.append(hidden_output(output)))
    split, total = sample(context), torch.zeros(())
    with recorded(layers, gradients=True) as uses:
        for batch in context.task.batches(split, BATCH, context.pad_id):
            uses.clear()
            outputs.clear()
            inputs, labels = to_tensors(batch, context.device)
            loss = context.task.loss(twin(**inputs).logits, labels)
            states = [state for _, state in uses] + outputs[-1:]
            gradients = torch.autograd.grad(loss, states)
            pairs = zip(states, gradients, strict=True)
            change = torch.stack([(state.detach() * gradient).sum(1) for state, gradient in pairs]).sum(0)
            change = change.cpu() * len(batch.indices)  # [batch, hidden]; the loss is the batch's mean
            total = total + (change.abs() if kind == "taylor" else change.square()).sum(0)
    hook.remove()
    return total / len(split)
