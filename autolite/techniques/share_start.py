"""What the layers of a set start from when they begin to share: one of them, their mean, and what each keeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autolite.delta import Delta
from autolite.parts import layer_modules, part
from autolite.surgery import clone
from autolite.tasks.encoding import fingerprint
from autolite.techniques.base import Context, Student, weights_digest
from autolite.techniques.teacher import forward, to_tensors
from autolite.unmapped import is_conv1d

EXAMPLES, BATCH = 128, 16  # of the training split, on which layers are tried

Sets = tuple[int | None, ...]  # for each layer the number of the set that it is put in, None if it is not
Paths = tuple[str, ...]  # of a block's projections in a layer
Weights = list[dict[str, tuple[Tensor, Tensor | None]]]  # for each layer, by path: weight [out, in], bias [out]


def members(sets: Sets) -> dict[int, list[int]]:
    """Return the layers of each set."""
    found: dict[int, list[int]] = {}
    for layer, number in enumerate(sets):
        if number is not None:
            found.setdefault(number, []).append(layer)
    return found


@torch.no_grad()
def average(modules: Sequence[nn.Module], sets: Sets, paths: Paths) -> None:
    """Set the parameters of the first layer of each set to their mean over its layers."""
    for layers in members(sets).values():
        for path in paths:
            parts = [modules[layer].get_submodule(path) for layer in layers]
            for name, parameter in parts[0].named_parameters():
                parameter.copy_(torch.stack([p.get_parameter(name) for p in parts]).mean(0))


@torch.no_grad()
def adopt(modules: Sequence[nn.Module], sets: Sets, paths: Paths, best: Mapping[int, int]) -> None:
    """Set the parameters of the first layer of each set to those of the layer that `best` has for it."""
    for number, layers in members(sets).items():
        for path in paths:
            source = modules[best[number]].get_submodule(path)
            for name, parameter in modules[layers[0]].get_submodule(path).named_parameters():
                parameter.copy_(source.get_parameter(name))


def best_layers(student: Student, sets: Sets, paths: Paths, context: Context) -> dict[int, int]:
    """Return for each set the layer whose projections, used by the whole set while all other sets keep their own, do
    the least damage: KL(student || student with that layer's) of the logits, summed over at most 128 examples of
    `context.train` that are drawn by `context.seed`. Of equally good layers it is the first.

    Each layer costs one pass over the examples. The result is kept in `context.memory`.
    """
    if not members(sets):
        return {}
    key = f"share-{weights_digest(student.model)}-{fingerprint([context.train])[:12]}-{context.seed}-{sets}-{paths}"
    if key not in context.memory:
        context.memory[key] = _least_damage(student, sets, paths, context)
    best: dict[int, int] = context.memory[key]
    return best


@torch.no_grad()
def _least_damage(student: Student, sets: Sets, paths: Paths, context: Context) -> dict[int, int]:
    model: Any = clone(student.model)
    model.to(context.device).train(False)
    modules = layer_modules(model)
    count = len(context.train)
    chosen = np.random.default_rng(context.seed).choice(count, min(EXAMPLES, count), replace=False)
    damage = {layer: 0.0 for layers in members(sets).values() for layer in layers}
    for batch in context.task.batches(context.train.take(np.sort(chosen)), BATCH, context.pad_id):
        inputs, labels = to_tensors(batch, context.device)
        expected = _log_probabilities(model, inputs, labels, context)
        for layers in members(sets).values():
            for source in layers:
                with _sharing(modules, layers, source, paths):
                    found = _log_probabilities(model, inputs, labels, context)
                damage[source] += float(F.kl_div(found, expected, reduction="sum", log_target=True))
    return {number: min(layers, key=damage.__getitem__) for number, layers in members(sets).items()}


def _log_probabilities(model: Any, inputs: dict[str, Tensor], labels: Tensor, context: Context) -> Tensor:
    logits, _ = forward(model, inputs, hidden=False)
    return F.log_softmax(context.task.soft_targets(logits, labels).float(), dim=-1)


@contextmanager
def _sharing(modules: Sequence[nn.Module], layers: Sequence[int], source: int, paths: Paths) -> Iterator[None]:
    """Let `layers` use the projections of layer `source` for a while."""
    own = [(modules[layer], path, part(modules[layer], path)) for layer in layers for path in paths]
    used = {path: part(modules[source], path) for path in paths}
    try:
        for module, path, _ in own:
            module.set_submodule(path, used[path])
        yield
    finally:
        for module, path, projection in own:
            module.set_submodule(path, projection)


def weights_at(modules: Sequence[nn.Module], formed: Mapping[Paths, Sets]) -> Weights:
    """Return copies of the weights of the projections that are put in a set."""
    found: Weights = [{} for _ in modules]
    for paths, sets in formed.items():
        for layer in (layer for layers in members(sets).values() for layer in layers):
            found[layer] |= {path: _copied(part(modules[layer], path)) for path in paths}
    return found


def fit_deltas(modules: Sequence[nn.Module], weights: Weights) -> None:
    """Let the low-rank difference of each projection make up for what it lost of these `weights`."""
    for module, own in zip(modules, weights, strict=True):
        for path, (weight, bias) in own.items():
            projection: Delta = part(module, path)
            shared, common = _copied(projection.base)
            projection.fit(weight - shared, None if bias is None or common is None else bias - common)


def _copied(projection: Any) -> tuple[Tensor, Tensor | None]:
    weight, bias = projection.weight.detach(), projection.bias
    return (weight.T if is_conv1d(projection) else weight).clone(), None if bias is None else bias.detach().clone()
