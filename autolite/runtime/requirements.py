"""What a model needs of the ONNX Runtime that loads it: recorded in the model, checked before it is loaded.

The record is in the model's metadata: `autolite.requires` is JSON (the first release of ONNX Runtime that runs it, the
opset, and the operators by domain), and `autolite.codes` is "s8" if it multiplies signed 8-bit weights that overflow
on x86 processors without VNNI, unless the session is made with `session.x64quantprecision`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto

from autolite.errors import ModelError
from autolite.runtime.modelfile import DATA, read_head

REQUIRES, CODES = "autolite.requires", "autolite.codes"
SIGNED = "s8"

# The first releases that compute what ours does: found by running graphs of each opset, and of each of these operators
# with the attributes and inputs it is emitted with, in the wheels of 1.15 to 1.32. Operators that all of them have,
# or that came with their opset, are not listed.
_OPSETS = {20: "1.17.0", 21: "1.18.0", 22: "1.21.0", 23: "1.23.0", 24: "1.24.1", 26: "1.25.0", 27: "1.32.0"}
_OPERATORS = {
    "Attention": "1.23.1",  # 1.23.0 mixes up the heads where several query heads read one key/value head
    "GatherBlockQuantized": "1.23.0",  # of uint8 codes
    "GroupQueryAttention": "1.23.0",  # what is added to the scores; older releases do not have the opset
    "MatMulNBits": "1.19.0",  # a bias; right results with accuracy level 4
    "MultiHeadAttention": "1.17.0",  # a mask by token; causal
    "RotaryEmbedding": "1.16.0",
    "SkipSimplifiedLayerNormalization": "1.16.0",
}
_BITS = {("MatMulNBits", 8): "1.22.0", ("MatMulNBits", 2): "1.24.1"}
# Products of unsigned activations with signed weights, and which input the weights are.
_PRODUCTS = {
    "DynamicQuantizeMatMul": 1,
    "MatMulInteger": 1,
    "MatMulIntegerToFloat": 1,
    "QAttention": 1,
    "QGemm": 3,
    "QLinearMatMul": 3,
}
_MOVES = ("Identity", "Reshape", "Slice", "Transpose")  # what leaves the codes of weights as they are
_LARGEST_CODE = 64


def requirements(model: ModelProto, constants: Mapping[str, np.ndarray], least: str = "") -> dict[str, str]:
    """Return the metadata for a model whose stored tensors are `constants`; `least` is the release that it needs if
    that is more than its operators do."""
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    operators: dict[str, set[str]] = {}
    for node in model.graph.node:
        operators.setdefault(node.domain or "ai.onnx", set()).add(node.op_type)
    needed: dict[str, Any] = {
        "onnxruntime": least or first_release(opset, model.graph.node),
        "opset": opset,
        "operators": {domain: sorted(names) for domain, names in sorted(operators.items())},
    }
    codes = {CODES: SIGNED} if overflowing(model.graph.node, constants) else {}
    return {REQUIRES: json.dumps(needed), **codes}


def first_release(opset: int, nodes: Iterable[NodeProto]) -> str:
    """Return the first release of ONNX Runtime that runs nodes of an opset.

    >>> from onnx import helper
    >>> first_release(21, [helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], bits=8)])
    '1.22.0'
    """
    found = [release for known, release in _OPSETS.items() if known <= opset] or ["1.16.0"]
    for node in nodes:
        bits = next((a.i for a in node.attribute if a.name == "bits"), None)
        found += [r for r in (_OPERATORS.get(node.op_type), _BITS.get((node.op_type, bits or 0))) if r]
    return max(found, key=_version)


def overflowing(nodes: Iterable[NodeProto], constants: Mapping[str, np.ndarray]) -> list[NodeProto]:
    """Return the products with signed 8-bit weights that do not fit in 16 bits in pairs: 2 * 255 * 64 does."""
    nodes = list(nodes)
    made = {output: node for node in nodes for output in node.output}
    found = []
    for node in nodes:
        if node.op_type in _PRODUCTS:
            source = node.input[_PRODUCTS[node.op_type]]
            while source in made and made[source].op_type in _MOVES:
                source = made[source].input[0]
            codes = constants.get(source)
            if codes is not None and codes.dtype == np.int8 and max(codes.max(), -int(codes.min())) > _LARGEST_CODE:
                found.append(node)
    return found


def required(file: Path) -> dict[str, Any]:
    """Return what the model in a file needs: `onnxruntime` as a version specifier, and `opset`; empty if the model
    does not say.

    Raises:
        ModelError: if the file is no ONNX model.
    """
    found = json.loads(metadata_of(file).get(REQUIRES, "{}"))
    return {"onnxruntime": f">={found['onnxruntime']}", "opset": found["opset"]} if found else {}


def metadata_of(file: Path) -> dict[str, str]:
    """Return the metadata of the ONNX model in a file.

    Raises:
        ModelError: if it is no ONNX model.
    """
    return {entry.key: entry.value for entry in read_head(file).metadata_props}


def check(file: Path, installed: str) -> None:
    """Check that the ONNX model in a file can be loaded by version `installed` of ONNX Runtime.

    Raises:
        ModelError: if the file is no ONNX model or truncated, if its data file is missing or truncated, or if the
            runtime is too old.
    """
    metadata = metadata_of(file)
    check_version(file, metadata, installed)
    if DATA in metadata:
        size, name = metadata[DATA].split(" ", 1)
        data = file.with_name(name)
        if not data.is_file():
            raise ModelError(
                f"cannot load {file}: its weights are in {data.name} ({int(size):,} bytes), which is not beside it; "
                "copy both files"
            )
        if data.stat().st_size < int(size):
            raise ModelError(
                f"cannot load {file}: {data.name} is truncated, {data.stat().st_size:,} of {int(size):,} bytes; "
                "export or copy it again"
            )


def check_version(file: Path, metadata: Mapping[str, str], installed: str) -> None:
    """Check that version `installed` of ONNX Runtime has all that a model's metadata ask for.

    Raises:
        ModelError: if it is too old.
    """
    needs = json.loads(metadata.get(REQUIRES, "{}")).get("onnxruntime", "0")
    if _version(installed) < _version(needs):
        raise ModelError(
            f"{file} needs onnxruntime >= {needs}, this is {installed}: pip install 'onnxruntime>={needs}'"
        )


def _version(text: str) -> tuple[int, ...]:
    """Return the numbers of a release: "1.24.0.dev7" is as new as 1.24.0."""
    return tuple(int(part) for part in text.split("+")[0].split(".")[:3] if part.isdigit())
