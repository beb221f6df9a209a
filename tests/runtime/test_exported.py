"""Models without an architecture map: what torch exports of them computes what they compute, in every number format,
stores each weight once, and does not say where it was made. An export takes seconds, so each model has one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import PreTrainedModel

from autolite import registry, surgery
from autolite.architecture import shape_of
from autolite.contracts import tiny_context
from autolite.errors import ModelError
from autolite.export import decoded
from autolite.formats import FORMATS
from autolite.parts import matrices_of
from autolite.runtime import exported, skeleton
from autolite.runtime.emit import emit
from autolite.runtime.onnxruntime import OnnxRuntime
from autolite.techniques.base import Student
from autolite.techniques.quantize import Quantize, QuantizeConfig
from autolite.testing import PAD, VOCAB, tiny_model
from autolite.unmapped import inputs_of

DEBERTA = {
    "relative_attention": True,
    "position_buckets": 16,
    "pos_att_type": ["p2c", "c2p"],
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "conv_kernel_size": 3,
}
CLASSIFIERS: dict[str, dict[str, Any]] = {
    "electra": {"embedding_size": 16},
    "mpnet": {},
    "deberta-v2": DEBERTA,
    "modernbert": {"cls_token_id": 2, "sep_token_id": 3, "local_attention": 8, "global_attn_every_n_layers": 2},
    "layoutlm": {},
    "bart": {
        "d_model": 32,
        **{f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 64))},
        **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    },
}
GENERATORS: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt_neox": {},
    "gemma": {"num_key_value_heads": 2, "head_dim": 8},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4},
}
# What the map has, but with a part that cannot be written from it.
BEYOND: dict[str, dict[str, Any]] = {
    "bert": {"hidden_act": "mish"},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
}
QUICK = ("electra",)
EVERY = [
    pytest.param(kind, marks=[] if kind in QUICK else pytest.mark.slow) for kind in (*CLASSIFIERS, *GENERATORS, *BEYOND)
]

_models: dict[str, PreTrainedModel] = {}


def model_of(kind: str) -> PreTrainedModel:
    """The same model every time, so that it is exported once."""
    if kind not in _models:
        task = "language-modeling" if kind in GENERATORS or kind == "qwen2" else "text-classification"
        settings = CLASSIFIERS.get(kind) or GENERATORS.get(kind) or BEYOND.get(kind) or {}
        _models[kind] = tiny_model(kind, task, layers=2, **settings)
    return _models[kind]


def student_of(kind: str, **formats: str) -> Student:
    student = Student(model_of(kind), shape_of(model_of(kind)))
    return Quantize().apply(student, QuantizeConfig(**formats), None) if formats else student  # type: ignore[arg-type]


def every_group(kind: str, form: str) -> dict[str, str]:
    """Settings that put every matrix in a format, or in one as exact that can be looked up in where that is needed."""
    table = form if FORMATS[form].embedding else "bf16"
    return {
        "attention": form,
        "ffn": form,
        "embedding": table,
        "head": table if shape_of(model_of(kind)).tied else form,
    }


def random_inputs(model: PreTrainedModel, batch: int, tokens: int, side: str = "right") -> dict[str, torch.Tensor]:
    """Sequences of random lengths that end with the token that ends sequences, padded on one side."""
    generator = torch.Generator().manual_seed(tokens)
    lengths = torch.randint(1, tokens + 1, (batch,), generator=generator)
    lengths[0] = tokens
    place = torch.arange(tokens) if side == "right" else torch.arange(tokens).flip(0)
    mask = (place < lengths[:, None]).long()
    ids = torch.randint(4, VOCAB, (batch, tokens), generator=generator)
    ids[torch.arange(batch), lengths - 1 if side == "right" else torch.full((batch,), tokens - 1)] = 3
    arrays = {"input_ids": torch.where(mask.bool(), ids, PAD), "attention_mask": mask}
    types = torch.randint(0, 2, (batch, tokens), generator=generator) * mask
    return {**arrays, **({"token_type_ids": types} if "token_type_ids" in inputs_of(model) else {})}


def difference(model: PreTrainedModel, file: Path, inputs: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Return the largest and the relative difference over the logits of tokens that are not padding."""
    with torch.no_grad():
        expected = model(**inputs).logits.numpy()
    found = OnnxRuntime().load(file).run({name: tensor.numpy() for name, tensor in inputs.items()})["logits"]
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    if found.ndim == 3:
        real = inputs["attention_mask"].bool().numpy()
        found, expected = found[real], expected[real]
    return float(np.abs(found - expected).max()), float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def stored(file: Path) -> int:
    """Bytes of the stored tensors."""
    return sum(len(tensor.raw_data) for tensor in onnx.load(file).graph.initializer)


def operators(file: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(file).graph.node)


@pytest.mark.parametrize("kind", EVERY)
def test_logits_are_those_of_transformers_at_every_size(kind: str, tmp_path: Path) -> None:
    model = model_of(kind)
    (file,) = emit(student_of(kind), tmp_path)
    sides = ("right", "left") if kind in GENERATORS else ("right",)
    for batch, tokens in ((1, 1), (1, 5), (3, 9), (2, 40)):
        for side in sides:
            largest, _ = difference(model, file, random_inputs(model, batch, tokens, side))
            assert largest < 1e-4, (batch, tokens, side)
    assert [i.name for i in onnx.load(file).graph.input] == inputs_of(model)


# kmeans4 and bf16 multiply in float32 and agree to rounding; 8-bit activations cost every product of a random model a
# step of noise. Products of full 8-bit codes overflow on some processors, so those of 7 bits stand for both.
@pytest.mark.parametrize(
    ("form", "tolerance"), [("bf16", 1e-4), ("int8-weight", 1e-4), ("int7", 0.1), ("int4", 0.15), ("kmeans4", 0.15)]
)
@pytest.mark.parametrize("kind", EVERY)
def test_every_format_is_in_the_graph_and_computed_with(kind: str, form: str, tolerance: float, tmp_path: Path) -> None:
    plain = emit(student_of(kind), tmp_path / "plain")[0]
    student = student_of(kind, **every_group(kind, form))
    (file,) = emit(student, tmp_path / "coded")
    _, relative = difference(decoded(student), file, random_inputs(student.model, 3, 13))
    assert relative < tolerance
    # All of the matrices left the file, and what stands for them came: nothing was skipped. The few bytes are shapes.
    matrices = {m.key: m for group in matrices_of(student.model).values() for m in group.values()}
    assert set(student.encoded) == set(matrices)
    saved = sum(m.weight.nbytes for m in matrices.values()) - sum(e.nbytes for e in student.encoded.values())
    assert 0 <= saved - (stored(plain) - stored(file)) < 300


def test_activations_can_be_quantized_by_calibrated_ranges(tmp_path: Path) -> None:
    context = tiny_context("electra", registry.get("task", "text-classification"), layers=2, **CLASSIFIERS["electra"])
    config = QuantizeConfig(attention="int8-static", ffn="int8-static")
    student = Quantize().apply(context.teacher, config, context)
    (file,) = emit(student, tmp_path)
    found = operators(file)
    assert found["MatMulIntegerToFloat"] == 12
    assert (found["QuantizeLinear"], found["DynamicQuantizeLinear"]) == (8, 0)  # query, key and value share theirs
    _, relative = difference(decoded(student), file, random_inputs(student.model, 8, 9))
    assert relative < 0.3


@pytest.mark.parametrize("kind", ["electra", pytest.param("opt", marks=pytest.mark.slow)])
def test_products_are_those_of_the_format(kind: str, tmp_path: Path) -> None:
    shape = shape_of(model_of(kind))
    assert shape.unmapped is not None
    products = sum(p.calls for p in shape.unmapped.products)
    (file,) = emit(student_of(kind, **every_group(kind, "int8")), tmp_path)
    found = operators(file)
    assert found["MatMulIntegerToFloat"] == products
    shared = 2 * 2  # of the query, key and value of each layer, two find their input quantized
    assert found["DynamicQuantizeLinear"] == products - shared
    # What is left of float products is attention's own: no matrix is multiplied with in float32.
    assert found["Gemm"] == 0
    weights = {tensor.name for tensor in onnx.load(file).graph.initializer}
    floats = [n for n in onnx.load(file).graph.node if n.op_type == "MatMul" and set(n.input) & weights]
    assert not floats


@pytest.mark.slow
def test_products_with_what_does_not_depend_on_the_input_are_left_to_loading(tmp_path: Path) -> None:
    shape = shape_of(model_of("deberta-v2"))  # its relative positions are projected by the queries' and keys' matrices
    assert shape.unmapped is not None
    (file,) = emit(student_of("deberta-v2", **every_group("deberta-v2", "int8")), tmp_path)
    found = operators(file)
    assert found["MatMulIntegerToFloat"] == sum(p.calls for p in shape.unmapped.products)
    assert found["Gemm"] == 2 * 2
    loaded = onnxruntime.SessionOptions()
    loaded.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    loaded.log_severity_level = 4
    onnxruntime.InferenceSession(str(file), loaded)
    assert operators(tmp_path / "loaded.onnx")["Gemm"] == 0


def test_weights_that_are_not_used_and_places_are_not_in_the_file(tmp_path: Path) -> None:
    (file,) = emit(student_of("electra"), tmp_path)
    model, shape = model_of("electra"), shape_of(model_of("electra"))
    assert shape.unmapped is not None
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert 0 <= stored(file) - weights < 700  # positions 0..63 and shapes
    content = file.read_bytes()
    for trace in (b"site-packages", b".py", b"torch", b"pkg.", str(Path.home()).encode(), str(tmp_path).encode()):
        assert trace not in content
    graph = onnx.load(file).graph
    assert not graph.doc_string
    assert not any(node.doc_string or node.metadata_props for node in graph.node)
    places = {node.name.rpartition("/")[0] for node in graph.node}
    assert places == {"", "embedding", "head", *(f"layer.{i}/{part}" for i in (0, 1) for part in ("attention", "ffn"))}


def test_equal_students_give_equal_bytes_and_others_are_not_exported_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = emit(student_of("electra"), tmp_path / "first")[0].read_bytes()

    def forbidden(model: Any) -> Any:
        raise AssertionError("exported again")

    monkeypatch.setattr(exported, "skeletons", forbidden)
    assert emit(student_of("electra"), tmp_path / "again")[0].read_bytes() == first
    other = surgery.clone(model_of("electra"))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    (file,) = emit(Student(other, shape_of(other)), tmp_path / "other")
    assert difference(other, file, random_inputs(other, 3, 9))[0] < 1e-4


def test_a_table_that_is_also_the_head_is_stored_once(tmp_path: Path) -> None:
    shape = shape_of(model_of("opt"))
    assert shape.tied
    assert stored(emit(student_of("opt"), tmp_path)[0]) < sum(p.nbytes for p in model_of("opt").parameters()) + 700


def failing(*_: Any, **__: Any) -> Any:
    print("a long report of the exporter")
    try:
        raise NotImplementedError("no such operator\nand much more")
    except NotImplementedError as error:
        raise RuntimeError("step 2 of 3 failed") from error


def test_what_torch_cannot_export_is_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exported, "_known", {})
    monkeypatch.setattr(torch.onnx, "export", failing)
    with pytest.raises(ModelError, match=r"^torch cannot export ElectraFor\w+ to ONNX, .*: no such operator$"):
        emit(student_of("electra"), tmp_path)
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())
    config: Any = model_of("electra").config
    assert config._attn_implementation == "sdpa"  # as before


def test_positions_that_change_with_the_length_are_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "partial_rotary_factor": 1.0}
    model = tiny_model("gpt_neox", "language-modeling", layers=1, rope_parameters=rope)
    with pytest.raises(ModelError, match="rotary positions of type 'dynamic' change with the length"):
        emit(Student(model, shape_of(model)), tmp_path)


def test_a_graph_that_computes_something_else_never_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emit(student_of("electra"), tmp_path / "right")
    wrong = exported._known[skeleton.structure(model_of("electra"))]  # it has Gelu where the next model has Relu
    monkeypatch.setattr(exported, "skeletons", lambda model: iter([wrong]))
    other = tiny_model("electra", layers=2, **CLASSIFIERS["electra"], hidden_act="relu")
    with pytest.raises(ModelError, match=r"of ElectraFor\w+ is not equivalent to the model: logits .* differ by"):
        emit(Student(other, shape_of(other)), tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


@pytest.mark.slow
def test_a_model_that_unrolls_its_input_is_refused(tmp_path: Path) -> None:
    model = tiny_model("mamba", "language-modeling", layers=1, state_size=4)
    with pytest.raises(ModelError, match="MambaForCausalLM is not equivalent to the model"):
        emit(Student(model, shape_of(model)), tmp_path)
