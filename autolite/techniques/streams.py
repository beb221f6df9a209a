"""What flows behind each block of a model on the calibration examples: run once for all cuts that imitate the model."""

from __future__ import annotations

import psutil
import torch
from torch import Tensor

from autolite.surgery import moved
from autolite.techniques.base import Context, Student
from autolite.techniques.importance import scored_on
from autolite.techniques.observe import real
from autolite.techniques.walk import Kind, Use, Walk

MOST = 1 / 16  # of the free memory, that one model's may take
MODELS = 4  # whose streams are kept at once

Streams = dict[tuple[Kind, int], list[Tensor]]  # by block: of each batch, float32 [tokens that are no padding, width]


def stream_behind(use: Use, inputs: dict[str, Tensor]) -> Tensor:
    """Return the residual stream behind an output projection."""
    return real(use.stream + use.output, inputs).float()


@torch.no_grad()
def streams_of(student: Student, context: Context) -> Streams | None:
    """Return the streams of a model, on the processor, from `context.memory` if it was run lately; None if they are too
    large to keep."""
    known: dict[str, Streams | None] = context.memory.setdefault("streams", {})
    name = scored_on(student, context)
    found = known.pop(name) if name in known else _run(student, context)
    known[name] = found  # the last one used is the last to go
    if len(known) > MODELS:
        del known[next(iter(known))]
    return found


def _run(student: Student, context: Context) -> Streams | None:
    walk, count = Walk(moved(student.model, context.device), context), len(student.shape.stacks[0].layers)
    kinds: tuple[Kind, Kind] = ("attention", "ffn")
    streams: Streams = {(kind, index): [] for index in range(count) for kind in kinds}
    room = psutil.virtual_memory().available * MOST
    for number, inputs in enumerate(walk.batches):
        for use in walk.observe(number, streams):
            streams[use.kind, use.layer].append(stream_behind(use, inputs).cpu())
        room -= sum(each[-1].nbytes for each in streams.values())
        if room < 0:
            return None
    return streams
