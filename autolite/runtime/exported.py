"""Student -> ONNX for architectures that the map does not have: the graph that torch exports, played again.

Its nodes are added one by one to a graph of our own, in which equal nodes and tensors are one and nothing is left that
says where it was made; on the way each product with a weight matrix and each lookup of embeddings becomes that of the
matrix's number format.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autolite.errors import ModelError
from autolite.measure import Workload
from autolite.parts import Matrix, matrices_of
from autolite.runtime.graph import Graph, Input
from autolite.runtime.linear import Weights, decoded, encoded_of, lookup, products, weights_of
from autolite.runtime.skeleton import Skeleton, skeletons, structure
from autolite.runtime.variants import Choices, Place, usual
from autolite.techniques.base import Student
from autolite.unmapped import group_of, sample

KEPT = 8  # skeletons that are kept; a search has one, that of its teacher
# Inputs on which an exported graph must agree with the model before it is used: batch, tokens (at most as many as the
# model takes); the shorter sequences of a batch are padded. None is that of the export, which would show nothing about
# other sizes, and the last is longer than what some models do without their attention's windows and blocks.
TRIALS = ((1, 3), (3, 12), (2, 33), (1, 600))
TOLERANCE = 1e-3  # of the largest logit; what is wrong differs by far more

_known: dict[str, Skeleton] = {}


def emit(student: Student, file: Path, workload: Workload | None = None, choices: Choices = usual) -> list[Path]:
    """Write a student's graph as torch exports it, and return the files.

    The first student of a structure takes some seconds: it is exported, and the graph is run beside the model. Further
    ones, with other weights or number formats, take what writing their weights takes.

    Raises:
        ModelError: if torch cannot export the model, or what the runtime makes of the graph differs from the model.
        StorageError: if the files cannot be written.
    """
    with torch.no_grad():
        return _write(_skeleton(student), student, file, workload or Workload(), choices)


def _skeleton(student: Student) -> Skeleton:
    key = structure(student.model)
    if key not in _known:
        difference = ""
        for skeleton in skeletons(student.model):
            difference = _difference(skeleton, student)
            if not difference:
                break
        else:
            raise ModelError(
                f"the ONNX graph that torch exports of {type(student.model).__name__} is not equivalent to the model: "
                f"{difference}"
            )
        while len(_known) >= KEPT:
            _known.pop(next(iter(_known)))
        _known[key] = skeleton
    return _known[key]


def _difference(skeleton: Skeleton, student: Student) -> str:
    """Return in what the graph differs from the model on inputs of several sizes, "" if in nothing."""
    from autolite.runtime.onnxruntime import OnnxRuntime  # which emits through this module

    plain = Student(student.model, student.shape.without_formats())
    with tempfile.TemporaryDirectory() as folder:
        try:
            runner = OnnxRuntime().load(_write(skeleton, plain, Path(folder) / "trial.onnx", Workload(), usual)[0])
        except ModelError as error:
            return str(error)
        for batch, most in TRIALS:
            tokens = min(most, student.shape.positions)
            inputs = sample(student.model, batch, tokens, seed=tokens)
            expected = student.model(**inputs).logits.float().numpy()
            try:
                found = runner.run({name: tensor.numpy() for name, tensor in inputs.items()})["logits"]
            except ModelError as error:
                return str(error)
            if expected.ndim == 3 and "attention_mask" in inputs:
                real = inputs["attention_mask"].bool().numpy()
                found, expected = found[real], expected[real]
            worst = float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-6))
            if not worst <= TOLERANCE:  # also for nan
                return f"logits of {batch} x {tokens} tokens differ by {worst:.2%} of the largest"
    return ""


def _write(skeleton: Skeleton, student: Student, file: Path, workload: Workload, choices: Choices) -> list[Path]:
    player = _Player(skeleton, student, workload, choices)
    for node in skeleton.graph:
        player.play(node)
    (output,) = skeleton.graph.outputs
    value, axes = player.values[output], len(output.shape)
    dims: list[str | int] = ["batch", *(["tokens"] if axes == 3 else []), student.shape.outputs]
    inputs: dict[str, Input] = {name: (np.dtype(np.int64), ["batch", "tokens"]) for name in skeleton.inputs.values()}
    return player.graph.save(file, inputs, (value, "logits", dims))


@dataclass(eq=False)
class _Player:
    """Plays an exported graph's nodes, in order, into a graph of our own.

    `values` has what they read and made so far, by the exported graph's values. `weights` has those that are a
    parameter, and whether it is transposed.
    """

    skeleton: Skeleton
    student: Student
    workload: Workload
    choices: Choices
    graph: Graph = field(default_factory=Graph)
    values: dict[Any, str] = field(default_factory=dict)
    weights: dict[Any, tuple[str, bool]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.weights |= {value: (name, False) for value, name in self.skeleton.parameters.items()}
        self.values |= dict(self.skeleton.inputs)
        groups = matrices_of(self.student.model)
        self.matrices = {key: matrix for group in groups.values() for key, matrix in group.items()}
        self.parameters = dict(self.student.model.named_parameters())
        self.unsigned = self.choices(Place("int8")) == "uint8"

    @cached_property
    def tables(self) -> frozenset[str]:
        """Parameters that rows are looked up in."""
        looked_up = (node.inputs[0] for node in self.skeleton.graph if node.op_type == "Gather")
        return frozenset(self.skeleton.parameters[value] for value in looked_up if value in self.skeleton.parameters)

    @cached_property
    def fixed(self) -> frozenset[Any]:
        """Values that do not depend on the input."""
        found = set(self.skeleton.parameters)
        for node in self.skeleton.graph:
            inputs = [value for value in node.inputs if value is not None]
            if all(value in found or value.const_value is not None for value in inputs):
                found |= set(node.outputs)
        return frozenset(found)

    def play(self, node: Any) -> None:
        if all(output in self.values for output in node.outputs):
            return  # a bias that went into its product
        place = _place(node, self.student.model.base_model_prefix)
        with self.graph.scope(place) if place else nullcontext():
            if not self.special(node):
                self.copy(node, [self.value(value) for value in node.inputs])

    def special(self, node: Any) -> bool:
        """Add what stands for a node that is not simply copied; False if it is."""
        match node.op_type:
            case "Transpose" if node.inputs[0] in self.weights and len(node.inputs[0].shape) == 2:
                key, transposed = self.weights[node.inputs[0]]
                self.weights[node.outputs[0]] = key, not transposed
            case "MatMul" | "Gemm" if (matrix := self.factor(node)) is not None:
                self.multiply(node, matrix)
            case "Gather" if node.inputs[0] in self.weights and _attribute(node, "axis", 0) == 0:
                return self.look_up(node)
            case "RotaryEmbedding" if len(node.inputs) == 3:
                # ONNX Runtime wants cosines and sines for every sequence; the exporter gives them once.
                x, *tables = (self.value(value) for value in node.inputs)
                batch = self.graph.op("Shape", x, start=0, end=1)
                dims = self.graph.op("Concat", batch, self.graph.constant([1, 1]), axis=0)
                self.copy(node, [x, *(self.graph.op("Expand", table, dims) for table in tables)])
            case "Attention" if len(node.inputs) > 3 and node.inputs[3] is not None and node.inputs[3].shape[-2] == 1:
                # ONNX Runtime does not repeat a mask for the queries.
                query, key, value, mask, *rest = (self.value(value) for value in node.inputs)
                queries = self.graph.op("Shape", query, start=-2, end=-1)
                one = self.graph.constant([1])
                mask = self.graph.op("Expand", mask, self.graph.op("Concat", queries, one, axis=0))
                self.copy(node, [query, key, value, mask, *rest])
            case "ConstantOfShape":
                filled = (
                    node.attributes["value"].value.numpy() if "value" in node.attributes else np.zeros(1, "float32")
                )
                value = self.graph.constant(torch.from_numpy(np.array(filled)).reshape(()))
                self.values[node.outputs[0]] = self.graph.op("Expand", value, self.value(node.inputs[0]))
            case _:
                return False
        return True

    def copy(self, node: Any, inputs: Iterable[str]) -> None:
        attributes = {}
        for name, attribute in node.attributes.items():
            value = attribute.value
            if attribute.type.name in ("GRAPH", "GRAPHS", "TENSOR", "SPARSE_TENSOR"):
                raise ModelError(
                    f"{type(self.student.model).__name__} exports to a graph with {node.op_type} inside, which cannot "
                    "be emitted"
                )
            attributes[name] = tuple(value) if isinstance(value, list | tuple) else value
        made = self.graph.ops(node.op_type, len(node.outputs), *inputs, domain=node.domain, **attributes)
        self.values |= dict(zip(node.outputs, made, strict=True))

    def value(self, value: Any) -> str:
        """Return the name in our graph of a value in the exported one; a weight is stored when it is first read."""
        if value is None:
            return ""
        if value in self.weights:
            key, transposed = self.weights[value]
            name = self.stored(key)
            return self.graph.op("Transpose", name, perm=(1, 0)) if transposed else name
        if value not in self.values:
            self.values[value] = self.graph.constant(torch.from_numpy(np.array(value.const_value.numpy())))
        return self.values[value]

    def stored(self, key: str) -> str:
        """Return a parameter as it is; where a number format stands for it, decoded when the model is loaded."""
        if key not in self.student.encoded:
            return self.graph.constant(self.parameters[key])
        matrix = self.matrices[key]
        value, by_rows = decoded(self.graph, self.encoded(Matrix(key, matrix.weight, None, matrix.transposed)))
        return value if by_rows != matrix.transposed else self.graph.op("Transpose", value, perm=(1, 0))

    def factor(self, node: Any) -> Matrix | None:
        """Return the matrix that a product is with, if it is with one of the model's and as the model stores it."""
        if node.inputs[1] not in self.weights:
            return None
        key, transposed = self.weights[node.inputs[1]]
        matrix = self.matrices.get(key)
        if node.op_type == "Gemm":
            plain = {"alpha": 1.0, "beta": 1.0, "transA": 0}
            if any(_attribute(node, name, value) != value for name, value in plain.items()):
                return None
            if len(node.inputs) > 2 and node.inputs[2] is not None and not self.is_bias(node.inputs[2], matrix):
                return None
            transposed = transposed != bool(_attribute(node, "transB", 0))
        return matrix if matrix is not None and transposed != matrix.transposed else None

    def is_bias(self, value: Any, matrix: Matrix | None) -> bool:
        return value in self.weights and matrix is not None and tuple(value.shape) == (len(matrix.weight),)

    def multiply(self, node: Any, matrix: Matrix) -> None:
        """Add the product with a matrix, with the bias that is added to it alone."""
        graph, rows, made = self.graph, self.workload.batch * self.workload.tokens, node.outputs[0]
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if node.op_type == "MatMul" and len(uses := list(made.uses())) == 1 and uses[0].node.op_type == "Add":
            other = uses[0].node.inputs[1 - uses[0].idx]
            if self.is_bias(other, matrix):
                bias, made = other, uses[0].node.outputs[0]
        added = None if bias is None else self.parameters[self.weights[bias][0]]
        weights = self.encoded(Matrix(matrix.key, matrix.weight, added, matrix.transposed))
        x, flat = self.value(node.inputs[0]), len(node.inputs[0].shape) == 2
        if flat and not matrix.transposed:
            rows = self.workload.batch
        kernel = self.choices(Place("product", weights.format, (rows, weights.k, weights.n)))
        if node.inputs[0] in self.fixed:
            kernel = "float"  # runtimes compute it once, when they load the model; of other kernels they may not
        (found,) = products(
            graph, x if flat else graph.op("Reshape", x, graph.constant([-1, weights.k])), [weights], kernel
        )
        if not flat:
            dims = graph.op("Concat", graph.op("Shape", x, start=0, end=-1), graph.constant([weights.n]), axis=0)
            found = graph.op("Reshape", found, dims)
        self.values[node.outputs[0]] = self.values[made] = found

    def look_up(self, node: Any) -> bool:
        """Add the lookup of rows in a number format; False for a table in float32, which `Gather` reads."""
        key, transposed = self.weights[node.inputs[0]]
        if key not in self.student.encoded or transposed:
            return False
        graph, ids, matrix = self.graph, self.value(node.inputs[1]), self.matrices[key]
        width = matrix.weight.shape[1]
        rows = self.workload.batch * self.workload.tokens
        option = self.choices(Place("lookup", encoded_of(self.student.encoded, matrix).format, (rows, width)))
        flat = graph.op("Reshape", ids, graph.constant([-1]))
        found = lookup(graph, flat, matrix, self.student.encoded, self.unsigned, option)
        dims = graph.op("Concat", graph.op("Shape", ids), graph.constant([width]), axis=0)
        self.values[node.outputs[0]] = graph.op("Reshape", found, dims)
        return True

    def encoded(self, matrix: Matrix) -> Weights:
        table = matrix.key in self.tables
        return weights_of((matrix,), self.student.encoded, self.student.ranges, table, self.unsigned)


def _attribute(node: Any, name: str, default: Any) -> Any:
    return node.attributes[name].value if name in node.attributes else default


def _place(node: Any, body: str) -> str:
    """Return the layer and block that a node belongs to, as the names of all emitted nodes have it; "" for none.

    `body` is the name of the base model in the whole.
    """
    scopes = str(node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
    names = [part.strip(" '\"[]") for part in scopes.split(",")]
    modules = [name.removeprefix("model.") for name in names if name.startswith("model.")]
    inside = [name for name in modules if name.startswith(f"{body}.")]
    if not inside:
        return "head" if modules and modules[-1] != body else ""
    group = group_of(inside[-1])
    layer = re.search(r"\.(\d+)(\.|$)", inside[-1])
    if layer is None:
        return group if group == "embedding" else ""
    return f"layer.{layer[1]}/{group if group == 'attention' else 'ffn'}"
