"""Quantization-aware recovery: the weights learn to imitate the teacher from inside their number formats."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import nn
from torch.nn.functional import embedding
from torch.nn.utils import parametrize

from autolite import formats, plan
from autolite.architecture import ModelShape
from autolite.formats import Encoded
from autolite.parts import Matrix, matrices_of
from autolite.surgery import clone
from autolite.techniques.base import Context, Student
from autolite.techniques.distill import DistillConfig, stream
from autolite.techniques.objective import Objective
from autolite.techniques.sparsity import hold
from autolite.techniques.training import Optimization, train

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
        model: Any = clone(student.model)
        roundings = _roundings(model, student.encoded)
        model.to(context.device).train(False)
        _train(replace(student, model=model), roundings, config, context)
        model.cpu()
        return replace(student, model=model, encoded=_encoded(model, student.encoded, roundings))


def _train(student: Student, roundings: Mapping[str, _Rounding], config: RecoverConfig, context: Context) -> None:
    """Train the student's model in place; its parameters' `requires_grad` is as before afterwards."""
    model: Any = student.model
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    # Large, and in many bits hardly rounded
    whole = {
        name
        for name, parameter in trainable.items()
        if id(parameter) in tables
        and (name not in student.encoded or formats.get(student.encoded[name].format).bits > config.bits)
    }
    for name in whole:
        trainable[name].requires_grad_(False)
    settings = DistillConfig(
        steps=config.steps,
        temperature=config.temperature,
        alpha=config.alpha,
        hidden=0.0,
        learning_rate=config.learning_rate,
        batch_size=config.batch_size,
    )
    keep_zeros = hold(model, student.shape)
    with _rounded(model, roundings):
        done = 0

        def after_step() -> None:
            nonlocal done
            done += 1
            keep_zeros()
            if done % REFIT == 0:
                for rounding in roundings.values():
                    rounding.grid = None

        train(
            [parameter for name, parameter in trainable.items() if name not in whole],
            Objective.of(student, settings, context),
            stream(settings, context),
            Optimization(Recover.name, config.steps, config.learning_rate),
            seed=context.seed,
            after_step=after_step,
            progress=context.progress,
        )
    for parameter in trainable.values():
        parameter.requires_grad_(True)
        parameter.grad = None


class _Rounding(nn.Module):
    """Rounds a parameter to its format in the forward pass; the gradient passes through as if it did not. Scales and
    codebooks are those of `grid`; where that is None they are fitted to the weights as they are."""

    def __init__(self, format: str, transposed: bool, grid: Grid) -> None:
        super().__init__()
        self.format, self.transposed = format, transposed
        self.grid: Grid | None = grid

    def fitted(self, weight: torch.Tensor) -> Grid:
        """Return the scales and codebooks that a matrix [n, k] is rounded with."""
        if self.grid is None:
            self.grid = formats.get(self.format).fit(weight)
        return self.grid

    def forward(self, master: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            weight = (master.T if self.transposed else master.flatten(1)).cpu().contiguous()
            grid = self.fitted(weight)
            rounded = grid.dequantize(grid.quantize(weight))
            rounded = (rounded.T if self.transposed else rounded).reshape(master.shape).to(master.device)
        return master + (rounded - master).detach()

    def look_up(self, table: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        """Return the rows of a table that tokens have, rounded. Of the others none is: a table is large, and a batch
        has few of its tokens."""
        found = embedding(ids, table.weight, table.padding_idx)
        with torch.no_grad():
            numbers, places = torch.unique(ids, return_inverse=True)
            grid = self.fitted(table.weight.cpu()).rows(numbers.cpu())
            rounded = grid.dequantize(grid.quantize(table.weight[numbers].cpu())).to(found.device)[places]
        return found + (rounded - found).detach()


def _matrices(model: PreTrainedModel, keys: Collection[str]) -> Iterator[tuple[str, Matrix]]:
    for group in matrices_of(model).values():
        yield from ((key, matrix) for key, matrix in group.items() if key in keys)


@torch.no_grad()
def _roundings(model: PreTrainedModel, encoded: Mapping[str, Encoded]) -> dict[str, _Rounding]:
    """Return how each matrix is rounded, by its key, at first as it was encoded; a master whose nearest codes are not
    the chosen ones becomes what those stand for."""
    found = {}
    for key, matrix in _matrices(model, encoded):
        form = encoded[key].format
        grid, codes = formats.get(form).layout.read(encoded[key].tensors, encoded[key].shape[1])
        nearest = grid.quantize(matrix.weight) == codes
        matrix.weight.copy_(torch.where(nearest, matrix.weight, grid.dequantize(codes)))
        found[key] = _Rounding(form, matrix.transposed, grid)
    return found


@torch.no_grad()
def _encoded(
    model: PreTrainedModel, before: Mapping[str, Encoded], roundings: Mapping[str, _Rounding]
) -> dict[str, Encoded]:
    """Return the masters rounded to nearest, by the scales and codebooks that they were trained with."""
    found = dict(before)
    for key, matrix in _matrices(model, roundings):
        weight, rounding = matrix.weight.contiguous(), roundings[key]
        grid = rounding.fitted(weight)
        found[key] = Encoded(rounding.format, before[key].shape, grid.tensors(grid.quantize(weight)))
    return found


@contextmanager
def _rounded(model: PreTrainedModel, roundings: Mapping[str, _Rounding]) -> Iterator[None]:
    """Let the modules that own the matrices compute with their rounded values for a while."""
    keys = {id(parameter): key for key, parameter in model.named_parameters() if key in roundings}
    owners = [
        (module, keys[id(module._parameters["weight"])])
        for module in model.modules()
        if id(module._parameters.get("weight")) in keys
    ]
    tables: list[tuple[Any, str]] = [each for each in owners if type(each[0]) is nn.Embedding]
    owners = [each for each in owners if each not in tables]
    for table, key in tables:
        table.forward = partial(roundings[key].look_up, table)
    for module, key in owners:
        parametrize.register_parametrization(module, "weight", roundings[key], unsafe=True)
    try:
        yield
    finally:
        for table, _ in tables:
            del table.forward
        for module, _ in owners:
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
            for name in [name for name in module._parameters if name != "weight"]:  # the weight comes first again
                module._parameters[name] = module._parameters.pop(name)
