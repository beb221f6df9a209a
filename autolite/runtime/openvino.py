"""OpenVINO on the CPU: the second runtime, for x86 processors; comes with the extra autolite[openvino].

The model is emitted as ONNX of operators that OpenVINO's importer knows, read by it, and changed where its CPU plugin
runs another form of the same faster. What that is was measured (OpenVINO 2026.4, MiniLM):

- Attention of plain products, mask and softmax becomes one kernel; ScaledDotProductAttention does too, with more
  transposes. Keys are best transposed by the product.
- Rounding of activations to 8 bits takes 17 us for 128 x 384 values in three dimensions and 165 us in two, where each
  row is a channel; but after an activation function it is part of the product before it, if nothing stands between.
- Weights of 8 bits stay compressed. Those of 4 bits are decoded when the model is loaded: OpenVINO's own products with
  4-bit weights were no faster than with 8 bits.
"""

from __future__ import annotations

import re
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from autolite.errors import InputError, ModelError, StorageError
from autolite.formats import FORMATS
from autolite.measure import Workload
from autolite.products import matmuls
from autolite.runtime import emit
from autolite.runtime.inputs import Takes, fitted
from autolite.runtime.variants import Place, usual
from autolite.saturation import saturates
from autolite.techniques.base import Student

FILE = "model.xml"
_OURS = "autolite"  # where a model's notes to its loader are
_UNNAMED = r"[A-Za-z]+_\d+"  # what OpenVINO calls a node by itself: the number is how many its process has made
_FUSED = ("Gelu", "Relu", "Sigmoid", "Swish", "Tanh")  # the plugin rounds what these give inside the product before


class OpenVino:
    """Emits `model.xml` and `model.bin`, and runs them in plain OpenVINO.

    Only products of the format "int8-static" are 8-bit ones, on processors where these do not overflow. For formats
    that quantize activations by the range of each call, OpenVINO does so on processors with 8-bit dot products, by
    groups of 32 inputs; elsewhere, and for those that are about stored bytes, activations stay in floating point.
    """

    name = "openvino"
    formats = frozenset(FORMATS)

    @property
    def version(self) -> str:
        """Version of the installed OpenVINO.

        Raises:
            InputError: if it is not installed.
        """
        return str(imported().__version__).partition("-")[0]

    def emit(self, student: Student, folder: Path, workload: Workload | None = None, tuned: bool = False) -> list[Path]:
        """Write the artifact; it is the same for all workloads and on all machines.

        Raises:
            InputError: if OpenVINO is not installed.
            ModelError: if the model has a part that cannot be emitted; see `autolite.runtime.emit.emit`.
            StorageError: if the files cannot be written.
        """
        ov = imported()
        with tempfile.TemporaryDirectory() as scratch:
            file, *_ = emit.emit(student, Path(scratch), workload, _choose, cache=False)
            try:
                model = ov.Core().read_model(file)
            except RuntimeError as error:
                raise ModelError(f"OpenVINO cannot read the model as ONNX ({_reason(error)})") from None
            _improve(model)
            _annotate(model, student)
            files = [folder / FILE, (folder / FILE).with_suffix(".bin")]
            try:
                folder.mkdir(parents=True, exist_ok=True)
                ov.serialize(model, *map(str, files))
            except (OSError, RuntimeError) as error:
                reason = _reason(error)
                raise StorageError(
                    f"cannot write {files[0]}: {reason}. Free some space or choose another folder"
                ) from error
        return files

    def load(self, file: Path, threads: int = 1) -> OpenVinoRunner:
        """Load a model to run it on `threads` threads.

        Raises:
            InputError: if OpenVINO is not installed.
            ModelError: if a file is missing, truncated, or not a model that OpenVINO can load.
        """
        ov = imported()
        for part in (file, file.with_suffix(".bin")):
            if not part.is_file():
                raise ModelError(f"there is no model at {file}: {part.name} is missing; export it again")
        with file.open("rb") as stream:
            if stream.read(5) != b"<?xml":  # every other importer would be tried on it
                raise ModelError(f"cannot load {file}: it is damaged, or no model of OpenVINO; export it again")
        core = ov.Core()
        try:
            model = core.read_model(file)
            settings = {
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": threads,
                "NUM_STREAMS": 1,
                # Two processes that run models would be bound to the same cores.
                "ENABLE_CPU_PINNING": False,
                # Left to itself, OpenVINO computes in bfloat16 where the processor can.
                "INFERENCE_PRECISION_HINT": _notes(model).get("precision", "f32"),
                # 8-bit products. Where they overflow, those in floating point are exact, and as fast or faster.
                "LP_TRANSFORMS_MODE": not saturates(),
            }
            return OpenVinoRunner(model, core.compile_model(model, "CPU", settings))
        except RuntimeError as error:
            raise ModelError(
                f"cannot load {file}: it is damaged, or not a model that OpenVINO {self.version} supports; export it "
                f"again, or install the newest (pip install -U openvino) ({_reason(error)})"
            ) from None


class OpenVinoRunner:
    """A loaded model. Inputs that it does not have are left out; token types that are not given are zero."""

    def __init__(self, model: Any, compiled: Any) -> None:
        notes = _notes(model)
        self._request = compiled.create_infer_request()
        self._outputs = [output.any_name for output in model.outputs]  # compiling adds names
        self._takes = [_takes(one) for one in model.inputs]
        self._limits = {name: int(notes[name]) for name in ("vocabulary", "positions") if name in notes}
        self._free = threading.Lock()  # a request runs one call at a time

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run one call: int64 arrays [batch, tokens] to {"logits": float32}.

        Raises:
            ModelError: if an input is missing, has a type or shape that the model does not take, or holds more tokens
                or other ids than it knows.
        """
        feed = fitted(self._takes, inputs)
        self._check(feed)
        try:
            with self._free:
                found = self._request.infer(feed, share_inputs=True, share_outputs=False)
        except RuntimeError as error:
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feed.items())
            raise ModelError(f"the model failed on {shapes}: {_reason(error)}") from error
        return dict(zip(self._outputs, found.values(), strict=True))

    def _check(self, feed: Mapping[str, np.ndarray]) -> None:
        """Refuse what OpenVINO would look up outside its tables, where it finds zeros."""
        ids = feed.get("input_ids")
        if ids is None or not ids.size:
            return
        positions, vocabulary = (self._limits.get(name) for name in ("positions", "vocabulary"))
        if positions is not None and ids.shape[1] > positions:
            raise ModelError(f"the model failed on {ids.shape[1]} tokens: it has {positions} positions; cut the input")
        if vocabulary is not None and not 0 <= ids.min() <= ids.max() < vocabulary:
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise ModelError(
                f"the model failed on the token id {wrong}: its vocabulary has {vocabulary} entries; use its tokenizer"
            )


def imported() -> Any:
    """Import openvino without its telemetry, which would report every import and leave files in the home folder.

    Raises:
        InputError: if it is not installed.
    """
    name = "openvino_telemetry"
    before = sys.modules.pop(name, None)
    sys.modules[name] = None  # type: ignore[assignment]  # as if not installed, which openvino provides for
    try:
        import openvino
    except ImportError:
        raise InputError(
            "the runtime openvino is not installed; install it with pip install 'autolite[openvino]'"
        ) from None
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before
    return openvino


def _choose(place: Place) -> str:
    """Return the option for a place of the ONNX graph that OpenVINO imports well."""
    match place.kind:
        case "product":
            return "rounded" if FORMATS[place.format].activations == "static" else "float"
        case "attention" | "lookup":
            return "plain"
        case "gelu":
            return "erf"
    return usual(place)


def _improve(model: Any) -> None:
    """Change an imported model to what the CPU plugin runs fastest, and rightly."""
    from openvino import Type

    for node in model.get_ordered_ops():
        match node.get_type_name():
            case "FakeQuantize":
                _round_once(node)
            case "MatMul":
                _transpose_in_product(node)
            case "Divide" if node.get_element_type() == Type.u8:
                _shift(node)
    model.validate_nodes_and_infer_types()
    for index, node in enumerate(model.get_ordered_ops()):
        if re.fullmatch(_UNNAMED, node.get_friendly_name()):
            node.set_friendly_name(f"{node.get_type_name()}.{index}")


def _round_once(rounding: Any) -> None:
    """Make quantization to codes and back one node, of three dimensions where nothing can be fused with it."""
    from openvino import opset15 as ops

    source, low, high = (rounding.input_value(i) for i in range(3))
    last = rounding
    while last.get_type_name() != "Multiply":  # by the scale, after two conversions and the zero point
        last = _readers(last)[0].get_node()
    readers = _readers(last)
    if source.get_node().get_type_name() in _FUSED:
        result = ops.fake_quantize(source, low, high, low, high, 256)
    else:
        width = source.get_partial_shape()[1].get_length()
        wide = ops.reshape(source, np.array([1, -1, width]), False)
        result = ops.fake_quantize(wide, low, high, low, high, 256)
        result = ops.reshape(result, np.array([-1, width]), False)
    result.set_friendly_name(rounding.get_friendly_name())
    for reader in readers:
        reader.replace_source_output(result.output(0))


def _transpose_in_product(product: Any) -> None:
    """Leave the transposition of the keys' last two axes to the product with them."""
    from openvino import opset15 as ops

    keys = product.input_value(1).get_node()
    if keys.get_type_name() != "Transpose" or product.get_attributes()["transpose_b"]:
        return
    order = keys.input_value(1).get_node()
    if order.get_type_name() != "Constant" or order.data.tolist() != [0, 2, 3, 1]:
        return
    by_head = ops.transpose(keys.input_value(0), np.array([0, 2, 1, 3]))
    better = ops.matmul(product.input_value(0), by_head, product.get_attributes()["transpose_a"], True)
    better.set_friendly_name(product.get_friendly_name())
    for reader in _readers(product):
        reader.replace_source_output(better.output(0))


def _shift(division: Any) -> None:
    """Bring back a shift of packed codes: it was imported as a division, which the plugin does not round."""
    from openvino import opset15 as ops

    power = division.input_value(1).get_node()
    places = ops.constant(power.input_value(1).get_node().data)
    shifted = ops.bitwise_right_shift(division.input_value(0), places)
    for reader in _readers(division):
        reader.replace_source_output(shifted.output(0))


def _readers(node: Any) -> list[Any]:
    return list(node.output(0).get_target_inputs())


def _annotate(model: Any, student: Student) -> None:
    """Leave out what the importer says about ONNX, and note what the loader and the plugin must know."""
    if model.has_rt_info(["framework"]):
        del model.rt_info["framework"]
    # What is said here is for the whole model: low-rank differences, little of it, follow the rest.
    formats = {product.format for product in matmuls(student.shape) if not product.delta}
    reduced = all(form == "bf16" or FORMATS[form].activations != "float" for form in formats)
    notes = {"precision": "bf16" if "bf16" in formats and reduced else "f32"}
    if student.shape.vocab:
        notes |= {"vocabulary": str(student.shape.vocab), "positions": str(student.shape.positions)}
    for name, value in notes.items():
        model.set_rt_info(value, [_OURS, name])
    if "int8-weight" in formats:  # the plugin quantizes the activations of all products with 8-bit weights, or of none
        model.set_rt_info("0", ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])


def _notes(model: Any) -> dict[str, str]:
    names = ("precision", "vocabulary", "positions")
    return {name: model.get_rt_info([_OURS, name]).astype(str) for name in names if model.has_rt_info([_OURS, name])}


def _takes(value: Any) -> Takes:
    """Describe an input; the first open dimension is the batch, the second the tokens, in all inputs alike."""
    names = ("batch", "tokens")
    dims = [d.get_length() if d.is_static else names[i] if i < 2 else None for i, d in enumerate(value.partial_shape)]
    return Takes(value.any_name, np.dtype(value.element_type.to_dtype()), dims)


def _reason(error: Exception) -> str:
    """Return what an exception of OpenVINO says, without the files and lines that it went through."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if not line.startswith(("Exception from", "Check '"))]
    return (said or lines or [repr(error)])[-1][:200]
