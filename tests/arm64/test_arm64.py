"""Artifacts compute on arm64 what they compute here: under user-mode emulation, `make arm64`.

Emulated are a Cortex-A76 (Raspberry Pi 5; 8-bit dot products) and a processor that also multiplies 8-bit matrices
(Pixel 8). Integers must agree to the bit, and floats to rounding: sums are added up in another order. Where activations
are quantized, that can move one over the border between two codes, and so all behind it; two runs then differ as both
differ from the computation without such codes, by the format's own noise. So do 4-bit products, whose kernel on arm64
quantizes activations by whole rows and not by blocks.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from autolite import registry
from autolite.architecture import shape_of
from autolite.contracts import tiny_context
from autolite.export import decoded
from autolite.reload import load_model
from autolite.runtime import ortformat
from autolite.runtime.inputs import nothing_before
from autolite.runtime.onnxruntime import OnnxRuntime
from autolite.tasks.demo import demo_model_path
from autolite.techniques.base import Student
from autolite.techniques.quantize import Quantize, QuantizeConfig
from autolite.testing import PAD, VOCAB

ROOT = Path(os.environ.get("AUTOLITE_ARM64", ".arm64")).resolve()
MODEL = os.environ.get("AUTOLITE_ARM64_MODEL", "")  # a folder of transformers' with a text classifier
EMULATOR = ROOT / "qemu"
PROCESSORS = ("cortex-a76", "max,sve=off")
FLOATS = ("fp32", "bf16", "int8-weight")  # formats whose products are in float32
FORMATS = (*FLOATS, "int8", "int7", "kmeans4", "int4")
ROUNDING = 1e-5  # of the standard deviation of the logits
NOISE = 2.0  # of what the format costs: two runs whose noise is independent differ by 1.4 times that

pytestmark = [
    pytest.mark.arm64,
    pytest.mark.skipif(not (ROOT / "ready").is_file(), reason=f"no aarch64 runtime in {ROOT}: `make arm64` gets it"),
]
processors = pytest.mark.parametrize("processor", PROCESSORS)


def emulate(processor: str, *folders: Path) -> None:
    guest = ROOT / "guest"
    command = [EMULATOR, "-cpu", processor, "-L", guest, guest / "usr/bin/python3", Path(__file__).parent / "run.py"]
    environment = {"PYTHONHOME": str(guest / "usr"), "PYTHONPATH": str(guest / "site")}
    done = subprocess.run([*command, *folders], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(str(np.load(folder / "outputs.npz")["machine"]) == "aarch64" for folder in folders)


def quantized(student: Student, form: str, context: Any = None) -> Student:
    table = form if form in ("int8", "int7", "int4", "bf16") else "fp32"
    head = table if student.shape.tied else form
    config = QuantizeConfig(attention=form, ffn=form, embedding=table, head=head)
    return student if form == "fp32" else Quantize().apply(student, config, context)


@dataclass(frozen=True)
class Artifact:
    """A folder with a model and inputs, and what the model would compute without quantized activations."""

    folder: Path
    file: Path
    form: str
    exact: np.ndarray

    @classmethod
    def of(cls, folder: Path, student: Student, form: str, ids: np.ndarray) -> Artifact:
        folder.mkdir(parents=True, exist_ok=True)
        (file,) = OnnxRuntime().emit(student, folder)
        inputs = {"input_ids": ids, "attention_mask": (ids != PAD).astype(np.int64)}
        if "token_type_ids" in [i.name for i in onnx.load(file).graph.input]:
            inputs["token_type_ids"] = np.zeros_like(ids)
        np.savez(folder / "inputs.npz", **inputs, **nothing_before(file, len(ids)))
        with torch.no_grad():
            exact = decoded(student)(**{name: torch.from_numpy(a) for name, a in inputs.items()}).logits.numpy()
        return cls(folder, file, form, exact)

    def check(self) -> str:
        """Compare what the emulated processor computed with what this one does; return the numbers."""
        inputs = dict(np.load(self.folder / "inputs.npz"))
        here, there = (
            OnnxRuntime().load(self.file).run(inputs)["logits"],
            np.load(self.folder / "outputs.npz")["logits"],
        )
        real = inputs["attention_mask"].astype(bool) if here.ndim == 3 else slice(None)

        def distance(one: np.ndarray, other: np.ndarray) -> float:
            return float(np.square(one[real] - other[real]).mean() ** 0.5 / self.exact[real].std())

        found, noise = distance(there, here), distance(here, self.exact)
        assert found <= (ROUNDING if self.form in FLOATS else NOISE * noise), f"{self.folder.name}: {found}, {noise}"
        return f"{found:.1e} (noise {noise:.1e})"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """By family and format."""
    root, found = tmp_path_factory.mktemp("tiny"), {}
    ids = np.random.default_rng(0).integers(4, VOCAB, (8, 19))
    ids[2, 11:] = PAD
    for family in ("bert", "albert", "gpt2", "qwen3"):
        task = "text-classification" if family in ("bert", "albert") else "language-modeling"
        context = tiny_context(family, registry.get("task", task))
        for form in FORMATS:
            name = f"{family}-{form}"
            found[name] = Artifact.of(root / name, quantized(context.teacher, form, context), form, ids)
    return found


@processors
def test_artifacts_of_every_format_compute_the_same(processor: str, tiny: dict[str, Artifact]) -> None:
    emulate(processor, *(one.folder for one in tiny.values()))
    print(processor, {name: one.check() for name, one in tiny.items()})


def test_the_runtime_makes_the_same_graph_of_them(tiny: dict[str, Artifact], tmp_path: Path) -> None:
    """What `autolite.runtime.ortformat` relies on: optimised here, a model is optimised for arm64."""
    emulate(PROCESSORS[0], *(one.folder for one in tiny.values()))
    for name, one in tiny.items():
        ortformat.optimise(one.file, tmp_path / "loaded.onnx")
        ours, theirs = onnx.load(tmp_path / "loaded.onnx").graph, onnx.load(one.folder / "loaded.onnx").graph
        nodes = [sorted(n.SerializeToString(deterministic=True) for n in graph.node) for graph in (ours, theirs)]
        stored = [{t.name: numpy_helper.to_array(t).tobytes() for t in g.initializer} for g in (ours, theirs)]
        assert nodes[0] == nodes[1], name
        assert stored[0] == stored[1], name


@processors
def test_integers_agree_to_the_bit(processor: str, tmp_path: Path) -> None:
    """Quantized activations, and their products with 8-bit weights of the largest codes."""
    rng = np.random.default_rng(0)
    weights = {
        "signed": rng.choice(np.array([-127, 127], np.int8), (96, 40)),
        "unsigned": rng.choice(np.array([0, 255], np.uint8), (96, 40)),
    }
    nodes = [helper.make_node("DynamicQuantizeLinear", ["x"], ["codes", "scale", "zero"])]
    for name in weights:
        nodes.append(helper.make_node("MatMulInteger", ["codes", name, "zero"], [f"{name}_sums"]))
    kinds = {"codes": TensorProto.UINT8, "scale": TensorProto.FLOAT, "zero": TensorProto.UINT8}
    kinds |= {f"{name}_sums": TensorProto.INT32 for name in weights}
    graph = helper.make_graph(
        nodes,
        "integers",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 96])],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "model.onnx")
    x = rng.normal(size=(23, 96)).astype(np.float32)
    x[:, ::3] = 4.0  # the largest code
    np.savez(tmp_path / "inputs.npz", x=x)
    emulate(processor, tmp_path)
    found = np.load(tmp_path / "outputs.npz")
    scale = (x.max() - x.min()) / np.float32(255)
    zero = np.clip(np.round(-x.min() / scale), 0, 255)
    codes = np.clip(np.round(x / scale) + zero, 0, 255).astype(np.int64)
    assert found["zero"] == zero
    np.testing.assert_allclose(found["scale"], scale, rtol=1e-6)
    assert (np.abs(found["codes"] - codes) <= 1).all()  # 1: a tie
    assert (found["codes"] != codes).mean() < 0.01
    for name, array in weights.items():
        exact = (found["codes"].astype(np.int64) - int(found["zero"])) @ array.astype(np.int64)
        np.testing.assert_array_equal(found[f"{name}_sums"], exact)


@processors
def test_a_file_in_the_ort_format_computes_what_the_onnx_model_does(
    processor: str, tiny: dict[str, Artifact], tmp_path: Path
) -> None:
    names = [f"bert-{form}" for form in FORMATS]
    for name in names:
        (tmp_path / name).mkdir()
        ortformat.convert(tiny[name].file, tmp_path / name)
        shutil.copy(tiny[name].folder / "inputs.npz", tmp_path / name)
    emulate(processor, *(folder / name for name in names for folder in (tmp_path, tiny[name].folder.parent)))
    for name in names:
        found, expected = (np.load(f / "outputs.npz")["logits"] for f in (tmp_path / name, tiny[name].folder))
        np.testing.assert_array_equal(found, expected, err_msg=name)


@processors
@pytest.mark.parametrize(
    "model", [str(demo_model_path()), *([MODEL] if MODEL else [])], ids=["demo", "given"][: 1 + bool(MODEL)]
)
def test_trained_models_compute_the_same(processor: str, model: str, tmp_path: Path) -> None:
    loaded, _ = load_model(model, "AutoModelForSequenceClassification")
    student = Student(loaded, shape_of(loaded))
    ids = np.random.default_rng(1).integers(4, student.shape.vocab, (8, 16))
    made = {form: Artifact.of(tmp_path / form, quantized(student, form), form, ids) for form in FORMATS}
    emulate(processor, *(one.folder for one in made.values()))
    print(processor, {form: one.check() for form, one in made.items()})
