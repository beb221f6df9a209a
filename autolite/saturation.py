"""Whether ONNX Runtime's products of 8-bit codes overflow on this processor. It is sent to devices as it is, and needs
nothing but ONNX Runtime."""

from __future__ import annotations

from base64 import b64decode
from functools import cache
from typing import Any

# MatMulInteger of uint8 [16, 8] with int8 [8, 16], all 127, as ONNX: devices have no package to write it.
_MODEL = """
CAo63gEKGAoBeAoBdxIBeSINTWF0TXVsSW50ZWdlchIJc2F0dXJhdGVzKowBCAgIEBADQgF3SoABf39/f39/f39/f39/f39/f39/
f39/f39/f39/f39/f39/f39/f39/f39/f39/f39/f39/f39/f39/f39/f39/f39/f39/f39/f39/f39/f39/f39/f39/f39/f39/
f39/f39/f39/f39/f39/f39/f39/f39/f39/f39/f39/f39aEwoBeBIOCgwIAhIICgIIEAoCCAhiEwoBeRIOCgwIBhIICgIIEAoC
CBBCBAoAEBQ="""
_ROWS, _DEPTH, _LEFT, _RIGHT = 16, 8, 255, 127


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


def overflowing() -> tuple[bytes, dict[str, Any]]:
    """Return a product, as ONNX, and inputs, that overflow on a processor which `saturates`."""
    import numpy as np

    return b64decode(_MODEL), {"x": np.full((_ROWS, _DEPTH), _LEFT, np.uint8)}


def has_overflown(found: Any) -> bool:
    """Say of the output of `overflowing`, an array or nested lists, whether it is wrong."""
    import numpy as np

    return bool((np.asarray(found) != _LEFT * _RIGHT * _DEPTH).any())
