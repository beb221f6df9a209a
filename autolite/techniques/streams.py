"""What flows behind each block of a model on the calibration examples: run once for all cuts that imitate the model."""

from __future__ import annotations

from typing import Any

import psutil
import torch
from torch import Tensor

from autolite.surgery import clone
from autolite.techniques.base import Context, Student
from autolite.techniques.importance import scored_on
from autolite.techniques.observe import real
from autolite.techniques.walk import Kind, Use, Walk

MOST = 1 / 16  # of the free memory, that one model's may take

Streams = dict[tuple[Kind, int], list[Tensor]]  # by block: of each batch, float32 [tokens that are no padding, width]


def stream_behind(use: Use, inputs: dict[str, Tensor]) -> Tensor:
    """Return the residual stream behind an output projection."""
    return real(use.stream + use.output, inputs).float()


@torch.no_grad()
def streams_of(student: Student, context: Context) -> Streams | None:
    """Return the streams of a model, from `context.memory` if it was run before; None if they are too large to keep."""
    key = f"{scored_on(student, context)}-streams"
    if key not in context.memory:
        context.memory[key] = _run(student, context)
    found: Streams | None = context.memory[key]
    return found


def _run(student: Student, context: Context) -> Streams | None:
    model: Any = clone(student.model)
    model.to(context.device)
    walk, count = Walk(model, context), len(student.shape.stacks[0].layers)
    kinds: tuple[Kind, Kind] = ("attention", "ffn")
    streams: Streams = {(kind, index): [] for index in range(count) for kind in kinds}
    for number, inputs in enumerate(walk.batches):
        for use in walk.observe(number, streams):
            streams[use.kind, use.layer].append(stream_behind(use, inputs))
        size = sum(each[0].nbytes for each in streams.values()) * len(walk.batches)
        if number == 0 and size > psutil.virtual_memory().available * MOST:
            return None
    return streams
