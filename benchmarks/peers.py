"""What others make of a model for a processor: int8 graphs from the usual tools, each by its documented route.

Every function writes one ONNX file (or an OpenVINO model) into a folder, once, and returns it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

CALIBRATION = 300  # NNCF's default number of samples


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Exporters talk a lot."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def dynamic(inputs: Mapping[str, torch.Tensor]) -> dict[str, dict[int, str]]:
    axes = {0: "batch", 1: "tokens"}
    return {name: {0: "batch"} if x.ndim == 4 else axes for name, x in inputs.items()}


def exported(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], attention: str, file: Path) -> Path:
    """torch.onnx.export, the new exporter."""
    if not file.exists():
        model.set_attn_implementation(attention)
        with quietly():
            program = torch.onnx.export(
                model, (), kwargs=dict(inputs), dynamo=True, dynamic_shapes=dynamic(inputs), opset_version=20
            )
            program.save(str(file))
    return file


def quantized(source: Path, file: Path, *, per_channel: bool = False) -> Path:
    """onnxruntime.quantization.quantize_dynamic with signed 8-bit weights."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    if not file.exists():
        with quietly():
            quantize_dynamic(source, file, weight_type=QuantType.QInt8, per_channel=per_channel)
    return file


def optimized(source: Path, model: PreTrainedModel, file: Path) -> Path:
    """onnxruntime.transformers.optimizer: fusions of attention, layer norms and activations."""
    from onnxruntime.transformers import optimizer

    if not file.exists():
        config = model.config
        kinds = {"gpt2": "gpt2", "vit": "vit", "llama": "gpt2"}
        with quietly():
            made = optimizer.optimize_model(
                str(source),
                model_type=kinds.get(config.model_type, "bert"),
                num_heads=config.num_attention_heads,
                hidden_size=config.hidden_size,
            )
            made.save_model_to_file(str(file))
    return file


def fused(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], file: Path) -> Path:
    """transformers.exporters.OnnxExporter with its fusions for ONNX Runtime."""
    import onnx_ir
    from transformers.exporters import OnnxConfig, OnnxExporter

    if not file.exists():
        model.set_attn_implementation("eager")
        with quietly():
            made = OnnxExporter().export(model, dict(inputs), OnnxConfig(dynamic=True, ort_fusions="cpu"))
            onnx_ir.save(made.program, str(file))
    return file


def nncf_int8(source: Path, samples: list[dict[str, np.ndarray]], file: Path) -> Path:
    """OpenVINO with NNCF's post-training int8 for transformers, calibrated on samples."""
    if not file.exists():
        import nncf
        import openvino

        with quietly():
            model = openvino.convert_model(str(source))
            made = nncf.quantize(
                model,
                nncf.Dataset(samples),
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=min(CALIBRATION, len(samples)),
            )
            openvino.save_model(made, file, compress_to_fp16=False)
    return file


def onnx_int8(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], folder: Path) -> dict[str, Path | str]:
    """Every route to int8 on ONNX Runtime, by its name: a file, or the reason why there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Path | str] = {}

    def attempt(name: str, make: Any) -> None:
        try:
            found[name] = make()
        except Exception as error:  # whatever a tool of somebody else's ends in is its result
            found[name] = f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0][:90]}"

    for attention in ("sdpa", "eager"):
        plain = folder / f"{attention}.onnx"
        attempt(f"export {attention}", lambda a=attention, f=plain: exported(model, inputs, a, f))
        attempt(
            f"(a) export {attention} + quantize_dynamic",
            lambda a=attention, f=plain: quantized(f, folder / f"a-{a}.onnx"),
        )
        attempt(
            f"(b) optimizer {attention} + quantize_dynamic",
            lambda a=attention, f=plain: quantized(
                optimized(f, model, folder / f"opt-{a}.onnx"), folder / f"b-{a}.onnx"
            ),
        )
    attempt(
        "(a) export sdpa + quantize_dynamic per channel",
        lambda: quantized(folder / "sdpa.onnx", folder / "a-channel.onnx", per_channel=True),
    )
    attempt(
        "(c) transformers' exporter + quantize_dynamic",
        lambda: quantized(fused(model, inputs, folder / "fused.onnx"), folder / "c.onnx"),
    )
    attempt("(d) optimum", lambda: optimum_int8(folder / "sdpa.onnx", folder / "d"))
    return found


def optimum_int8(source: Path, folder: Path) -> Path:
    """The ORTQuantizer of optimum, dynamic, per channel."""
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    quantizer = ORTQuantizer.from_pretrained(source.parent, file_name=source.name)
    quantizer.quantize(folder, AutoQuantizationConfig.avx2(is_static=False, per_channel=True))
    return next(folder.glob("*.onnx"))
