"""How ONNX Runtime's sessions are opened, here and on devices: needs nothing but onnxruntime and a module beside it."""

from __future__ import annotations

from typing import Any

import onnxruntime

from autolite.saturation import saturates


def opened(file: str, threads: int, trace: str | None = None, exact: bool = True) -> tuple[Any, bool]:
    """Open a model to run it on `threads` threads, and say whether its products of signed 8-bit weights may overflow
    on this processor, which ONNX Runtime avoids where it can and is asked to be `exact`. With `trace`, what the names
    of its files begin with, every call is recorded.

    Raises:
        Exception: ONNX Runtime's own, which have no base class.
    """
    # A file in the ORT format has its weights laid out already.
    exact = exact and not file.endswith(".ort") and saturates()
    try:
        return _session(file, threads, trace, exact), False
    except Exception as error:
        if not exact:
            raise
        failure = error
    try:  # a weight that several products read cannot be converted; without the option, others can be loaded
        return _session(file, threads, trace, exact=False), True
    except Exception:
        raise failure from None


def _session(file: str, threads: int, trace: str | None, exact: bool) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 4  # what goes wrong arrives as an exception
    # Threads spin while a call runs and not between calls, where others need the cores. MiniLM-L6 on two threads of a
    # Zen 3: that is 1.2x faster than not spinning at 16 tokens, 1.1x at 128, 1.05x at 8 x 64; spinning on between calls
    # as well gains 1.1x more at 16 tokens and nothing elsewhere.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # x86 processors without VNNI cut sums of products with signed 8-bit weights to 16 bits. For weights large enough,
    # this option stores them without sign. It does so with VNNI too, where they were exact, and products without sign
    # take 2.1 times as long (Zen 5, ONNX Runtime 1.32), so it is for processors that need it.
    options.add_session_config_entry("session.x64quantprecision", "1" if exact else "0")
    if trace is not None:
        options.enable_profiling = True
        options.profile_file_prefix = trace
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
