"""A decoder's folder runs in onnxruntime-genai, and generates what AutoLite does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from autolite import registry
from autolite.architecture import shape_of
from autolite.front import write_json
from autolite.generation import Sampling, tokens
from autolite.runtime.emit import emit
from autolite.runtime.genai import FILE, genai_config
from autolite.runtime.onnxruntime import OnnxRuntime
from autolite.runtime.ortformat import convert
from autolite.runtime.variants import usual
from autolite.tasks.base import Split
from autolite.techniques.base import Context, Student
from autolite.techniques.prune import Prune, PruneConfig
from autolite.techniques.quantize import Quantize, QuantizeConfig
from autolite.testing import PAD
from tests.runtime.test_cached import FAMILIES, OPTIONS, decoder

og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
LONG = 24  # tokens of a text


def folder_of(student: Student, folder: Path, option: str = "Attention") -> Path:
    (file,) = emit(student, folder, choices=lambda place: option if place.kind == "cached" else usual(place))
    write_json(folder / FILE, genai_config(student.model, student.shape, file.name))
    return file


def generated_there(folder: Path, prompt: list[int]) -> list[int]:
    model = og.Model(str(folder))
    settings = og.GeneratorParams(model)
    settings.set_search_options(max_length=LONG)
    generator = og.Generator(model, settings)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(prompt) :]


def check(folder: Path, file: Path, end: int) -> None:
    runner, rng = OnnxRuntime().load(file), np.random.default_rng(0)
    seen: set[int] = set()
    for length in range(1, 7):
        prompt = rng.integers(3, 60, length).tolist()
        ours = list(tokens(runner, prompt, LONG - length, Sampling(temperature=0).chooser(), {end}))
        assert generated_there(folder, prompt) == ours
        seen |= set(ours)
    assert len(seen) > 3, "the models say something"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_generates_the_same_there(family: str, tmp_path: Path) -> None:
    model = decoder(family)
    model.generation_config.eos_token_id = 2
    check(tmp_path, folder_of(Student(model, shape_of(model)), tmp_path), 2)


@pytest.mark.parametrize("option", OPTIONS)
def test_however_attention_is_written(option: str, tmp_path: Path) -> None:
    model = decoder("llama")
    model.generation_config.eos_token_id = 2
    check(tmp_path, folder_of(Student(model, shape_of(model)), tmp_path, option), 2)


def test_compressed_with_heads_that_differ_from_layer_to_layer(tmp_path: Path) -> None:
    model = decoder("llama")
    model.generation_config.eos_token_id = 2
    teacher = Student(model, shape_of(model))
    text = Split("train", [np.arange(3, 15)], None, np.zeros(0, np.int64))
    context = Context(teacher, registry.get("task", "language-modeling"), text, PAD)
    student = Prune().apply(teacher, PruneConfig(heads=(0.5, 1.0, 0.5), importance="magnitude"), context)
    formats = QuantizeConfig(attention="int4", ffn="int8", embedding="int8")
    student = Quantize().apply(student, formats, context)
    assert len({layer.kv_heads for layer in student.shape.stacks[0].layers}) == 2
    check(tmp_path, folder_of(student, tmp_path), 2)


def test_in_the_ort_format(tmp_path: Path) -> None:
    model = decoder("qwen2")
    model.generation_config.eos_token_id = 2
    file = folder_of(Student(model, shape_of(model)), tmp_path)
    convert(file, tmp_path)
    config = tmp_path / FILE
    config.write_text(config.read_text().replace("model.onnx", "model.ort"))
    check(tmp_path, file, 2)


def test_texts_end_and_are_padded_as_the_model_says() -> None:
    model = decoder("llama")
    settings = model.generation_config
    settings.bos_token_id, settings.eos_token_id, settings.pad_token_id = 1, [2, 7], None
    found = genai_config(model, shape_of(model), "model.onnx")["model"]
    assert (found["bos_token_id"], found["eos_token_id"], found["pad_token_id"]) == (1, [2, 7], 2)
    settings.bos_token_id = settings.eos_token_id = None
    found = genai_config(model, shape_of(model), "model.onnx")["model"]
    assert not {"bos_token_id", "eos_token_id", "pad_token_id"} & set(found)
    assert json.dumps(found)
