"""ONNX -> ORT, the format that reduced builds of ONNX Runtime load: on phones, and in browsers.

A runtime computes nothing of such a file beforehand, so it is optimised when it is written: at the highest level, as a
session does with the ONNX file, but without the layout of convolutions that only x86 processors have. What comes out
for our graphs is the same on x86 and on arm64, node by node and bit by bit. Weights that are decoded at loading are
stored decoded, so a file with 4-bit weights of one codebook is larger than the ONNX file.
"""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto, TensorProto, helper, numpy_helper

from autolite.errors import ModelError, StorageError
from autolite.files import sha256, write_atomically
from autolite.runtime import genai
from autolite.runtime.requirements import overflowing, requirements

FILE, OPERATORS = "model.ort", "required_operators.config"
LARGEST = 2**31 - 2**20  # bytes that the format can hold
_ZERO_POINTS = {"DynamicQuantizeMatMul": 3, "MatMulInteger": 3, "MatMulIntegerToFloat": 5}  # which input they are


def convert(file: Path, folder: Path) -> list[Path]:
    """Write `model.ort` and `required_operators.config` (for who builds a runtime with these operators only) into
    `folder`, from the ONNX model in `file`, and return them.

    It computes what the ONNX model does, exactly, on every processor: 8-bit weights lose their sign, since no runtime
    converts them at loading. It needs the version of ONNX Runtime that is installed here, or a newer one.

    Raises:
        ModelError: if the model has more than 2 GiB, which the format cannot hold.
        StorageError: if the files cannot be written.
    """
    made, operators = folder / FILE, folder / OPERATORS
    size = sum(part.stat().st_size for part in file.parent.glob(f"{file.name}*"))
    if size > LARGEST:
        raise ModelError(f"{file} has {size:,} bytes, and a file in the ORT format at most {LARGEST:,}; keep ONNX")
    try:
        with tempfile.TemporaryDirectory() as temporary:
            optimised = Path(temporary) / "optimised.onnx"
            optimise(file, optimised)
            model = onnx.load(optimised, load_external_data=False)
            onnx.load_external_data_for_model(model, str(file.parent))
            _drop_signs(model)
            helper.set_model_props(model, requirements(model, {}, least=str(onnxruntime.__version__)))
            onnx.save(model, optimised)
            _save(optimised, made)
        operators.write_text(_operators(made), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write {made}: {error.strerror or error}. Free some space") from error
    return [made, operators]


def convert_folder(folder: Path) -> None:
    """Replace the ONNX model of a candidate's folder by one in the ORT format, in its manifest and card too.

    Raises:
        ModelError: if the candidate is not for ONNX Runtime, or as `convert`.
        StorageError: if the files cannot be written.
    """
    manifest = json.loads((folder / "autolite.json").read_text(encoding="utf-8"))
    (artifact,) = manifest["artifacts"]
    if artifact["runtime"] != "onnxruntime":
        raise ModelError(f"{folder} is for {artifact['runtime']}: only ONNX Runtime has the ORT format")
    source = folder / artifact["files"][0]
    made = convert(source, folder)
    for name in artifact["files"]:
        (folder / name).unlink()
        manifest["sha256"].pop(name, None)
    card = folder / "README.md"
    size, version = made[0].stat().st_size, onnxruntime.__version__
    settings = folder / genai.FILE
    for file in (card, settings) if settings.is_file() else (card,):
        file.write_text(file.read_text(encoding="utf-8").replace(source.name, FILE), encoding="utf-8")
    note = f"\n`{FILE}` ({size:,} bytes) was made from the ONNX model with onnxruntime {version}: load it with that "
    note += f"version or a newer one. `{OPERATORS}` lists its operators, for building a runtime with no others.\n"
    with card.open("a", encoding="utf-8") as stream:
        stream.write(note)
    artifact |= {"files": [FILE], "format": "ort", "requires": {"onnxruntime": f">={version}"}}
    manifest["sha256"] |= {path.name: sha256(path) for path in (*made, card, settings) if path.is_file()}
    write_atomically(folder / "autolite.json", json.dumps(manifest, indent=1, allow_nan=False).encode())


def optimise(file: Path, out: Path) -> None:
    """Write the graph that ONNX Runtime makes of a model, but for the layout of convolutions that only x86 has."""
    options = _options(onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL, out)
    onnxruntime.InferenceSession(
        str(file), options, providers=["CPUExecutionProvider"], disabled_optimizers=["NchwcTransformer"]
    )


def _save(file: Path, out: Path) -> None:
    options = _options(onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL, out)
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def _options(level: Any, out: Path) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.optimized_model_filepath = str(out)
    options.log_severity_level = 4
    return options


def _drop_signs(model: ModelProto) -> None:
    """Store weights whose products overflow on some processors as unsigned codes with a zero point of 128."""
    stored = {t.name: t for t in model.graph.initializer}
    signed = {name: numpy_helper.to_array(t) for name, t in stored.items() if t.data_type == TensorProto.INT8}
    for node in overflowing(model.graph.node, signed):
        name, place = node.input[1], _ZERO_POINTS[node.op_type]
        if f"{name}_unsigned" not in stored:
            codes = (signed[name].astype(np.int16) + 128).astype(np.uint8)
            stored[f"{name}_unsigned"] = numpy_helper.from_array(codes, f"{name}_unsigned")
        columns = signed[name].shape[-1]
        zero = np.full(columns, 128, np.uint8)
        stored[f"middle_{columns}"] = numpy_helper.from_array(zero, f"middle_{columns}")
        node.input.extend([""] * (place + 1 - len(node.input)))
        node.input[1], node.input[place] = f"{name}_unsigned", f"middle_{columns}"
    used = {name for node in model.graph.node for name in node.input}
    del model.graph.initializer[:]
    model.graph.initializer.extend(tensor for name, tensor in stored.items() if name in used)


def _operators(file: Path) -> str:
    """Return what ONNX Runtime's build scripts take with --include_ops_by_config, as its own tool makes it."""
    logging.disable(logging.INFO)  # it reports each step
    try:
        from onnxruntime.tools.ort_format_model import create_config_from_models

        with tempfile.TemporaryDirectory() as temporary:
            out = Path(temporary) / OPERATORS
            create_config_from_models([file], out, False)
            lines = out.read_text(encoding="utf-8").splitlines()
    finally:
        logging.disable(logging.NOTSET)
    return "".join(f"{line}\n" for line in lines if not line.startswith("#"))  # comments have paths of this machine
