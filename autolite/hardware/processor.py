"""This machine's processor: how much of it there is to use, and what decides which kernels are exact on it."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import ArrayLike

from autolite.machine import processors

_DEPTH = 8  # products of one sum


def cores() -> int:
    """Return how many physical cores this process may use."""
    import psutil

    return min(psutil.cpu_count(logical=False) or 1, processors())


@cache
def saturates() -> bool:
    """Whether ONNX Runtime's products of unsigned activations with signed weights overflow on this processor.

    x86 processors without VNNI add pairs of 8-bit products in 16 bits, which saturate: a pair of 255 * 127 is cut from
    64770 to 32767. Weights of at most 63 in magnitude fit (2 * 255 * 63 = 32130), and unsigned weights take another
    kernel. Found out by one product whose result is known, so that no list of processors goes stale.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    model, inputs = overflowing()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, inputs)
    return has_overflown(found)


def overflowing() -> tuple[bytes, dict[str, np.ndarray]]:
    """Return a product, as ONNX, and inputs, that overflow on a processor which `saturates`."""
    from onnx import TensorProto, helper, numpy_helper

    stored = numpy_helper.from_array(np.full((_DEPTH, 16), 127, np.int8), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "saturates",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [16, _DEPTH])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [16, 16])],
        [stored],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(model.SerializeToString()), {"x": np.full((16, _DEPTH), 255, np.uint8)}


def has_overflown(found: ArrayLike) -> bool:
    """Say of the output of `overflowing` whether it is wrong."""
    return bool((np.asarray(found) != 255 * 127 * _DEPTH).any())
