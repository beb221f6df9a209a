"""OpenVINO: emitted models compute what transformers computes, in the number formats that they were quantized to, on
processors of every kind, and what cannot be loaded or called is refused in one sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from autolite import parts, registry, surgery
from autolite.architecture import shape_of
from autolite.contracts import tiny_context
from autolite.errors import InputError, ModelError, StorageError
from autolite.export import decoded
from autolite.formats import FORMATS, nbytes
from autolite.runtime import openvino as runtime
from autolite.runtime.openvino import OpenVino
from autolite.techniques.base import Student
from autolite.techniques.calibrate import grid
from autolite.techniques.quantize import Quantize, QuantizeConfig
from autolite.testing import PAD, VOCAB, tiny_inputs, tiny_model

if find_spec("openvino") is None:
    pytest.skip("needs autolite[openvino]", allow_module_level=True)
ov = runtime.imported()

ENCODERS = ("bert", "distilbert", "roberta", "albert", "vit")
DECODERS = ("gpt2", "llama", "qwen2", "qwen3")
models = pytest.mark.parametrize(
    ("family", "task"),
    [(f, "text-classification") for f in (*ENCODERS, "gpt2", "llama")] + [(f, "language-modeling") for f in DECODERS],
)
Arrays = dict[str, torch.Tensor]


def student_of(model: PreTrainedModel, **formats: str) -> Student:
    student = Student(model, shape_of(model))
    return Quantize().apply(student, QuantizeConfig(**formats), None) if formats else student  # type: ignore[arg-type]


def calibrated(family: str, task: str = "text-classification", **formats: str) -> Student:
    context = tiny_context(family, registry.get("task", task))
    return Quantize().apply(context.teacher, QuantizeConfig(**formats), context)


def random_inputs(model: PreTrainedModel, batch: int, tokens: int, side: str = "right") -> Arrays:
    """Sequences of random lengths, the first of them full, padded on one side; images for ViT."""
    if model.config.model_type == "vit":
        return tiny_inputs(model, batch)
    generator = torch.Generator().manual_seed(tokens)
    lengths = torch.randint(1, tokens + 1, (batch,), generator=generator)
    lengths[0] = tokens
    place = torch.arange(tokens) if side == "right" else torch.arange(tokens).flip(0)
    mask = (place < lengths[:, None]).long()
    ids = torch.randint(4, VOCAB, (batch, tokens), generator=generator)
    return {"input_ids": torch.where(mask.bool(), ids, PAD), "attention_mask": mask}


def expected(model: PreTrainedModel, inputs: Arrays) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(**inputs).logits)


def real(logits: np.ndarray, inputs: Arrays) -> np.ndarray:
    """The logits without those of padding."""
    return logits[inputs["attention_mask"].bool().numpy()] if logits.ndim == 3 else logits


def run(runner: Any, inputs: Arrays) -> np.ndarray:
    found = runner.run({name: tensor.numpy() for name, tensor in inputs.items()})["logits"]
    assert found.dtype == np.float32
    return np.asarray(found)


def check(model: PreTrainedModel, file: Path) -> None:
    runner = OpenVino().load(file)
    for batch, tokens in ((1, 1), (3, 9), (2, 32)):
        for side in ("right", "left"):
            inputs = random_inputs(model, batch, tokens, side)
            wanted, found = (real(x, inputs) for x in (expected(model, inputs), run(runner, inputs)))
            np.testing.assert_allclose(found, wanted, atol=1e-4, err_msg=f"{batch} x {tokens}, {side}")


# What is computed


@models
def test_logits_are_those_of_transformers(family: str, task: str, tmp_path: Path) -> None:
    model = tiny_model(family, task)
    check(model, OpenVino().emit(student_of(model), tmp_path)[0])


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_layers_of_different_widths(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    surgery.keep_heads(model, 1, [1])
    surgery.keep_neurons(model, 1, range(3, 40))
    surgery.keep_layers(model, [0, 1])
    check(model, OpenVino().emit(student_of(model), tmp_path)[0])


@pytest.mark.slow
def test_a_model_without_an_architecture_map(tmp_path: Path) -> None:
    model = tiny_model("electra", layers=2, embedding_size=16)
    check(model, OpenVino().emit(student_of(model), tmp_path)[0])


@pytest.mark.parametrize("activation", ["gelu_new", "relu", "silu", "quick_gelu"])
def test_activations_are_those_of_transformers(activation: str, tmp_path: Path) -> None:
    model = tiny_model("bert", hidden_act=activation, layers=1)
    inputs = tiny_inputs(model)
    runner = OpenVino().load(OpenVino().emit(student_of(model), tmp_path)[0])
    np.testing.assert_allclose(run(runner, inputs), expected(model, inputs), atol=1e-5)


def test_token_types_count_and_are_zero_where_not_given(tmp_path: Path) -> None:
    model = tiny_model("bert")
    runner = OpenVino().load(OpenVino().emit(student_of(model), tmp_path)[0])
    inputs = tiny_inputs(model)
    types = inputs | {"token_type_ids": (torch.arange(9) > 4).long().expand(3, 9).contiguous()}
    for arrays in (inputs, types):
        np.testing.assert_allclose(run(runner, arrays), expected(model, arrays), atol=1e-5)
    assert not np.allclose(run(runner, inputs), run(runner, types), atol=1e-3)


# Formats that round weights only: one of each kind of code in two families; all of them are among the slow ones.
KINDS = ("bf16", "int8", "int8-asym", "int4", "kmeans3-g64")
ROUNDED = [
    pytest.param(family, task, f.name, marks=[] if f.name in KINDS else pytest.mark.slow)
    for family, task in (("bert", "text-classification"), ("llama", "language-modeling"))
    for f in FORMATS.values()
    if f.activations != "static"
]


@pytest.mark.parametrize(("family", "task", "form"), ROUNDED)
def test_products_are_those_of_the_decoded_matrices(family: str, task: str, form: str, tmp_path: Path) -> None:
    """Tables are looked up in the formats that can be. Activations may be rounded by each call's range on processors
    that multiply 8-bit integers, and to bfloat16, which has 8 bits of precision, on those that multiply these."""
    table = form if FORMATS[form].embedding else "bf16"
    student = calibrated(family, task, attention=form, ffn=form, embedding=table, head=form)
    inputs = random_inputs(student.model, 8, 21)
    wanted = real(expected(decoded(student), inputs), inputs)
    found = real(run(OpenVino().load(OpenVino().emit(student, tmp_path)[0]), inputs), inputs)
    tolerance = 0.05 if form == "bf16" else 1e-5 if FORMATS[form].activations == "float" else 0.15
    assert np.square(found - wanted).mean() ** 0.5 <= tolerance * wanted.std()


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_calibrated_ranges_round_the_inputs_of_products(family: str, tmp_path: Path) -> None:
    student = calibrated(family, attention="int8-static", ffn="int8-static", head="int8-static")
    model = decoded(student)
    inputs = random_inputs(model, 8, 21)
    unrounded = expected(model, inputs)
    modules = {name: module for name, module in model.named_modules() if f"{name}.weight" in student.ranges}
    assert len(modules) == len(student.ranges)
    for name, module in modules.items():
        if "layer.2.attention.self.key" in name or "layer.2.attention.self.value" in name:
            continue  # those that only [CLS] reads are not products with activations
        scale, zero = grid(*student.ranges[f"{name}.weight"])
        module.register_forward_pre_hook(
            lambda _, args, s=scale, z=zero: (((args[0] / s).round() + z).clamp(0, 255).sub(z) * s,)
        )
    wanted = expected(model, inputs)
    found = run(OpenVino().load(OpenVino().emit(student, tmp_path)[0]), inputs)
    error = np.square(found - wanted).mean() ** 0.5
    assert error <= 0.02 * wanted.std()  # single values fall on the other side of a step
    assert np.square(wanted - unrounded).mean() ** 0.5 > 0.02 * wanted.std()  # rounding is there to be seen


def kernels(file: Path, kind: str, **settings: Any) -> list[str]:
    """The types that OpenVINO's kernels of a kind compute with."""
    core = ov.Core()
    compiled = core.compile_model(core.read_model(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"} | settings)
    nodes = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    return [n["runtimePrecision"].astype(str) for n in nodes if n["layerType"].astype(str) == kind]


def test_products_with_calibrated_inputs_are_of_8_bit_integers(tmp_path: Path) -> None:
    student = calibrated("bert", attention="int8-static", ffn="int8-static", head="int8-static")
    (file, _) = OpenVino().emit(student, tmp_path)
    found = kernels(file, "FullyConnected", LP_TRANSFORMS_MODE=True)
    assert sum("8" in kind for kind in found) >= 2 * 4 + 3 + 2  # all but the queries, keys and values of the last layer
    rounded = kernels(file, "FakeQuantize", LP_TRANSFORMS_MODE=True)
    assert len(rounded) < 4 * 3 + 2  # those after activation functions are part of the product before


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The settings that the latest model was compiled with."""
    found: dict[str, Any] = {}
    compile_model = ov.Core.compile_model

    def watched(core: Any, model: Any, device: str, settings: dict[str, Any]) -> Any:
        found.update(settings)
        return compile_model(core, model, device, settings)

    monkeypatch.setattr(ov.Core, "compile_model", watched)
    return found


@pytest.mark.parametrize("overflows", [True, False])
def test_where_products_of_8_bit_integers_overflow_they_are_not_taken(
    overflows: bool, tmp_path: Path, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "saturates", lambda: overflows)
    OpenVino().load(OpenVino().emit(student_of(tiny_model("bert")), tmp_path)[0])
    assert asked["LP_TRANSFORMS_MODE"] is not overflows


@pytest.mark.parametrize(
    ("formats", "precision"),
    [
        ({}, "f32"),
        ({"attention": "bf16"}, "f32"),  # of the others, nothing may be rounded
        ({"attention": "bf16", "ffn": "int8-weight", "head": "bf16"}, "f32"),
        ({"attention": "bf16", "ffn": "bf16", "head": "bf16"}, "bf16"),
        ({"attention": "bf16", "ffn": "int8", "head": "int4"}, "bf16"),
    ],
)
def test_only_a_model_in_bfloat16_is_computed_in_it(
    formats: dict[str, str], precision: str, tmp_path: Path, asked: dict[str, Any]
) -> None:
    OpenVino().load(OpenVino().emit(student_of(tiny_model("bert"), **formats), tmp_path)[0], threads=2)
    assert asked["INFERENCE_PRECISION_HINT"] == precision
    assert asked["INFERENCE_NUM_THREADS"] == 2


@pytest.mark.parametrize(("form", "groups"), [("int8-weight", 0), ("int8", None)])
def test_activations_that_are_to_stay_in_floating_point_do(form: str, groups: int | None, tmp_path: Path) -> None:
    """Whoever loads the model: OpenVINO quantizes them by itself on processors where that is faster."""
    (file, _) = OpenVino().emit(student_of(tiny_model("bert"), attention="int8", ffn=form), tmp_path)
    core = ov.Core()
    usual = core.get_property("CPU", "DYNAMIC_QUANTIZATION_GROUP_SIZE")
    found = core.compile_model(core.read_model(file), "CPU").get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE")
    assert found == (usual if groups is None else groups)
    assert usual != 0


# What is stored


@pytest.mark.parametrize("form", ["fp32", "int8", "int4", "kmeans4"])
def test_shared_layers_are_stored_once(form: str, tmp_path: Path) -> None:
    own, shared = tiny_model("bert"), tiny_model("bert")
    surgery.share_layers(shared, attention=[0, 0, 0], feed_forward=[0, 1, 1])
    formats = {"attention": form, "ffn": form}
    sizes = [
        OpenVino().emit(student_of(model, **formats), tmp_path / str(i))[1].stat().st_size
        for i, model in enumerate((own, shared))
    ]
    layers = parts.layers_of(own)
    matrices = [m for layer in layers[:2] for m in layer.attention_matrices] + [*layers[0].ffn_matrices]
    saved = sum(nbytes(form, *m.weight.shape) + (0 if m.bias is None else m.bias.nbytes) for m in matrices)
    assert abs(sizes[0] - sizes[1] - saved) < 64  # constants of shapes


@pytest.mark.parametrize("form", ["int8", "int8-static", "int4"])
def test_the_weights_take_what_their_format_promises(form: str, tmp_path: Path) -> None:
    context = tiny_context("bert", registry.get("task", "text-classification"), hidden_size=64)
    table = form if FORMATS[form].embedding else "int8"
    student = Quantize().apply(
        context.teacher, QuantizeConfig(attention=form, ffn=form, embedding=table, head=form), context
    )
    promised = sum(e.nbytes for e in student.encoded.values())
    rest = sum(p.nbytes for n, p in student.model.named_parameters() if n not in student.encoded)
    stored = OpenVino().emit(student, tmp_path)[1].stat().st_size
    assert promised + rest <= stored <= promised + rest + 1000  # numbers


def test_nothing_local_is_in_a_model(tmp_path: Path) -> None:
    (file, _) = OpenVino().emit(student_of(tiny_model("bert"), ffn="int4"), tmp_path)
    text = file.read_text(encoding="utf-8")
    for trace in (str(tmp_path), "/tmp", str(Path(__file__).parent.parent), str(Path.home()), "site-packages", ".py"):
        assert trace not in text
    assert "onnxruntime" not in text


@pytest.mark.slow
def test_nothing_is_reported_to_others(tmp_path: Path) -> None:
    """OpenVINO's telemetry is a package that it does without where it is not installed; it writes before it sends."""
    code = "from autolite.runtime import openvino; openvino.imported().Core(); import sys; print(sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={key: value for key, value in os.environ.items() if key != "CI"} | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "'openvino.tools.ovc'" in done.stdout
    assert "openvino_telemetry" not in done.stdout
    assert not list(tmp_path.glob("**/*intel*"))


def test_names_of_nodes_say_what_they_belong_to(tmp_path: Path) -> None:
    (file, _) = OpenVino().emit(student_of(tiny_model("bert")), tmp_path)
    names = [n.get_friendly_name() for n in ov.Core().read_model(file).get_ops() if n.get_type_name() == "MatMul"]
    assert {name.split("/")[0] for name in names} == {"layer.0", "layer.1", "layer.2", "head"}


# What is refused


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return OpenVino().emit(student_of(tiny_model("bert")), tmp_path_factory.mktemp("model"))[0]


def test_weights_that_are_missing_or_truncated_are_told(model: Path, tmp_path: Path) -> None:
    file, weights = tmp_path / "model.xml", tmp_path / "model.bin"
    file.write_bytes(model.read_bytes())
    with pytest.raises(ModelError, match=r"model\.bin is missing"):
        OpenVino().load(file)
    weights.write_bytes(model.with_suffix(".bin").read_bytes()[:-4])
    with pytest.raises(ModelError, match=r"cannot load .*model\.xml: it is damaged"):
        OpenVino().load(file)


def test_an_operator_that_this_version_does_not_have_is_named_with_what_to_install(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.xml"
    file.write_bytes(model.read_bytes().replace(b'type="Gelu"', b'type="Gelo"'))
    file.with_suffix(".bin").write_bytes(model.with_suffix(".bin").read_bytes())
    with pytest.raises(ModelError, match=r"pip install -U openvino.*Gelo"):
        OpenVino().load(file)


IDS = np.array([[5, 6, 7, 8], [9, 10, 1, 1]], np.int64)
MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 0]], np.int64)


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ({"input_ids": IDS}, "attention_mask is missing"),
        ({"input_ids": IDS.astype(np.float32), "attention_mask": MASK}, "input_ids is float32"),
        ({"input_ids": IDS[0], "attention_mask": MASK}, "rank 1"),
        ({"input_ids": IDS, "attention_mask": MASK[:, :3]}, "tokens = 4"),
        ({"input_ids": IDS + VOCAB, "attention_mask": MASK}, "token id 106: its vocabulary has 96 entries"),
        ({"input_ids": IDS - 2, "attention_mask": MASK}, "token id -1"),
        ({name: np.ones((1, 65), np.int64) for name in ("input_ids", "attention_mask")}, "65 tokens.*64 positions"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_by_name(model: Path, inputs: dict[str, np.ndarray], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        OpenVino().load(model).run(inputs)


def test_a_model_answers_several_threads(model: Path) -> None:
    runner = OpenVino().load(model)
    calls = [{"input_ids": IDS[:, :n], "attention_mask": MASK[:, :n]} for n in (1, 2, 3, 4)] * 8
    alone = [runner.run(call)["logits"] for call in calls]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda call: runner.run(call)["logits"], calls))
    for found, wanted in zip(together, alone, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(StorageError, match="taken"):
        OpenVino().emit(student_of(tiny_model("bert")), tmp_path / "taken")


def test_where_openvino_is_not_installed_the_extra_is_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    missing = r"pip install 'autolite\[openvino\]'"
    with pytest.raises(InputError, match=missing):
        OpenVino().load(model)
    with pytest.raises(InputError, match=missing):
        OpenVino().emit(student_of(tiny_model("bert")), tmp_path)
    with pytest.raises(InputError, match=missing):
        _ = OpenVino().version
