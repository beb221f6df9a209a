"""A small ONNX graph builder in which equal tensors are stored once and equal nodes computed once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from autolite.runtime.modelfile import Tensor, write
from autolite.runtime.requirements import requirements

OPSET = 23  # the first with RMSNormalization
IR_VERSION = 10
CONTRIB = "com.microsoft"
LARGEST = 2**31 - 1

_TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(np.int8): TensorProto.INT8,
    np.dtype(np.int16): TensorProto.INT16,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.int32): TensorProto.INT32,
    np.dtype(np.int64): TensorProto.INT64,
    np.dtype(np.float64): TensorProto.DOUBLE,
    np.dtype(bool): TensorProto.BOOL,
}

Input = tuple[np.dtype[Any], Sequence[str | int | None]]  # an array's dtype and dimensions
Output = tuple[str, str, Sequence[str | int] | None]  # name in the graph, name to the outside, dimensions; float32


class Graph:
    """Collects nodes and stored tensors; values are referred to by name."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._tensors: list[Tensor] = []
        self._stored: dict[tuple[Any, ...], str] = {}
        self._computed: dict[tuple[Any, ...], list[str]] = {}
        self._uses: dict[str, int] = {}
        self._defaults: dict[str, Input] = {}
        self._scope = ""

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefix the names of the nodes added inside with `name` and a slash: what a profile is read by."""
        before, self._scope = self._scope, f"{self._scope}{name}/"
        try:
            yield
        finally:
            self._scope = before

    def constant(self, value: torch.Tensor | np.ndarray | float | Sequence[int]) -> str:
        """Store a tensor and return its name; an equal one is stored once. A float is stored as float32, a sequence
        of integers as int64. The bytes are read when the graph is saved, not copied."""
        bfloat16 = isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16
        if isinstance(value, torch.Tensor):
            array = value.detach().contiguous().view(torch.int16 if bfloat16 else value.dtype).numpy()
        elif isinstance(value, float):
            array = np.array(value, np.float32)
        else:
            array = np.ascontiguousarray(value if isinstance(value, np.ndarray) else np.array(value, np.int64))
        kind, dims = (TensorProto.BFLOAT16 if bfloat16 else _TYPES[array.dtype]), array.shape
        key = (kind, dims, hashlib.sha256(array.data).digest())
        if key not in self._stored:
            name = self._stored[key] = f"w{len(self._tensors)}"
            self._tensors.append(Tensor(name, kind, dims, array))
        return self._stored[key]

    def default(self, name: str, value: np.ndarray) -> str:
        """Add an input that takes this value where a caller does not give it, and return its name."""
        if name not in self._defaults:
            self._defaults[name] = (value.dtype, value.shape)
            self._tensors.append(Tensor(name, _TYPES[value.dtype], value.shape, value))
        return name

    def op(self, kind: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output, and return its name; "" is an input that is left out."""
        return self.ops(kind, 1, *inputs, domain=domain, **attributes)[0]

    def ops(self, kind: str, outputs: int, *inputs: str, domain: str = "", **attributes: Any) -> list[str]:
        """Add a node with several outputs and return their names; an equal node is not added again."""
        key = (kind, domain, outputs, inputs, tuple(sorted(attributes.items())))
        if key not in self._computed:
            name = f"{self._scope}{kind}_{len(self._nodes)}"
            names = [f"{kind}_{len(self._nodes)}_{i}" for i in range(outputs)]
            self._nodes.append(helper.make_node(kind, list(inputs), names, name, domain=domain, **attributes))
            self._computed[key] = names
        return self._computed[key]

    def slice(self, value: str, edges: tuple[int, int], axis: int) -> str:
        """Return the part of `value` between two positions of an axis."""
        start, stop = (self.constant([edge]) for edge in edges)
        return self.op("Slice", value, start, stop, self.constant([axis]))

    def distinct(self, value: str, axis: int) -> str:
        """Return `value` under a name of its own from its second use on.

        Where products of signed weights overflow, ONNX Runtime can convert them when it loads a model, but fails if
        two products read one tensor. A slice that ends beyond the axis is the whole, and computed at loading.
        """
        uses = self._uses[value] = self._uses.get(value, -1) + 1
        return self.slice(value, (0, LARGEST - uses), axis) if uses else value

    def save(self, file: Path, inputs: Mapping[str, Input], *outputs: Output) -> list[Path]:
        """Write the model and return its files, `file` first.

        Raises:
            StorageError: if the files cannot be written.
        """
        outside = {value: name for value, name, _ in outputs}
        for node in self._nodes:
            for names in (node.input, node.output):
                names[:] = [outside.get(name, name) for name in names]
        graph = helper.make_graph(
            self._nodes,
            "autolite",
            [
                helper.make_tensor_value_info(n, _TYPES[np.dtype(t)], d)
                for n, (t, d) in {**inputs, **self._defaults}.items()
            ],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for _, name, dims in outputs],
        )
        model = onnx.ModelProto(ir_version=IR_VERSION, producer_name="autolite", graph=graph)
        model.opset_import.extend([helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)])
        helper.set_model_props(model, requirements(model, {t.name: t.array for t in self._tensors}))
        return write(file, model, self._tensors)
