"""What the check says of this processor agrees with products of the sizes that models have."""

from __future__ import annotations

import os

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from autolite.formats import INT7
from autolite.hardware.processor import cores, processors
from autolite.saturation import overflowing, saturates


def exact(weights: np.ndarray, rows: int) -> bool:
    """Whether ONNX Runtime multiplies extreme activations with these weights [k, n] without an overflow."""
    k, n = weights.shape
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [rows, k])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [rows, n])],
        [numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.full((rows, k), 255, np.uint8)
    (found,) = session.run(None, {"x": x})
    return np.array_equal(found, x.astype(np.int64) @ weights.astype(np.int64))


@pytest.mark.parametrize("rows", [1, 5, 128])
@pytest.mark.parametrize(("k", "n"), [(384, 384), (96, 100)])
def test_signed_weights_overflow_where_it_says_so_and_seven_bits_nowhere(rows: int, k: int, n: int) -> None:
    rng = np.random.default_rng(0)
    full = rng.choice(np.array([-127, 127], np.int8), (k, n))
    assert exact(full, rows) != saturates()
    assert exact(np.full((k, n), INT7, np.int8), rows)
    assert exact((full.astype(np.int16) + 128).astype(np.uint8), rows)


def test_the_product_that_shows_it_is_what_onnx_writes() -> None:
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "saturates",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [16, 8])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [16, 16])],
        [numpy_helper.from_array(np.full((8, 16), 127, np.int8), "w")],
    )
    model, inputs = overflowing()
    assert onnx.load_from_string(model) == helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )
    np.testing.assert_array_equal(inputs["x"], np.full((16, 8), 255, np.uint8))


def test_a_process_has_the_processors_that_it_may_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= cores() <= processors() <= (os.cpu_count() or 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert (cores(), processors()) == (1, 1)
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    assert processors() == os.cpu_count()
