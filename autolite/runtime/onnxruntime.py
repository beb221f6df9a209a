"""ONNX Runtime on the CPU."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from autolite.errors import ModelError, first_line
from autolite.formats import FORMATS
from autolite.measure import Workload
from autolite.runtime import emit, requirements
from autolite.runtime.inputs import PAST, Takes, fitted
from autolite.runtime.reading import Generating, Reading
from autolite.runtime.sequences import PRESENT
from autolite.runtime.session import opened
from autolite.techniques.base import Student


class OnnxRuntime:
    """Emits `model.onnx` and runs it in plain ONNX Runtime, with the options that a user gets by default."""

    name = "onnxruntime"
    formats = frozenset(FORMATS)

    @property
    def version(self) -> str:
        """Version of the installed onnxruntime."""
        return str(onnxruntime.__version__)

    def emit(self, student: Student, folder: Path, workload: Workload | None = None, tuned: bool = False) -> list[Path]:
        """Write the artifact; see `autolite.runtime.emit.emit` and, for `tuned`, `autolite.runtime.tune`."""
        if not tuned:
            return emit.emit(student, folder, workload)
        from autolite.runtime import tune

        workload = workload or Workload()
        return emit.emit(student, folder, workload, tune.tuned(workload.threads))

    def load(self, file: Path, threads: int = 1, trace: Path | None = None) -> OrtRunner:
        """Load a model to run it on `threads` threads.

        With `trace`, a folder, every call is recorded there operator by operator; see `OrtRunner.end_trace`.

        Raises:
            ModelError: if the file is missing, truncated, or not a model that ONNX Runtime can load; if its data file
                is missing or truncated; or if it needs a newer ONNX Runtime.
        """
        if file.is_dir():
            raise ModelError(f"{file} is a folder; give the model in it, as in {file / emit.FILE}")
        if not file.is_file():
            raise ModelError(f"there is no model at {file}; give a folder or file that AutoLite exported")
        if file.suffix == ".ort":
            return self._load_ort(file, threads, trace)
        requirements.check(file, self.version)
        try:
            return _runner(*opened(str(file), threads, _prefix(trace)))
        except Exception as error:  # ONNX Runtime's exceptions have no base class of their own
            raise ModelError(self._refusal(file, error)) from None

    def _load_ort(self, file: Path, threads: int, trace: Path | None) -> OrtRunner:
        try:
            session, _ = opened(str(file), threads, _prefix(trace))
        except Exception as error:
            raise ModelError(
                f"cannot load {file}: it is damaged, or was made by another version of onnxruntime than this, "
                f"{self.version}, can read; export it again with this version ({first_line(error)})"
            ) from None
        requirements.check_version(file, session.get_modelmeta().custom_metadata_map, self.version)
        return _runner(session)

    def _refusal(self, file: Path, failure: Exception) -> str:
        operator = next((found for pattern in _MISSING if (found := re.search(pattern, str(failure)))), None)
        if operator:
            name = operator["name"] if operator["domain"] in ("", None) else f"{operator['domain']}:{operator['name']}"
            return (
                f"cannot load {file}: onnxruntime {self.version} has no operator {name} as it is used there; install "
                "the newest (pip install -U onnxruntime), or the build that the model was made for"
            )
        return (
            f"cannot load {file}: it is damaged, or not a model that onnxruntime {self.version} supports; export it "
            f"again ({first_line(failure)})"
        )


_MISSING = (
    r"Fatal error: (?P<domain>[\w.]*):(?P<name>\w+)\(-?\d+\) is not a registered function/op",
    r"(?P<domain>)No Op registered for (?P<name>\w+)",
    r"Could not find an implementation for (?:(?P<domain>[\w.]+)[.:])?(?P<name>\w+)\(\d+\)",
    r"Unrecognized attribute: \w+ for operator (?P<domain>)(?P<name>\w+)",
)


def _prefix(trace: Path | None) -> str | None:
    return None if trace is None else str(trace / "trace")


_TYPES = {"float": "float32", "double": "float64", "bool": "bool"} | {
    name: name for name in ("float16", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
}


class OrtRunner:
    """A loaded model. Inputs that it does not have are left out; token types that are not given are zero, and keys and
    values of earlier calls there are none.

    Attributes:
        overflow: its products of signed 8-bit weights may overflow on this processor, since ONNX Runtime cannot
            convert weights that several products read.
    """

    def __init__(self, session: Any, overflow: bool = False) -> None:
        self.overflow = overflow
        self._session = session
        self._outputs = [o.name for o in session.get_outputs() if not o.name.startswith(PRESENT)]
        self._takes = [Takes(i.name, _dtype(i.type), i.shape) for i in session.get_inputs()]

    @property
    def inputs(self) -> dict[str, tuple[str, list[int | str | None]]]:
        """What the model takes: for each name the type, as in "tensor(int64)", and the dimensions, open ones named."""
        return {i.name: (i.type, i.shape) for i in self._session.get_inputs()}

    def end_trace(self) -> Path:
        """Stop recording and return the file of ONNX Runtime's trace."""
        return Path(self._session.end_profiling())

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run one call: int64 arrays [batch, tokens] to {"logits": float32}.

        Raises:
            ModelError: if an input is missing or has a type or shape that the model does not take.
        """
        feed = fitted(self._takes, inputs)
        try:
            return dict(zip(self._outputs, self._session.run(self._outputs, feed), strict=True))
        except Exception as error:
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feed.items())
            raise ModelError(f"the model failed on {shapes}: {first_line(error)}") from error


class OrtDecoder(OrtRunner):
    """A loaded language model with a key/value cache."""

    def reading(self, limit: int) -> Reading:
        """Begin to read a sequence of at most `limit` tokens piece by piece."""
        return Reading(self._session, limit)

    def generating(self, tokens: int) -> Generating:
        """Return what makes whole calls, in which so many tokens follow the prompt."""
        return Generating(self._session, tokens)


def _runner(session: Any, overflow: bool = False) -> OrtRunner:
    cached = any(PAST in each.shape for each in session.get_inputs())
    return (OrtDecoder if cached else OrtRunner)(session, overflow)


def _dtype(kind: str) -> np.dtype[Any]:
    """Return numpy's type for ONNX Runtime's, as in "tensor(float)"."""
    return np.dtype(_TYPES.get(kind.removeprefix("tensor(").removesuffix(")"), "object"))
