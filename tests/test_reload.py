"""Compressed folders reload with plain transformers; bad folders end in one clear sentence."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from autolite.architecture import ModelShape, shape_of
from autolite.errors import ModelError, StorageError
from autolite.families import FAMILIES
from autolite.formats import decode, encode
from autolite.parts import embeddings_of
from autolite.reload import load_model, load_student, save_student
from autolite.surgery import clone, keep_heads, keep_layers, keep_neurons, share_layers
from autolite.testing import tiny_inputs, tiny_model, tiny_tokenizer

CLASSIFIER = "AutoModelForSequenceClassification"
CASES = [(f, t) for f, m in FAMILIES.items() for t in ("text-classification", "language-modeling")[: 1 + m.causal]]


def compressed(family: str = "bert", task: str = "text-classification") -> Any:
    extra = {"scale_attn_by_inverse_layer_idx": True} if family == "gpt2" else {}
    model = tiny_model(family, task, layers=4, **extra)
    keep_layers(model, [0, 2, 3])
    keep_heads(model, 0, [1])
    keep_neurons(model, 2, range(6))
    if family != "albert":
        share_layers(model, [0, 1, 1], [0, 0, 2])
    return model


def auto_class(family: str, task: str) -> str:
    if family == "vit":
        return "AutoModelForImageClassification"
    return CLASSIFIER if task == "text-classification" else "AutoModelForCausalLM"


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@torch.no_grad()
def same_outputs(one: Any, other: Any) -> bool:
    inputs = tiny_inputs(one)
    return torch.equal(one(**inputs).logits, other(**inputs).logits)


@pytest.mark.parametrize(("family", "task"), CASES)
def test_a_compressed_model_reloads_bit_for_bit_twice(family: str, task: str, tmp_path: Path) -> None:
    model = compressed(family, task)
    shape = shape_of(model)
    save_student(model, shape, tmp_path / "one")
    assert not hasattr(model.config, "quantization_config")
    auto = getattr(transformers, auto_class(family, task))
    first, info = auto.from_pretrained(tmp_path / "one", output_loading_info=True)
    assert not any(info.values()), info
    first.save_pretrained(tmp_path / "two")
    second = auto.from_pretrained(tmp_path / "two")
    for loaded in (first, second):
        assert same_outputs(loaded, model)
        assert shape_of(loaded) == shape
    with safe_open(tmp_path / "two" / "model.safetensors", "pt") as stream:
        assert len(stream.keys()) == len(list(model.parameters()))  # each shared weight once
    assert second.config.num_attention_heads == 4  # the original's width
    assert second.config.num_hidden_layers == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reloaded_model_can_be_trained_cast_cloned_and_saved(family: str, tmp_path: Path) -> None:
    save_student(model := compressed(family), shape_of(model), tmp_path / "one")
    loaded: Any = load_student(tmp_path / "one")[0]
    labels = torch.tensor([0, 1, 2])
    optimizer = torch.optim.Adam(loaded.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = loaded(**tiny_inputs(loaded), labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    loaded.float()  # transformers refuses to cast models it takes for quantized
    save_student(twin := clone(loaded), shape_of(twin), tmp_path / "two")
    assert same_outputs(load_student(tmp_path / "two")[0], twin)


def test_the_shape_comes_back_with_its_number_formats(tmp_path: Path) -> None:
    model = compressed()
    shape = ModelShape.from_json(shape_of(model).to_json() | {"head_format": "int8", "embedding_format": "int8"})
    save_student(model, shape, tmp_path)
    assert load_student(tmp_path)[1] == shape
    with pytest.raises(ModelError, match="does not describe the model"):
        save_student(model, shape_of(tiny_model("bert")), tmp_path)


def test_a_folder_whose_positions_are_float32_keeps_them(tmp_path: Path) -> None:
    """As those that were written before positions followed the embedding's format: the manifest says int4 of both."""
    model = tiny_model("bert")
    position = embeddings_of(model).position
    assert position is not None
    assert not torch.equal(decode(encode(position.weight, "int4")), position.weight)
    save_student(model, replace(shape_of(model), embedding_format="int4"), tmp_path)
    loaded, shape = load_student(tmp_path)
    assert shape.embedding_format == "int4"
    assert same_outputs(loaded, model)


def test_a_bare_model_loads_from_the_folder_of_a_classifier(tmp_path: Path) -> None:
    save_student(model := compressed(), shape_of(model), tmp_path)
    base = transformers.AutoModel.from_pretrained(tmp_path)
    inputs = tiny_inputs(model)
    assert torch.equal(base(**inputs).last_hidden_state, model.bert(**inputs).last_hidden_state)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write the model to .*file"):
        save_student(model := tiny_model("bert"), shape_of(model), tmp_path / "file" / "folder")


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (None, "not written by AutoLite"),
        ({"quant_method": "gptq", "bits": 4}, "not written by AutoLite"),
        ({"quant_method": "autolite", "schema": 99, "shape": {}}, "upgrade autolite"),
        ({"quant_method": "autolite", "schema": 1, "shape": {"family": "bert"}}, "corrupt"),
        ({"quant_method": "autolite", "schema": 1, "shape": [1]}, "corrupt"),
    ],
)
def test_a_foreign_or_corrupt_manifest_is_refused(manifest: Any, message: str, tmp_path: Path) -> None:
    save_student(model := compressed(), shape_of(model), tmp_path)
    edit_config(tmp_path, quantization_config=manifest)
    with pytest.raises(ModelError, match=message):
        load_student(tmp_path)


def test_a_manifest_of_another_model_is_refused(tmp_path: Path) -> None:
    save_student(model := compressed(), shape_of(model), tmp_path)
    other = shape_of(tiny_model("gpt2")).to_json()
    edit_config(tmp_path, quantization_config={"quant_method": "autolite", "schema": 1, "shape": other})
    with pytest.raises(ModelError, match="of a gpt2 model"):
        load_student(tmp_path)
    edit_config(tmp_path, quantization_config=None, architectures=["os.system"])
    with pytest.raises(ModelError, match="not written by AutoLite"):
        load_student(tmp_path)


def test_an_unknown_model_class_is_refused(tmp_path: Path) -> None:
    save_student(model := compressed(), shape_of(model), tmp_path)
    edit_config(tmp_path, architectures=["logging"])
    with pytest.raises(ModelError, match="'logging', which transformers does not have"):
        load_student(tmp_path)


def test_truncated_or_missing_weights_are_refused(tmp_path: Path) -> None:
    save_student(model := compressed(), shape_of(model), tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    del tensors["bert.encoder.layer.0.output.dense.bias"]
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(ModelError, match=r"incomplete: .*layer.0.output.dense.bias"):
        load_student(tmp_path)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="corrupt"):
        load_student(tmp_path)


@pytest.fixture
def teacher_folder(tmp_path: Path) -> Path:
    tiny_model("bert").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_a_teacher_loads_in_float32_with_its_tokenizer(teacher_folder: Path) -> None:
    half: Any = tiny_model("bert")
    half.half().save_pretrained(teacher_folder)
    model, tokenizer = load_model(str(teacher_folder), CLASSIFIER)
    assert model.dtype == torch.float32
    assert not model.training
    assert tokenizer("w1 w2", "w3")["token_type_ids"] == [0, 0, 0, 0, 1, 1]


def test_a_compressed_folder_serves_as_a_teacher(teacher_folder: Path) -> None:
    save_student(model := compressed(), shape_of(model), teacher_folder)
    loaded, _ = load_model(str(teacher_folder), CLASSIFIER)
    assert same_outputs(loaded, model)
    keep_layers(loaded, [0, 2])
    save_student(loaded, shape_of(loaded), teacher_folder)
    again, shape = load_student(teacher_folder)
    assert shape.source_layers == ((0, 3),)
    assert same_outputs(again, loaded)


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path: Path) -> None:
    tiny_model("gpt2", pad_token_id=None).save_pretrained(tmp_path)
    tokenizer: Any = tiny_tokenizer()
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    tokenizer.save_pretrained(tmp_path)
    model, loaded = load_model(str(tmp_path), CLASSIFIER)
    assert model.config.pad_token_id == loaded.pad_token_id == 3


def test_images_have_no_tokenizer(tmp_path: Path) -> None:
    tiny_model("vit").save_pretrained(tmp_path)
    model, tokenizer = load_model(str(tmp_path), "AutoModelForImageClassification")
    assert tokenizer is None
    assert model.config.num_labels == 3


@pytest.mark.parametrize("name", ["./missing", "missing/model/folder"])
def test_a_missing_folder_is_named(name: str) -> None:
    with pytest.raises(ModelError, match="there is no model folder"):
        load_model(name, CLASSIFIER)


def test_a_name_that_the_hub_cannot_give_is_named() -> None:
    with pytest.raises(ModelError, match="'autolite-test/nothing-like-this'"):
        load_model("autolite-test/nothing-like-this", CLASSIFIER)


def test_pickle_weights_are_never_opened(teacher_folder: Path) -> None:
    (teacher_folder / "model.safetensors").rename(teacher_folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only pickle weights .*convert to safetensors"):
        load_model(str(teacher_folder), CLASSIFIER)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "no-such-type"}, r"cannot read the configuration of .*no-such-type"),
        ({"model_type": "marian"}, "'marian' model, of which transformers has no class for AutoModelForSequence"),
        (
            {"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.MyConfig"}},
            "needs code of its own, .*never run",
        ),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized already .gptq.: give the model that"),
    ],
)
def test_a_type_that_transformers_cannot_load_is_refused_before_weights_are_read(
    changes: dict[str, Any], message: str, teacher_folder: Path
) -> None:
    edit_config(teacher_folder, **changes)
    (teacher_folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=message):
        load_model(str(teacher_folder), CLASSIFIER)


def test_a_model_without_a_trained_head_must_be_fine_tuned_first(teacher_folder: Path) -> None:
    bare: Any = tiny_model("bert").base_model
    bare.save_pretrained(teacher_folder)
    with pytest.raises(ModelError, match=r"no trained head.*classifier.bias.*fine-tune it"):
        load_model(str(teacher_folder), CLASSIFIER)


def test_a_head_that_the_map_lacks_is_loaded_without_the_map(tmp_path: Path) -> None:
    tiny_model("bert", "language-modeling").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path), "AutoModelForCausalLM")
    assert type(model).__name__ == "BertLMHeadModel"
    assert shape_of(model).unmapped is not None


def test_corrupt_files_are_named(teacher_folder: Path) -> None:
    (teacher_folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="tokenizer"):
        load_model(str(teacher_folder), CLASSIFIER)
    (teacher_folder / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="corrupt"):
        load_model(str(teacher_folder), CLASSIFIER)
    (teacher_folder / "config.json").write_text('{"model_type":')
    with pytest.raises(ModelError, match=r"config.json is corrupt"):
        load_model(str(teacher_folder), CLASSIFIER)


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_autolite_imports_nothing_heavy() -> None:
    heavy = "torch transformers numpy onnxruntime optuna pydantic"
    assert run_python(f"import sys, autolite; print(sorted(set('{heavy}'.split()) & set(sys.modules)))") == "[]"


@pytest.mark.parametrize(
    "order", ["transformers, autolite", pytest.param("autolite, transformers", marks=pytest.mark.slow)]
)
def test_reloading_works_whichever_is_imported_first(order: str, tmp_path: Path) -> None:
    save_student(model := compressed(), shape_of(model), tmp_path)
    code = f"""
import {order}
from transformers import BertForSequenceClassification
print(len(BertForSequenceClassification.from_pretrained({str(tmp_path)!r}).bert.encoder.layer))
"""
    assert run_python(code) == "3"


@pytest.mark.slow
def test_our_quantizer_may_be_imported_before_the_registry_it_enters() -> None:
    code = (
        "import autolite.hf_quantizer, transformers.quantizers.auto as a; print(a.AUTO_QUANTIZER_MAPPING['autolite'])"
    )
    assert "AutoliteQuantizer" in run_python(code)
