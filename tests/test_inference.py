"""Candidate folders answer as transformers pipelines do."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

import autolite
from autolite import inference
from autolite.architecture import shape_of
from autolite.errors import InputError, ModelError
from autolite.runtime.emit import emit
from autolite.runtime.onnxruntime import OnnxRuntime
from autolite.techniques.base import Student
from autolite.testing import tiny_model

WORDS = ["the", "film", "was", "good", "bad", "long", "and", "i", "loved", "hated", "it", "not", "at", "all"]


def tokenizer(pairs: bool) -> Any:
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "[PAD]", "[CLS]", "[SEP]", *WORDS])}
    core = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = Whitespace()
    if pairs:
        core.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    fast: Any = transformers.PreTrainedTokenizerFast
    return fast(tokenizer_object=core, model_max_length=64, **special)


def write(folder: Path, family: str, task: str, **settings: Any) -> Path:
    model = tiny_model(family, task, **settings)
    model.config.id2label = {0: "negative", 1: "neutral", 2: "positive"}
    model.save_pretrained(folder)
    tokenizer(pairs=family == "bert").save_pretrained(folder)
    emit(Student(model, shape_of(model)), folder)
    manifest = {"schema": 1, "task": task, "plan": {"seed": 0, "steps": []}, "shape": shape_of(model).to_json()}
    (folder / "autolite.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("classifier"), "bert", "text-classification")


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("language"), "gpt2", "language-modeling")


def same(found: Any, expected: Any) -> None:
    """Compare nested lists and dicts, numbers to five digits."""
    assert type(found) is type(expected)
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            same(found[key], expected[key])
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4)
    else:
        assert found == expected


PAIR = {"text": "the film was good", "text_pair": "i loved it"}


@pytest.mark.parametrize(
    "inputs",
    ["i loved it", ["the film was bad", "not at all"], PAIR, [PAIR, {"text": "it was long"}], "what is that"],
    ids=["text", "texts", "pair", "pairs", "unknown words"],
)
@pytest.mark.parametrize("more", [{}, {"top_k": 1}, {"top_k": 2}, {"top_k": None}], ids=str)
def test_the_answer_is_that_of_the_transformers_pipeline(classifier: Path, inputs: Any, more: dict[str, Any]) -> None:
    expected = transformers.pipeline("text-classification", model=str(classifier))(inputs, **more)
    same(autolite.pipeline(classifier)(inputs, **more), expected)


@pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
def test_scores_follow_the_kind_of_problem(kind: str, tmp_path: Path) -> None:
    folder = write(tmp_path, "bert", "text-classification", problem_type=kind)
    expected = transformers.pipeline("text-classification", model=str(folder))("i loved it", top_k=None)
    same(autolite.pipeline(folder)("i loved it", top_k=None), expected)


def test_the_task_can_be_named(classifier: Path) -> None:
    assert autolite.pipeline("text-classification", classifier)("it was good")
    with pytest.raises(ModelError, match="was made for the task 'text-classification', not 'language-modeling'"):
        autolite.pipeline("language-modeling", classifier)


def test_texts_are_cut_at_what_the_model_can_take(classifier: Path) -> None:
    run = autolite.pipeline(classifier)
    same(run("good " * 500), run("good " * 62))
    assert run("good " * 500) != run("good " * 61)


def test_language_models_give_logits_and_perplexity(language_model: Path) -> None:
    run = autolite.pipeline(language_model)
    text = "the film was good and i loved it"
    model = transformers.AutoModelForCausalLM.from_pretrained(language_model)
    ids = torch.tensor([tokenizer(pairs=False)(text)["input_ids"]])
    with torch.no_grad():
        expected = model(ids, labels=ids)
    np.testing.assert_allclose(run.logits(text), expected.logits[0].numpy(), atol=1e-4)
    assert run.perplexity(text) == pytest.approx(math.exp(expected.loss), rel=1e-4)
    assert [round(token["score"], 4) for token in run.next_tokens(text)] == [
        round(float(p), 4) for p in expected.logits[0, -1].softmax(-1).topk(5).values
    ]


def test_perplexity_of_a_long_text_is_over_blocks(language_model: Path) -> None:
    run = autolite.pipeline(language_model)
    words = [WORDS[i % 7] for i in range(64 + 20)]
    first, second = " ".join(words[:64]), " ".join(words[64:])
    nats = 63 * math.log(run.perplexity(first)) + 19 * math.log(run.perplexity(second))
    assert run.perplexity(" ".join(words)) == pytest.approx(math.exp(nats / 82), rel=1e-6)
    with pytest.raises(InputError, match="takes two at least"):
        run.perplexity("good")


@pytest.mark.parametrize("inputs", [3, {"words": "good"}, {"text": "good", "pair": "bad"}, ["good", 3]], ids=str)
def test_what_is_no_text_is_refused(classifier: Path, inputs: Any) -> None:
    with pytest.raises(InputError, match="give a text, or a pair"):
        autolite.pipeline(classifier)(inputs)


@pytest.mark.parametrize(("asked", "cores", "used"), [(None, 8, 3), (None, 2, 2), (1, 8, 1), (5, 2, 5)])
def test_a_call_uses_the_threads_of_the_workload_that_the_candidate_was_made_for(
    asked: int | None, cores: int, used: int, classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(classifier, folder)
    manifest = json.loads((folder / "autolite.json").read_text())
    (folder / "autolite.json").write_text(json.dumps({**manifest, "workload": "batch=1,tokens=8,threads=3"}))
    found: list[int] = []
    load = OnnxRuntime.load
    monkeypatch.setattr(OnnxRuntime, "load", lambda self, file, threads: found.append(threads) or load(self, file, 1))
    monkeypatch.setattr(inference, "processors", lambda: cores)
    assert autolite.pipeline(folder, threads=asked)("it was good")
    assert found == [used]


def delete(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def content(name: str, text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_text(text)

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (delete("autolite.json"), "there is no autolite.json"),
        (delete("model.onnx"), "there is no model at"),
        (delete("config.json"), "there is no config.json"),
        (delete("tokenizer.json"), "tokenizer"),
        (content("autolite.json", "{"), "cannot be read as JSON"),
        (content("autolite.json", "[1]"), "not a candidate's manifest"),
        (content("autolite.json", '{"name": "somebody else\'s"}'), "not a candidate's manifest"),
        (content("autolite.json", '{"schema": 99, "task": "text-classification"}'), "schema 99"),
        (content("autolite.json", '{"schema": 1, "task": "ocr"}'), "task 'ocr', which is not installed"),
        (
            content("autolite.json", '{"schema": 1, "task": "text-classification", "artifacts": [{"runtime": "x"}]}'),
            "names no artifact",
        ),
        (
            content("autolite.json", '{"schema": 1, "task": "text-classification", "workload": "fast"}'),
            r"autolite\.json is damaged: workload 'fast'",
        ),
        (content("model.onnx", "no model"), "cannot load"),
        (content("config.json", "{}"), "cannot be loaded"),
    ],
)
def test_damaged_folders_are_refused(
    classifier: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(classifier, folder)
    damage(folder)
    with pytest.raises(ModelError, match=message):
        autolite.pipeline(folder)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no autolite\.json in .*nowhere"):
        autolite.pipeline(tmp_path / "nowhere")
