"""ONNX Runtime's own trace of a session's calls, as its `end_trace` leaves it; nothing else reads that file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from autolite.errors import ModelError
from autolite.runtime.flops import Tensor

_SUFFIX = "_kernel_time"  # the trace adds it to the name of each node
_CALL = "model_run"  # the trace's event for a whole call, after those of its nodes
_CONTROL = frozenset(["If", "Loop", "Scan"])  # their events enclose those of the nodes inside


@dataclass(frozen=True, slots=True)
class Kernel:
    """What the trace says of a node: its operator, and the tensors that went in and came out."""

    operator: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Event:
    """One run of one node in a trace; `microseconds` are whole ones, rounded down, without those of nodes inside."""

    name: str
    kernel: Kernel
    start: int
    microseconds: int


def read_trace(file: Path) -> list[list[Event]]:
    """Return the events of each call, in the order they ended.

    Raises:
        ModelError: if the file is not a trace as ONNX Runtime writes it.
    """
    calls: list[list[Event]] = []
    current: list[Event] = []
    spans: list[tuple[int, int]] = []  # start and microseconds of nodes that no other node encloses so far
    try:
        with file.open(encoding="utf-8") as stream:
            events = json.load(stream, object_hook=_slim)
        for event in events:
            if event["cat"] == "Node" and event["name"].endswith(_SUFFIX):
                start, own = event["ts"], event["dur"]
                if event["args"].operator in _CONTROL:
                    while spans and spans[-1][0] >= start:
                        own -= spans.pop()[1]
                spans.append((start, event["dur"]))
                current.append(Event(event["name"].removesuffix(_SUFFIX), event["args"], start, own))
            elif event["name"] == _CALL:
                calls.append(current)
                current, spans = [], []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"ONNX Runtime wrote a trace that this version of AutoLite cannot read ({error!r:.200}); install the "
            "onnxruntime of its constraints.txt"
        ) from error
    return calls


def _slim(found: dict[str, Any]) -> Any:
    """Keep of an event's arguments only what is used: a trace has a hundred thousand of them, mostly equal."""
    if "op_name" in found:
        return _kernel(found["op_name"], tuple(found["input_type_shape"]), tuple(found["output_type_shape"]))
    if len(found) == 1:
        ((kind, dims),) = found.items()
        if isinstance(dims, list):
            return _tensor(kind, tuple(dims))
    return found


@cache
def _tensor(kind: str, shape: tuple[int, ...]) -> Tensor:
    return Tensor(kind, shape)


@cache
def _kernel(operator: str, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> Kernel:
    return Kernel(operator, inputs, outputs)
