"""ONNX files: written one tensor at a time, so that weights are not held twice, and read without their weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, StringStringEntryProto, TensorProto
from onnx.external_data_helper import uses_external_data

from autolite.errors import ModelError, StorageError

MAX_PROTOBUF = 2**31 - 2**20  # a protobuf message ends at 2 GiB; larger weights go to a file beside it
SMALL = 1024  # bytes; smaller tensors stay in the model: shapes must be known when it is loaded
DATA = "autolite.data"  # metadata: bytes and name of the data file
PAGE = 4096  # where tensors of a data file begin, so that runtimes can map them into memory

_NUMBER, _BYTES = 0, 2  # wire types; nothing else is in a ModelProto
_GRAPH = ModelProto.DESCRIPTOR.fields_by_name["graph"].number
_INPUT = GraphProto.DESCRIPTOR.fields_by_name["input"].number
_INITIALIZER = GraphProto.DESCRIPTOR.fields_by_name["initializer"].number
_RAW_DATA = TensorProto.DESCRIPTOR.fields_by_name["raw_data"].number


@dataclass(frozen=True, eq=False)
class Tensor:
    """A stored tensor: `array` has the bytes, `kind` (of TensorProto) and `dims` say what they mean."""

    name: str
    kind: int
    dims: tuple[int, ...]
    array: np.ndarray


def write(file: Path, model: ModelProto, tensors: Sequence[Tensor]) -> list[Path]:
    """Write `model` with `tensors` as its stored tensors and return the files, `file` first. Above 2 GiB the larger
    tensors go to `<file>.data`.

    Raises:
        StorageError: if the files cannot be written.
    """
    data = file.with_name(f"{file.name}.data")
    inside = sum(tensor.array.nbytes for tensor in tensors) < MAX_PROTOBUF
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        data.unlink(missing_ok=True)
        if inside:
            _write_model(file, model, [(_proto(t), t.array) for t in tensors])
            return [file]
        placed: list[tuple[TensorProto, np.ndarray | None]] = []
        with data.open("wb") as stream:
            for tensor in tensors:
                if tensor.array.nbytes < SMALL:
                    placed.append((_proto(tensor), tensor.array))
                    continue
                stream.write(bytes(-stream.tell() % PAGE))
                placed.append((_reference(tensor, data.name, stream.tell()), None))
                stream.write(tensor.array.data)
            entry = StringStringEntryProto(key=DATA, value=f"{stream.tell()} {data.name}")
        model.metadata_props.append(entry)
        _write_model(file, model, placed)
    except OSError as error:
        raise StorageError(
            f"cannot write {file}: {error.strerror or error}. Free some space or choose another folder"
        ) from error
    return [file, data]


def read_head(file: Path) -> ModelProto:
    """Read a model without its graph: next to no time and memory, whatever its size.

    Raises:
        ModelError: if the file is empty, truncated, or no ONNX model.
    """
    found = bytearray()
    with file.open("rb") as stream:
        for number, start, _, end in _fields(stream, file.stat().st_size, file):
            if number != _GRAPH:
                stream.seek(start)
                found += stream.read(end - start)
    model = ModelProto()
    try:
        model.ParseFromString(bytes(found))
    except Exception:  # protobuf's errors have no name in onnx
        model = ModelProto()
    if not model.opset_import:
        raise ModelError(f"cannot load {file}: it is not an ONNX model, or a damaged one; export it again")
    return model


def read_inputs(file: Path) -> dict[str, list[int | str]]:
    """Return the dimensions of a model's inputs, open ones by their name ("" if they have none). Weights are not read.

    Raises:
        ModelError: if the file is no ONNX model.
    """
    found, content = GraphProto(), bytearray()
    with file.open("rb") as stream:
        graphs = [(start, end) for n, _, start, end in _fields(stream, file.stat().st_size, file) if n == _GRAPH]
        for begin, until in graphs:
            stream.seek(begin)
            for number, start, _, end in _fields(stream, until, file):
                if number == _INPUT:
                    stream.seek(start)
                    content += stream.read(end - start)
    try:
        found.ParseFromString(bytes(content))
    except Exception as error:  # protobuf's
        raise ModelError(f"cannot load {file}: it is not an ONNX model, or a damaged one; export it again") from error
    return {i.name: [d.dim_value or d.dim_param for d in i.type.tensor_type.shape.dim] for i in found.input}


def data_files(file: Path) -> list[Path]:
    """Return the files beside an ONNX model that have some of its weights.

    Raises:
        ModelError: if it is no ONNX model, or one of them is missing.
    """
    try:
        stored = onnx.load(file, load_external_data=False).graph.initializer
    except Exception as error:  # protobuf's
        raise ModelError(f"cannot load {file}: it is not an ONNX model, or a damaged one; export it again") from error
    names = {e.value for t in stored if uses_external_data(t) for e in t.external_data if e.key == "location"}
    found = [file.parent / name for name in sorted(names)]
    if missing := next((each for each in found if not each.is_file()), None):
        raise ModelError(f"{file} has weights in {missing}, which is not there: copy it beside the model")
    return found


def _fields(stream: BinaryIO, until: int, file: Path) -> Iterator[tuple[int, int, int, int]]:
    """Yield the fields of a message from where `stream` is until a position in it: the number of each, where it begins,
    where its content does, and where it ends.

    Raises:
        ModelError: if `file` is no protobuf, or truncated.
    """
    while (start := stream.tell()) < until:
        tag = _read_varint(stream)
        value = _read_varint(stream) if tag & 7 in (_NUMBER, _BYTES) else -1
        content = stream.tell()
        end = content + (value if tag & 7 == _BYTES else 0)
        if min(tag, value) < 0:
            raise ModelError(f"cannot load {file}: it is not an ONNX model, or a damaged one; export it again")
        if end > until:
            raise ModelError(
                f"cannot load {file}: it is truncated, {until:,} of at least {end:,} bytes; export or copy it again"
            )
        yield tag >> 3, start, content, end
        stream.seek(end)


def _write_model(file: Path, model: ModelProto, tensors: Sequence[tuple[TensorProto, np.ndarray | None]]) -> None:
    """Write what `SerializeToString` would give, but with the bytes of the tensors taken from where they are."""
    graph, rest = model.graph.SerializeToString(deterministic=True), ModelProto()
    rest.CopyFrom(model)
    rest.ClearField("graph")
    pieces: list[tuple[bytes, np.ndarray | None]] = []
    for proto, array in tensors:
        head = proto.SerializeToString(deterministic=True)
        raw = b"" if array is None else _field(_RAW_DATA, array.nbytes)
        size = len(head) + len(raw) + (0 if array is None else array.nbytes)
        pieces.append((_field(_INITIALIZER, size) + head + raw, array))
    whole = len(graph) + sum(len(head) + (0 if array is None else array.nbytes) for head, array in pieces)
    with file.open("wb") as stream:
        stream.write(rest.SerializeToString(deterministic=True))
        stream.write(_field(_GRAPH, whole) + graph)
        for head, array in pieces:
            stream.write(head)
            if array is not None:
                stream.write(array.data)


def _proto(tensor: Tensor) -> TensorProto:
    return TensorProto(name=tensor.name, data_type=tensor.kind, dims=tensor.dims)


def _reference(tensor: Tensor, location: str, offset: int) -> TensorProto:
    """Return what stands in the model for a tensor whose bytes are in a data file."""
    proto = _proto(tensor)
    proto.data_location = TensorProto.EXTERNAL
    place = {"location": location, "offset": offset, "length": tensor.array.nbytes}
    proto.external_data.extend(StringStringEntryProto(key=key, value=str(value)) for key, value in place.items())
    return proto


def _field(number: int, length: int) -> bytes:
    """Return the head of a field of `length` bytes in protobuf's encoding."""
    return _varint(number << 3 | _BYTES) + _varint(length)


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    found.append(value)
    return bytes(found)


def _read_varint(stream: BinaryIO) -> int:
    """Return the number, or -1 if there is none."""
    value = 0
    for shift in range(0, 70, 7):
        byte = stream.read(1)
        if not byte:
            return -1
        value |= (byte[0] & 127) << shift
        if byte[0] < 128:
            return value
    return -1
