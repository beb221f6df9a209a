"""The loop in which a student is trained, whatever it is trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import torch
from torch import nn

from autolite.errors import PlanError
from autolite.techniques.checkpoint import Checkpoint, Trunk
from autolite.techniques.schedules import stable_steps, warm_up_stable_decay

WEIGHT_DECAY = 0.01  # of matrices; biases and layer norms have none
MAX_NORM = 1.0  # of the gradient

Item = TypeVar("Item")


@dataclass(frozen=True)
class Optimization:
    """AdamW, warm-up and decay of the learning rate (`warm_up_stable_decay`), gradients clipped to norm 1.

    `steps` updates are made, each from the mean of the losses of `accumulate` batches; `learning_rate` is the peak.
    `technique` is what messages call the settings by.
    """

    technique: str
    steps: int
    learning_rate: float
    accumulate: int = 1


def train(
    parameters: list[nn.Parameter],
    loss: Callable[[Item, int], torch.Tensor],
    batches: Iterator[Item],
    optimization: Optimization,
    *,
    seed: int,
    checkpoint: Checkpoint | None = None,
    trunk: Trunk | None = None,
    after_step: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Change `parameters` in place such that `loss` falls.

    On the processor, equal arguments and numbers of threads give equal bits, also if a run was killed and goes on from
    its checkpoint. torch's global generator is seeded inside and left as it was.

    Args:
        parameters: what is trained, the same ones in the same order in every run.
        loss: gives the scalar loss of an item of `batches` at a step (from 0).
        batches: without end, the same ones in every run.
        optimization: of the weights.
        seed: of what is random in the model or in `loss`.
        checkpoint: what the run goes on from, and is kept in; removed in the end.
        trunk: what it has in common with longer and shorter runs, and is begun with; `loss` must not depend on how
            many steps there are then.
        after_step: called after every update: to hold weights at zero, or to round them.
        progress: called with the steps done and in all, now and then.

    Raises:
        PlanError: if the loss or its gradient stops being finite.
        StorageError: if the checkpoint cannot be written.
    """
    steps, accumulate = optimization.steps, optimization.accumulate
    optimizer = _adamw(parameters, optimization.learning_rate)
    cuda = sorted({parameter.device.index for parameter in parameters if parameter.is_cuda})
    with torch.random.fork_rng(cuda):
        torch.manual_seed(seed)
        done = 0 if checkpoint is None else checkpoint.restore(parameters, optimizer)
        if trunk is not None and not done:
            done = trunk.restore(stable_steps(steps), parameters, optimizer)
        begun = done
        remaining = islice(batches, done * accumulate, None)
        for step in range(done, steps):
            if trunk is not None and step == stable_steps(steps) and step > begun:
                trunk.save(step, parameters, optimizer)
            rate = optimization.learning_rate * warm_up_stable_decay(step, steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            total = 0.0
            for item in islice(remaining, accumulate):
                part = loss(item, step) / accumulate
                torch.autograd.backward(part)
                total += part.item()
            norm = nn.utils.clip_grad_norm_(parameters, MAX_NORM).item()
            if not math.isfinite(total) or not math.isfinite(norm):
                raise PlanError(
                    f"{optimization.technique}.learning_rate: {optimization.learning_rate:g} made the loss {total:g} "
                    f"at step {step + 1} of {steps}; try {optimization.learning_rate / 10:g}"
                )
            optimizer.step()
            optimizer.zero_grad()
            after_step()
            if (step + 1) % 10 == 0 or step + 1 == steps:
                progress(step + 1, steps)
            if checkpoint is not None and checkpoint.due():
                checkpoint.save(step + 1, parameters, optimizer)
    if checkpoint is not None:
        checkpoint.remove()


def _adamw(parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, fused=True)
