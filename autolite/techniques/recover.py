"""Quantization-aware recovery: the weights learn to imitate the teacher from inside their number formats."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from autolite import formats, plan
from autolite.architecture import ModelShape
from autolite.errors import DataError, PlanError
from autolite.formats import Encoded
from autolite.parts import Matrix, matrices_of
from autolite.surgery import clone
from autolite.techniques.base import Context, Student
from autolite.techniques.distill import MAX_NORM, DistillConfig, _optimizer, batch_order, soft_loss
from autolite.techniques.teacher import autocast, forward, teacher_outputs, to_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from autolite.formats import Grid

REFIT = 20  # steps after which scales and codebooks are fitted again; codes are new in every step


class RecoverConfig(plan.Config):
    """Settings of the recovery; `Recover` has its loss.

    Attributes:
        steps: optimiser steps, each on one batch; 0 leaves the student as it is.
        bits: a student of which no matrix has as few bits is left as it is: rounding lost little.
        temperature: T of the softened distributions.
        alpha: weight of the hard loss; 1 - alpha is that of the soft one.
        learning_rate: peak of AdamW's learning rate.
        batch_size: examples in a batch.
    """

    steps: int = Field(300, ge=0)
    bits: int = Field(4, ge=1, le=16)
    temperature: float = Field(2.0, ge=1, le=20)
    alpha: float = Field(0.2, ge=0, le=1)
    learning_rate: float = Field(2e-4, gt=0, le=1)
    batch_size: int = Field(32, ge=1)


class Recover:
    """L = alpha * L_hard + (1 - alpha) * T^2 * KL(teacher_T || student_T), the student rounded to its formats.

    The gradient at the rounded weights moves the float32 masters, as if rounding had the slope 1 (the straight-through
    estimator; Bengio, Leonard & Courville 2013). Activations are not rounded meanwhile, and their static ranges stay.
    Afterwards every matrix is encoded again, to nearest. What starts is what was encoded, however it was rounded.
    """

    name: ClassVar[str] = "recover"
    Config: ClassVar[type[plan.Config]] = RecoverConfig
    numeric: ClassVar[bool] = False
    effort: ClassVar[str | None] = "steps"
    needs_map: ClassVar[bool] = False

    def resolve(self, shape: ModelShape, config: plan.Config, context: Context) -> plan.Config:
        """Return `config` without training if nothing is in few bits, so that such plans are one plan."""
        assert isinstance(config, RecoverConfig)
        few = any(formats.get(form).bits <= config.bits for form in shape.formats)
        return config if few else RecoverConfig(steps=0)

    def shape(self, shape: ModelShape, config: plan.Config) -> ModelShape:
        """Return `shape` itself."""
        return shape

    def apply(self, student: Student, config: plan.Config, context: Context) -> Student:
        """Return the student after `config.steps` steps, in the same formats.

        Raises:
            PlanError: if the loss stops being finite.
            DataError: if there is nothing to train on.
        """
        assert isinstance(config, RecoverConfig)
        config = self.resolve(student.shape, config, context)
        assert isinstance(config, RecoverConfig)
        if config.steps == 0:
            return student
        if not len(context.train):
            raise DataError("recover: the training split is empty")
        model: Any = clone(student.model)
        rounded = _Rounded(model, student.encoded)
        model.to(context.device)
        _train(model, rounded, config, context)
        model.cpu()
        return replace(student, model=model, encoded={**student.encoded, **rounded.encoded()})


class _Rounded:
    """The encoded matrices of a model: its masters, and the scales and codebooks that they are rounded with."""

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, encoded: Mapping[str, Encoded]) -> None:
        """Start from what the rounding chose: where it is not the nearest, the master becomes it."""
        self._model = model
        self.formats = {key: found.format for key, found in encoded.items()}
        self._grids: dict[str, Grid] = {}
        for key, matrix in self._matrices():
            grid, codes = formats.get(self.formats[key]).layout.read(encoded[key].tensors, encoded[key].shape[1])
            matrix.weight.copy_(
                torch.where(grid.quantize(matrix.weight) == codes, matrix.weight, grid.dequantize(codes))
            )
            self._grids[key] = grid

    def _matrices(self) -> list[tuple[str, Matrix]]:
        groups = matrices_of(self._model).values()
        return [(key, matrix) for group in groups for key, matrix in group.items() if key in self.formats]

    @torch.no_grad()
    def fit(self) -> None:
        """Fit scales and codebooks to the masters as they are."""
        self._grids = {key: formats.get(self.formats[key]).fit(matrix.weight.cpu()) for key, matrix in self._matrices()}

    def encoded(self) -> dict[str, Encoded]:
        """Return the masters rounded to nearest."""
        found = {}
        for key, matrix in self._matrices():
            grid, (n, k) = self._grids[key], matrix.weight.shape
            found[key] = Encoded(self.formats[key], (n, k), grid.tensors(grid.quantize(matrix.weight.detach().cpu())))
        return found

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model compute with the rounded values for a while; gradients reach the masters as they are."""
        with torch.no_grad():
            masters = [(matrix.weight, matrix.weight.clone()) for _, matrix in self._matrices()]
            for key, matrix in self._matrices():
                grid = self._grids[key]
                matrix.weight.copy_(grid.dequantize(grid.quantize(matrix.weight.cpu())))
        try:
            yield
        finally:
            with torch.no_grad():
                for weight, master in masters:
                    weight.copy_(master)


def _train(model: PreTrainedModel, rounded: _Rounded, config: RecoverConfig, context: Context) -> None:
    """Train `model` in place; its parameters' `requires_grad` is as before afterwards."""
    teacher = teacher_outputs(context, config.batch_size)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for module in model.modules():  # large, and in many bits hardly rounded
        if isinstance(module, nn.Embedding):
            for name, parameter in trainable.items():
                if parameter is module.weight and formats.get(rounded.formats.get(name, "fp32")).bits > config.bits:
                    parameter.requires_grad_(False)
    trained = [parameter for parameter in trainable.values() if parameter.requires_grad]
    optimizer, scheduler = _optimizer(trained, DistillConfig(steps=config.steps, learning_rate=config.learning_rate))
    model.train(False)
    for step, index in zip(range(config.steps), batch_order(len(teacher.batches), context.seed), strict=False):
        if step and step % REFIT == 0:
            rounded.fit()
        inputs, labels = to_tensors(teacher.batches[index], context.device)
        logits, _ = teacher.of(index, hidden=False)
        with rounded.in_place():
            with autocast(context.device):
                own, _ = forward(model, inputs, hidden=False)
            loss = torch.zeros((), device=context.device)
            if config.alpha > 0:
                loss = loss + config.alpha * context.task.loss(own.float(), labels)
            if config.alpha < 1:
                rows, targets = context.task.soft_targets(own, labels), context.task.soft_targets(logits, labels)
                loss = loss + (1 - config.alpha) * soft_loss(rows, targets, config.temperature)
            torch.autograd.backward(loss)
        norm = nn.utils.clip_grad_norm_(trained, MAX_NORM)
        if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
            raise PlanError(
                f"recover.learning_rate: {config.learning_rate:g} made the loss {loss.item():g} at step {step + 1} of "
                f"{config.steps}; try {config.learning_rate / 10:g}"
            )
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if (step + 1) % 10 == 0 or step + 1 == config.steps:
            context.progress(step + 1, config.steps)
    teacher.save()
    for parameter in trainable.values():
        parameter.requires_grad_(True)
