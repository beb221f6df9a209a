"""Distillation: the student learns the labels, the teacher's logits and the teacher's hidden states."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from autolite import plan
from autolite.architecture import ModelShape
from autolite.errors import DataError, PlanError
from autolite.surgery import clone
from autolite.techniques.base import Context, Student, require_float32
from autolite.techniques.sparsity import hold
from autolite.techniques.teacher import autocast, forward, teacher_outputs, to_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WARM_UP = 0.1  # fraction of the steps in which the learning rate rises
WEIGHT_DECAY = 0.01  # of matrices; biases and layer norms have none
MAX_NORM = 1.0  # of the gradient


class DistillConfig(plan.Config):
    """Settings of distillation; `Distill` has the loss they are part of.

    The defaults are what recovered a six-layer encoder of width 384, pruned to a quarter, best within 40 to 600 steps;
    learning rates of 1e-4 to 3e-4 were equal within the noise there, 1e-3 cost 3 points of accuracy.

    Attributes:
        steps: optimiser steps, each on one batch; 0 leaves the student as it is.
        temperature: T of the softened distributions.
        alpha: weight of the hard loss; 1 - alpha is that of the soft one.
        hidden: weight of the hidden-state loss.
        learning_rate: peak of AdamW's learning rate.
        batch_size: examples in a batch.
        embeddings: train the embedding tables too. They are most of a small model's weights and so of the optimiser's
            time, and the student starts from the teacher's.
    """

    steps: int = Field(300, ge=0)
    temperature: float = Field(4.0, ge=1, le=20)
    alpha: float = Field(0.2, ge=0, le=1)
    hidden: float = Field(1.0, ge=0, le=100)
    learning_rate: float = Field(2e-4, gt=0, le=1)
    batch_size: int = Field(32, ge=1)
    embeddings: bool = False


def soft_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return T^2 * KL(softmax(teacher / T) || softmax(student / T)), the mean over rows [m, classes], in nats.

    Source: Hinton, Vinyals & Dean 2015, "Distilling the Knowledge in a Neural Network"; T^2 keeps the gradient's
    size the same for every T.
    """
    log_student = F.log_softmax(student.float() / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def hidden_loss(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """Return the mean over layers of MSE(student, teacher) / variance(teacher) over the tokens in `mask`.

    States are [batch, tokens, width], paired by position in the sequences; `mask` is [batch, tokens], non-zero where a
    token is no padding. The variance is over all elements of the layer's state, so that 1 means "no better than the
    mean" in every layer. Source of the term: Jiao et al. 2020, "TinyBERT"; the normalisation is ours.
    """
    tokens = mask.bool()
    losses = []
    for ours, theirs in zip(student, teacher, strict=True):
        target = theirs[tokens].float()
        losses.append(F.mse_loss(ours[tokens].float(), target) / target.var(correction=0).clamp_min(1e-6))
    return torch.stack(losses).mean()


def layer_map(student: ModelShape, teacher: ModelShape) -> tuple[int, ...]:
    """Return for each layer of the student's last stack the teacher's layer that it imitates.

    The layer it came from, if the shape knows; else uniformly, layer l of L_s imitates round((l + 1) * L_t / L_s) - 1.
    The last always imitates the last, whose state the head reads. A model without an architecture map keeps all of its
    layers: nothing is said of them.
    """
    if student.unmapped is not None:
        return ()
    count, total = len(student.stacks[-1].layers), len(teacher.stacks[-1].layers)
    if student.source_layers:
        source = student.source_layers[-1]
    else:
        source = tuple(math.floor((layer + 1) * total / count + 0.5) - 1 for layer in range(count))
    return (*source[:-1], total - 1)


def batch_order(batches: int, seed: int) -> Iterator[int]:
    """Yield batch numbers for ever: each epoch is a new permutation of all of them."""
    rng = np.random.default_rng(seed)
    while True:
        yield from rng.permutation(batches).tolist()


class Distill:
    """L = alpha * L_hard + (1 - alpha) * T^2 * KL(teacher_T || student_T) + hidden * L_hidden.

    L_hard is the task's loss, the others are `soft_loss` and `hidden_loss`. AdamW, linear warm-up and decay, gradients
    clipped to norm 1. Dropout stays off: the student is smaller than the teacher and the runs are short.
    """

    name: ClassVar[str] = "distill"
    Config: ClassVar[type[plan.Config]] = DistillConfig
    numeric: ClassVar[bool] = False
    effort: ClassVar[str | None] = "steps"
    needs_map: ClassVar[bool] = False

    def resolve(self, shape: ModelShape, config: plan.Config, context: Context) -> plan.Config:
        """Return `config` itself: nothing in it depends on the teacher."""
        return config

    def shape(self, shape: ModelShape, config: plan.Config) -> ModelShape:
        """Return `shape` itself.

        Raises:
            PlanError: if matrices are already in a number format.
        """
        require_float32(self.name, shape)
        return shape

    def apply(self, student: Student, config: plan.Config, context: Context) -> Student:
        """Return the student after `config.steps` steps.

        Raises:
            PlanError: if the loss stops being finite, or hidden states of different widths are to be compared.
            DataError: if there is nothing to train on.
        """
        assert isinstance(config, DistillConfig)
        self.shape(student.shape, config)
        if config.steps == 0:
            return student
        ours, theirs = student.shape.stacks[-1].hidden, context.teacher.shape.stacks[-1].hidden
        if config.hidden and ours != theirs:
            raise PlanError(
                f"distill.hidden: the student's states are {ours} wide, the teacher's {theirs}; set it to 0"
            )
        if not len(context.train):
            raise DataError("distill: the training split is empty")
        model: Any = clone(student.model)
        model.to(context.device)
        _train(model, student.shape, layer_map(student.shape, context.teacher.shape), config, context)
        return replace(student, model=model.cpu())


def _train(
    model: PreTrainedModel, shape: ModelShape, layers: tuple[int, ...], config: DistillConfig, context: Context
) -> None:
    """Train `model` in place; its parameters' `requires_grad` is as before afterwards."""
    teacher = teacher_outputs(context, config.batch_size)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not config.embeddings:
        for table in (module for module in model.modules() if isinstance(module, nn.Embedding)):
            table.requires_grad_(False)
    trained = [parameter for parameter in trainable if parameter.requires_grad]
    optimizer, scheduler = _optimizer(trained, config)
    model.train(False)
    keep_zeros = hold(model, shape)
    order = batch_order(len(teacher.batches), context.seed)
    for step, index in zip(range(1, config.steps + 1), order, strict=False):
        batch = teacher.batches[index]
        inputs, labels = to_tensors(batch, context.device)
        logits, states = teacher.of(index, hidden=config.hidden > 0)
        with autocast(context.device):
            own_logits, own_states = forward(model, inputs, hidden=config.hidden > 0)
        loss = torch.zeros((), device=context.device)
        if config.alpha > 0:
            loss = loss + config.alpha * context.task.loss(own_logits.float(), labels)
        if config.alpha < 1:
            rows, targets = context.task.soft_targets(own_logits, labels), context.task.soft_targets(logits, labels)
            loss = loss + (1 - config.alpha) * soft_loss(rows, targets, config.temperature)
        if config.hidden > 0 and own_states:
            wanted = [states[layer] for layer in layers] or states
            mask = inputs.get("attention_mask", torch.ones(own_states[0].shape[:2], device=context.device))
            loss = loss + config.hidden * hidden_loss(own_states, wanted, mask)
        torch.autograd.backward(loss)
        norm = nn.utils.clip_grad_norm_(trained, MAX_NORM)
        if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
            raise PlanError(
                f"distill.learning_rate: {config.learning_rate:g} made the loss {loss.item():g} at step {step} of "
                f"{config.steps}; try {config.learning_rate / 10:g}"
            )
        optimizer.step()
        keep_zeros()
        scheduler.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == config.steps:
            context.progress(step, config.steps)
    teacher.save()
    for parameter in trainable:
        parameter.requires_grad_(True)


def _optimizer(parameters: list[nn.Parameter], config: DistillConfig) -> tuple[torch.optim.Optimizer, Any]:
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
    warm = max(1, round(WARM_UP * config.steps))

    def rate(done: int) -> float:
        return min((done + 1) / warm, (config.steps - done) / max(1, config.steps - warm), 1.0)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
