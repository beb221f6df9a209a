"""ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from autolite.errors import ModelError
from autolite.formats import FORMATS
from autolite.runtime import emit
from autolite.techniques.base import Student


class OnnxRuntime:
    """Emits `model.onnx` and runs it in plain ONNX Runtime, with the options that a user gets by default."""

    name = "onnxruntime"
    formats = frozenset(FORMATS)

    @property
    def version(self) -> str:
        """Version of the installed onnxruntime."""
        return str(onnxruntime.__version__)

    def emit(self, student: Student, folder: Path) -> list[Path]:
        """Write the artifact; see `autolite.runtime.emit.emit`."""
        return emit.emit(student, folder)

    def load(self, file: Path, threads: int = 1, trace: Path | None = None) -> OrtRunner:
        """Load a model to run it on `threads` threads.

        With `trace`, a folder, every call is recorded there operator by operator; see `OrtRunner.end_trace`.

        Raises:
            ModelError: if the file is missing, truncated, or not a model that ONNX Runtime can load.
        """
        if not file.is_file():
            raise ModelError(f"there is no model at {file}; give a folder or file that AutoLite exported")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 4  # what goes wrong arrives as an exception
        # Threads spin while a call runs, which is fastest, and not between calls, where others need the cores.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if trace is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(trace / "trace")
        try:
            session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions have no base class of their own
            reason = str(error).splitlines()[0][:200]
            raise ModelError(
                f"ONNX Runtime cannot load {file}: the file is truncated, or not an ONNX model that version "
                f"{self.version} supports; export it again ({reason})"
            ) from None
        return OrtRunner(session)


class OrtRunner:
    """A loaded model. Inputs that it does not have are left out; token types that are not given are zero."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._inputs = [i.name for i in session.get_inputs()]
        self._outputs = [o.name for o in session.get_outputs()]

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
        feed = {name: inputs[name] for name in self._inputs if name in inputs}
        if "token_type_ids" in self._inputs and "token_type_ids" not in feed and "input_ids" in feed:
            feed["token_type_ids"] = np.zeros_like(feed["input_ids"])
        try:
            return dict(zip(self._outputs, self._session.run(self._outputs, feed), strict=True))
        except Exception as error:
            shapes = {name: f"{array.dtype}{list(array.shape)}" for name, array in inputs.items()}
            raise ModelError(
                f"the model takes {self._inputs} and failed on {shapes}: {str(error).splitlines()[0][:300]}"
            ) from error
