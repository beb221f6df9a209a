"""Emitted models compute what transformers computes, store each weight once, and do not say where they were made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import PreTrainedModel

from autolite import parts, surgery
from autolite.architecture import shape_of
from autolite.errors import ModelError, StorageError
from autolite.formats import FORMATS, decode, nbytes
from autolite.runtime import modelfile
from autolite.runtime.blocks import ACTIVATIONS
from autolite.runtime.emit import emit
from autolite.runtime.onnxruntime import OnnxRuntime
from autolite.runtime.variants import Place, usual
from autolite.techniques.base import Student
from autolite.techniques.quantize import Quantize, QuantizeConfig
from autolite.testing import PAD, VOCAB, tiny_inputs, tiny_model

ENCODERS = ("bert", "distilbert", "roberta", "albert")
DECODERS = ("gpt2", "llama", "qwen2", "qwen3")
models = pytest.mark.parametrize(
    ("family", "task"),
    [(f, "text-classification") for f in ENCODERS + DECODERS] + [(f, "language-modeling") for f in DECODERS],
)


def student_of(model: PreTrainedModel, **formats: str) -> Student:
    student = Student(model, shape_of(model))
    return Quantize().apply(student, QuantizeConfig(**formats), None) if formats else student  # type: ignore[arg-type]


def decoded(student: Student) -> PreTrainedModel:
    """A copy of the model that holds what its formats can represent."""
    model = surgery.clone(student.model)
    with torch.no_grad():
        for group in parts.matrices_of(model).values():
            for key, matrix in group.items():
                if key in student.encoded:
                    matrix.weight.copy_(decode(student.encoded[key]))
    return model


def random_inputs(batch: int, tokens: int, side: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Sequences of random lengths, the first of them full, padded on one side."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, tokens + 1, (batch,), generator=generator)
    lengths[0] = tokens
    place = torch.arange(tokens) if side == "right" else torch.arange(tokens).flip(0)
    mask = (place < lengths[:, None]).long()
    ids = torch.randint(4, VOCAB, (batch, tokens), generator=generator)
    return {"input_ids": torch.where(mask.bool(), ids, PAD), "attention_mask": mask}


def largest_difference(model: PreTrainedModel, file: Path, inputs: dict[str, torch.Tensor]) -> float:
    """Over the logits of all tokens that are not padding."""
    with torch.no_grad():
        expected = model(**inputs).logits.numpy()
    found = OnnxRuntime().load(file).run({k: v.numpy() for k, v in inputs.items()})["logits"]
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    if found.ndim == 3:
        real = inputs["attention_mask"].bool().numpy()
        found, expected = found[real], expected[real]
    return float(np.abs(found - expected).max())


def stored(file: Path) -> int:
    """Bytes of the stored tensors."""
    return sum(len(t.raw_data) for t in onnx.load(file).graph.initializer)


def check(model: PreTrainedModel, file: Path, tolerance: float = 1e-4) -> None:
    for batch, tokens in ((1, 1), (3, 9), (2, 32)):
        for side in ("right", "left"):
            difference = largest_difference(model, file, random_inputs(batch, tokens, side))
            assert difference <= tolerance, (batch, tokens, side, difference)


@models
def test_logits_are_those_of_transformers(family: str, task: str, tmp_path: Path) -> None:
    model = tiny_model(family, task)
    check(model, emit(student_of(model), tmp_path)[0])


@pytest.mark.parametrize(("form", "tolerance"), [("fp32", 1e-5), ("int8", 0.05)])
def test_images_are_classified_as_transformers_does(form: str, tolerance: float, tmp_path: Path) -> None:
    student = student_of(tiny_model("vit"), attention=form, ffn=form, head=form)
    (file,) = emit(student, tmp_path)
    for batch in (1, 3):
        inputs = tiny_inputs(student.model, batch)
        with torch.no_grad():
            expected = decoded(student)(**inputs).logits.numpy()
        found = OnnxRuntime().load(file).run({k: v.numpy() for k, v in inputs.items()})["logits"]
        assert np.square(found - expected).mean() ** 0.5 <= tolerance * expected.std()


# What stands at each place when everything but one kind is as usual.
OPTIONS = [
    (kind, option)
    for kind, options in {
        "int8": ("uint8",),
        "qkv": ("separate",),
        "attention": ("MultiHeadAttention", "plain"),
        "cached": ("GroupQueryAttention", "plain"),
        "first": ("absorbed", "products"),
        "gelu": ("erf",),
        "norm": ("skip",),
        "lookup": ("plain",),
    }.items()
    for option in options
]


@pytest.mark.parametrize(("kind", "option"), OPTIONS)
@pytest.mark.parametrize("form", ["fp32", "int8"])
@pytest.mark.parametrize(
    ("family", "task"),
    [("bert", "text-classification"), ("gpt2", "language-modeling"), ("qwen3", "language-modeling")],
)
def test_every_option_at_every_place_computes_the_same(
    family: str, task: str, form: str, kind: str, option: str, tmp_path: Path
) -> None:
    def choose(place: Place) -> str:
        if place.kind == "int8":
            return "uint8"  # exact on every processor
        return option if place.kind == kind and option in place.options else usual(place)

    student = student_of(tiny_model(family, task), attention=form, ffn=form)
    outputs = []
    inputs = {k: v.numpy() for k, v in random_inputs(3, 40, "right").items()}
    for name, choices in (("usual", lambda place: "uint8" if place.kind == "int8" else usual(place)), (option, choose)):
        (file,) = emit(student, tmp_path / name, choices=choices)
        logits = OnnxRuntime().load(file).run(inputs)["logits"]
        outputs.append(logits[inputs["attention_mask"].astype(bool)] if logits.ndim == 3 else logits)
    usual_logits, found = outputs
    scale = 1e-5 if form == "fp32" else 0.15  # rounding of activations is a step more or less here and there
    assert np.square(found - usual_logits).mean() ** 0.5 <= scale * usual_logits.std()


@models
def test_layers_of_different_widths(family: str, task: str, tmp_path: Path) -> None:
    model = tiny_model(family, task)
    surgery.keep_heads(model, 1, [1])
    surgery.keep_neurons(model, 1, range(3, 40))
    if family != "albert":  # its layers are one
        surgery.keep_neurons(model, 0, range(7))
        surgery.keep_layers(model, [0, 1])
    check(model, emit(student_of(model), tmp_path)[0])


@pytest.mark.parametrize("form", ["fp32", "int8", "int4", "kmeans4"])
@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama"])
def test_shared_layers_are_stored_once(family: str, form: str, tmp_path: Path) -> None:
    own, shared = tiny_model(family), tiny_model(family)
    surgery.share_layers(shared, attention=[0, 0, 0], feed_forward=[0, 1, 1])
    formats = {"attention": form, "ffn": form}
    whole = stored(emit(student_of(own, **formats), tmp_path / "own")[0])
    file = emit(student_of(shared, **formats), tmp_path / "shared")[0]
    layers = parts.layers_of(own)
    matrices = [m for layer in layers[:2] for m in layer.attention_matrices] + [*layers[0].ffn_matrices]
    saved = sum(nbytes(form, *m.weight.shape) + (0 if m.bias is None else m.bias.nbytes) for m in matrices)
    assert saved - 200 <= whole - stored(file) <= saved  # the small rest tells the uses of a matrix apart
    if form == "fp32":
        check(shared, file)


# bf16 multiplies in float32 and agrees to rounding. 8-bit activations cost every product of this random model a
# step of noise, which adds up to some percent of the logits; test_linear.py pins the kernels themselves.
@pytest.mark.parametrize(("form", "tolerance"), [("bf16", 1e-5), ("int8", 0.15), ("int4", 0.15), ("kmeans4", 0.3)])
@models
def test_quantized_models_compute_with_the_decoded_matrices(
    family: str, task: str, form: str, tolerance: float, tmp_path: Path
) -> None:
    model = tiny_model(family, task)
    table = form if FORMATS[form].embedding else "fp32"
    head = table if shape_of(model).tied else form
    student = student_of(model, attention=form, ffn=form, embedding=table, head=head)
    (file,) = emit(student, tmp_path)
    inputs = random_inputs(8, 21, "right")
    with torch.no_grad():
        expected = decoded(student)(**inputs).logits.numpy()
    found = OnnxRuntime().load(file).run({k: v.numpy() for k, v in inputs.items()})["logits"]
    if found.ndim == 3:
        real = inputs["attention_mask"].bool().numpy()
        found, expected = found[real], expected[real]
    assert np.square(found - expected).mean() ** 0.5 <= tolerance * expected.std()


# All formats in one family, and one of each way of looking up in the others
LOOKED_UP = [
    (family, form, option)
    for family in ("bert", "distilbert", "roberta", "albert", "gpt2")
    for form in (
        [f.name for f in FORMATS.values() if f.embedding and f.name != "fp32"]
        if family == "bert"
        else ("int8", "int4", "int3")
    )
    for option in Place("lookup", form).options
]


@pytest.mark.parametrize(("family", "form", "option"), LOOKED_UP)
def test_words_and_positions_are_looked_up_in_their_format(family: str, form: str, option: str, tmp_path: Path) -> None:
    """The rest is in float32, so that logits agree to its rounding."""
    model = tiny_model(family)
    tables = parts.embeddings_of(model)
    assert tables.word is not None
    assert tables.position is not None
    student = student_of(model, embedding=form)
    student = replace(student, encoded={t.key: student.encoded[t.key] for t in (tables.word, tables.position)})
    (file,) = emit(student, tmp_path, choices=lambda place: option if place.kind == "lookup" else usual(place))
    check(decoded(student), file)
    whole = stored(emit(Student(model, shape_of(model)), tmp_path / "whole")[0])
    sizes = [tuple(table.weight.shape) for table in (tables.word, tables.position)]
    saved = sum(4 * rows * width - nbytes(form, rows, width) for rows, width in sizes)
    assert abs(whole - stored(file) - saved) < 300  # shapes, masks and levels


def test_positions_and_factored_words_are_of_two_widths(tmp_path: Path) -> None:
    model = tiny_model("roberta")
    surgery.factor_embedding(model, torch.randn(VOCAB, 8), torch.randn(8, 32), tied=False)
    student = student_of(model, embedding="int3")
    position = parts.embeddings_of(model).position
    assert position is not None
    assert student.encoded[position.key].shape == (64, 32)
    check(decoded(student), emit(student, tmp_path)[0], 1e-3)


def test_codes_are_stored_as_they_were_encoded(tmp_path: Path) -> None:
    student = student_of(tiny_model("bert"), attention="int8", ffn="int4", embedding="int8", head="kmeans4")
    (file,) = emit(student, tmp_path)
    content = file.read_bytes()
    layer = parts.layers_of(student.model)[0]
    merged = torch.cat([student.encoded[m.key].tensors["codes"] for m in (layer.query, layer.key, layer.value)])
    assert merged.T.contiguous().numpy().tobytes() in content
    assert student.encoded[layer.ffn_in.key].tensors["codes"].numpy().tobytes() in content
    pooler = parts.head_of(student.model).dense[0][0]
    assert student.encoded[pooler.key].tensors["codes"].numpy().tobytes() in content


def test_the_file_is_little_more_than_the_formats_promise(tmp_path: Path) -> None:
    model = tiny_model("bert", hidden_size=64, vocab_size=2000)
    student = student_of(model, attention="int8", ffn="int4", embedding="int4", head="int8")
    promised = sum(e.nbytes for e in student.encoded.values())
    rest = sum(p.nbytes for n, p in model.named_parameters() if n not in student.encoded)
    size = emit(student, tmp_path)[0].stat().st_size
    assert promised + rest <= size <= promised + rest + 20_000  # names and nodes


def test_equal_students_give_equal_bytes_and_nothing_local_is_in_them(tmp_path: Path) -> None:
    first, second = (
        emit(student_of(tiny_model("bert"), attention="int8", ffn="kmeans4"), tmp_path / name)[0].read_bytes()
        for name in ("first", "second")
    )
    assert first == second
    model = onnx.load_from_string(first)
    assert (model.producer_name, model.doc_string, model.graph.doc_string) == ("autolite", "", "")
    assert not any(n.doc_string or n.metadata_props for n in model.graph.node)
    for trace in (str(tmp_path), str(Path(__file__).parent.parent), str(Path.home()), "site-packages", ".py"):
        assert trace.encode() not in first


def test_the_emitted_model_is_valid_onnx(tmp_path: Path) -> None:
    for family in ("bert", "llama"):
        task = "text-classification" if family == "bert" else "language-modeling"
        (file,) = emit(student_of(tiny_model(family, task)), tmp_path / family)
        onnx.checker.check_model(onnx.load(file))


def test_inputs_are_ids_mask_and_token_types_where_there_are_any(tmp_path: Path) -> None:
    names = {}
    for family in ("bert", "distilbert", "roberta"):
        model = tiny_model(family, type_vocab_size=1) if family == "roberta" else tiny_model(family)
        (file,) = emit(student_of(model), tmp_path)
        names[family] = [i.name for i in onnx.load(file).graph.input]
    assert names["bert"] == ["input_ids", "attention_mask", "token_type_ids"]
    assert names["distilbert"] == names["roberta"] == ["input_ids", "attention_mask"]


def test_token_types_count_and_are_zero_where_not_given(tmp_path: Path) -> None:
    model = tiny_model("bert")
    (file,) = emit(student_of(model), tmp_path)
    inputs = tiny_inputs(model)
    types = {"token_type_ids": (torch.arange(9) > 4).long().expand(3, 9).contiguous()}
    assert largest_difference(model, file, inputs) < 1e-4
    assert largest_difference(model, file, inputs | types) < 1e-4
    runner = OnnxRuntime().load(file)
    arrays = {k: v.numpy() for k, v in (inputs | types).items()}
    without = {k: v for k, v in arrays.items() if k != "token_type_ids"}
    assert not np.allclose(runner.run(arrays)["logits"], runner.run(without)["logits"], atol=1e-3)


@pytest.mark.parametrize("activation", sorted(set(ACTIVATIONS) - {"sigmoid", "tanh"}))
def test_activations_are_those_of_transformers(activation: str, tmp_path: Path) -> None:
    model = tiny_model("bert", hidden_act=activation, layers=1)
    assert largest_difference(model, emit(student_of(model), tmp_path)[0], tiny_inputs(model)) < 1e-5


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
            "rope_theta": 10000.0,
        },
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16},
    ],
    ids=lambda rope: str(rope["rope_type"]),
)
def test_scaled_rotary_positions(rope: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model("llama", "language-modeling", rope_parameters=rope)
    check(model, emit(student_of(model), tmp_path)[0])


def test_attention_scaled_by_the_layer(tmp_path: Path) -> None:
    model = tiny_model("gpt2", "language-modeling", scale_attn_by_inverse_layer_idx=True)
    check(model, emit(student_of(model), tmp_path)[0])


def test_weights_above_the_limit_of_protobuf_go_to_a_file_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modelfile, "MAX_PROTOBUF", 10_000)
    model = tiny_model("bert")
    for _ in range(2):  # writing again replaces
        files = emit(student_of(model), tmp_path)
    assert [f.name for f in files] == ["model.onnx", "model.onnx.data"]
    assert files[0].stat().st_size < 30_000 < files[1].stat().st_size < 200_000
    check(model, files[0])


def test_what_cannot_be_emitted_is_refused_with_the_reason(tmp_path: Path) -> None:
    dynamic = tiny_model(
        "llama", "language-modeling", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    )
    with pytest.raises(ModelError, match="dynamic"):
        emit(student_of(dynamic), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(StorageError, match="taken"):
        emit(student_of(tiny_model("bert")), tmp_path / "taken")


def test_the_student_is_untouched(tmp_path: Path) -> None:
    student = student_of(tiny_model("gpt2", "language-modeling"), attention="int8", ffn="int4")
    before = {k: v.clone() for k, v in student.model.state_dict().items()}
    emit(student, tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in student.model.state_dict().items())
