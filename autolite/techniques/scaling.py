"""Scaling of channels before rounding: what a matrix multiplies its inputs with grows where that loses less, and what
makes those inputs shrinks by as much, so that the model's function stays and its graph does not change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from autolite import formats
from autolite.families import family_of
from autolite.parts import LayerParts, Matrix, Norm, layers_of
from autolite.surgery import clone
from autolite.techniques.base import Context
from autolite.techniques.inputs import Inputs, examples

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STEPS = 20  # exponents 0, 1/20, ... 19/20 are tried
MIGRATION = 0.5  # exponent of SmoothQuant
SMALLEST = 1e-4  # of a channel's magnitude: those that are never used are not scaled up without limit

Scaling = Literal["none", "awq", "smooth"]


@dataclass(frozen=True, eq=False)
class Fold:
    """A place where scaling is exact. Column j of each of `consumers` may be multiplied by s[index[j]], if all of
    `producers` (rows [p, k], or biases and norm weights [p]) are divided by s, positive, [p]."""

    consumers: tuple[Matrix, ...]
    producers: tuple[Tensor, ...]
    index: Tensor

    @torch.no_grad()
    def scale(self, scales: Tensor) -> None:
        """Apply `scales` to the live parameters."""
        for matrix in self.consumers:
            matrix.weight.mul_(scales[self.index])
        for tensor in self.producers:
            tensor.div_(scales if tensor.ndim == 1 else scales[:, None])


def folds(model: PreTrainedModel) -> list[Fold]:
    """Return every place in the layers where scaling is exact, each once if layers share weights.

    These are: a norm before a block (in models that normalise before, not after it) and the block's first matrices;
    the value rows and the output projection (a value channel that several heads read has one scale in all of them);
    and inside the feed-forward block the factor that a gate multiplies, or units with ReLU, and the second matrix.
    """
    family = family_of(model.config)
    relu = getattr(model.config, family.activation, "") == "relu"
    found: dict[str, Fold] = {}

    def add(consumers: tuple[Matrix, ...], producers: tuple[Tensor | None, ...], index: Tensor) -> None:
        given = tuple(tensor for tensor in producers if tensor is not None)
        key = consumers[0].key
        if key in found:
            seen = {tensor.data_ptr() for tensor in found[key].producers}
            given = found[key].producers + tuple(tensor for tensor in given if tensor.data_ptr() not in seen)
        found[key] = replace(found[key], producers=given) if key in found else Fold(consumers, given, index)

    for layer in layers_of(model):
        if family.pre_norm:
            first = (layer.qkv,) if layer.qkv is not None else layer.attention_readers
            add(first, _outputs(layer.attention_norm), torch.arange(len(layer.attention_norm.weight)))
            add(layer.ffn_readers, _outputs(layer.ffn_norm), torch.arange(len(layer.ffn_norm.weight)))
        add((layer.out,), _outputs(layer.value), _readers(layer))
        if layer.ffn_gate is not None or relu:
            add((layer.ffn_out,), _outputs(layer.ffn_in), torch.arange(layer.ffn_out.weight.shape[1]))
    return list(found.values())


def _outputs(part: Matrix | Norm) -> tuple[Tensor, Tensor | None]:
    return part.weight, part.bias


def _readers(layer: LayerParts) -> Tensor:
    """For each column of the output projection, the row of the value matrix that it reads."""
    rows = torch.arange(layer.kv_heads * layer.head_dim).view(layer.kv_heads, layer.head_dim)
    return rows.repeat_interleave(layer.heads // layer.kv_heads, dim=0).flatten()


def scaled(model: PreTrainedModel, wanted: Mapping[str, str], scaling: Scaling, context: Context) -> PreTrainedModel:
    """Return a copy of the model with other weights and the same function, whose matrices lose less in the formats
    that `wanted` gives by their keys.

    "awq" scales by the mean magnitude of each channel, to the power in [0, 1) that has the least squared error of the
    outputs (Lin et al. 2023, "AWQ"); "smooth" by sqrt(largest input / largest weight) where inputs are quantized too
    (Xiao et al. 2022, "SmoothQuant"). Both look at training examples; a scale of 1 is among the choices of "awq".
    """
    twin = clone(model)
    twin.to(context.device).train(False)  # type: ignore[arg-type]
    places = {fold.consumers[0].key: fold for fold in folds(twin)}
    keys = [
        key for key, fold in places.items() if any(_helps(wanted.get(m.key, "fp32"), scaling) for m in fold.consumers)
    ]
    inputs = Inputs(twin, keys, examples(context), context.device)
    for stage in inputs.stages:
        fold = places[stage.keys[0]]
        seen = _Seen(scaling)
        inputs.visit(stage, seen.add)
        if scaling == "awq":
            fold.scale(_searched(fold, seen, wanted))
        else:
            fold.scale(_migrated(fold, seen))
    return twin.cpu()


def _helps(format: str, scaling: Scaling) -> bool:
    return format != "fp32" and (scaling == "awq" or formats.get(format).activations != "float")


class _Seen:
    """Of the inputs of a product: the mean of x x^T, float32 [k, k], the mean and the largest of |x|, [k]."""

    def __init__(self, scaling: Scaling) -> None:
        self._scaling, self.rows = scaling, 0
        self.squares = self.mean = self.largest = torch.zeros(())

    def add(self, rows: Tensor) -> None:
        total = self.rows + len(rows)
        if self._scaling == "awq":
            self.squares = self.squares * (self.rows / total) + rows.T @ rows / total
            self.mean = self.mean * (self.rows / total) + rows.abs().sum(0) / total
        else:
            self.largest = torch.maximum(self.largest, rows.abs().amax(0))
        self.rows = total


def _searched(fold: Fold, seen: _Seen, wanted: Mapping[str, str]) -> Tensor:
    """Return AWQ's scales: of the powers of the channels' mean magnitude the one with the least error of the outputs,
    tr(D H D^T) for the error D of the weights and the second moments H of the inputs."""
    magnitude = _pooled(seen.mean, fold.index, "mean").clamp_min(SMALLEST * seen.mean.max())
    best, least = torch.ones_like(magnitude), torch.inf
    for step in range(STEPS):
        scales = magnitude ** (step / STEPS)
        scales = scales / (scales.max() * scales.min()).sqrt()
        error = 0.0
        for matrix in fold.consumers:
            if wanted.get(matrix.key, "fp32") != "fp32":
                columns = scales[fold.index]
                rounded = formats.decode(formats.encode(matrix.weight * columns, wanted[matrix.key])) / columns
                lost = rounded - matrix.weight.detach()
                error += float(((lost @ seen.squares) * lost).sum())
        if error < least:
            best, least = scales, error
    return best


def _migrated(fold: Fold, seen: _Seen) -> Tensor:
    """Return SmoothQuant's scales; channels that are never used, or read with zero weights, are left alone."""
    weights = torch.stack([matrix.weight.detach().abs().amax(0) for matrix in fold.consumers]).amax(0)
    weights, largest = (_pooled(x, fold.index, "amax") for x in (weights, seen.largest))
    scales = largest**MIGRATION / weights.clamp_min(1e-30) ** (1 - MIGRATION)
    return torch.where((largest > 0) & (weights > 0), scales.clamp(SMALLEST, 1 / SMALLEST), 1.0)


def _pooled(values: Tensor, index: Tensor, how: Literal["mean", "amax"]) -> Tensor:
    """Return the mean or the largest of the columns' `values` for each row that they read."""
    pooled = torch.zeros(int(index.max()) + 1, device=values.device)
    return pooled.scatter_reduce_(0, index.to(values.device), values, how, include_self=False)
