"""The examples do what they say."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from autolite.reload import load_model
from autolite.tasks.base import DataSpec
from autolite.tasks.text_classification import TextClassification

EXAMPLES = Path(__file__).parent.parent / "examples"


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def encoder(tiny_teacher: Path, tmp_path: Path) -> Path:
    """The folder of a small BERT that tells the sentences apart, but has lost its head."""
    folder = tmp_path / "encoder"
    model, tokenizer = load_model(str(tiny_teacher), "AutoModelForSequenceClassification")
    base: Any = model.base_model
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_an_encoder_is_made_into_a_classifier(encoder: Path, tiny_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "teacher"
    arguments = {"--model": encoder, "--data": tiny_data, "--out": out, "--epochs": 1, "--lr": 1e-3}
    arguments |= {"--max-length": 16, "--batch-size": 16}
    done = CliRunner().invoke(
        load_example("finetune_classifier").main, [str(word) for pair in arguments.items() for word in pair]
    )
    assert done.exit_code == 0, done.output

    task = TextClassification()
    model, tokenizer = load_model(str(out), task.auto_class)
    assert model.config.id2label == {0: "0", 1: "1"}
    test = task.load(DataSpec(str(tiny_data), max_length=16), tokenizer, model.config).test
    right = np.zeros(2)
    with torch.inference_mode():
        for ids, label in zip(test.input_ids, test.labels, strict=True):
            logits = model(torch.from_numpy(ids)[None]).logits
            right += task.score_examples(logits.numpy(), np.array([label]))[0]
    said = re.search(r"test accuracy ([\d.]+)", done.output)
    assert said is not None
    assert float(said[1]) == pytest.approx(right[0] / right[1], abs=5e-5)
    assert right[0] / right[1] > 0.8


def test_data_that_cannot_be_used_is_named(encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    arguments = ["--model", str(encoder), "--data", str(tmp_path / "empty.jsonl"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(load_example("finetune_classifier").main, arguments)
    assert done.exit_code == 2
    assert "empty.jsonl' is empty" in done.output
    assert not (tmp_path / "out").exists()


def test_a_language_model_is_trained_from_scratch(tmp_path: Path) -> None:
    words = np.random.default_rng(0).choice(["to", "be", "or", "not", "that", "is", "the", "question"], 6000)
    text = tmp_path / "play.txt"
    text.write_text("\n".join(" ".join(words[start : start + 12]) for start in range(0, 6000, 12)), encoding="utf-8")
    out = tmp_path / "teacher"
    arguments = {"--data": text, "--out": out, "--vocabulary": 300, "--width": 32, "--layers": 1, "--heads": 2}
    arguments |= {"--ffn": 32, "--epochs": 4, "--batch-size": 2, "--lr": 1e-2}
    done = CliRunner().invoke(
        load_example("train_language_model").main, [str(word) for pair in arguments.items() for word in pair]
    )
    assert done.exit_code == 0, done.output
    found = float(re.findall(r"test perplexity ([\d.]+)", done.output)[0])
    assert found < 30, "eight words, each as likely: far below the 300 of knowing nothing"
    model, tokenizer = load_model(str(out), "AutoModelForCausalLM")
    assert model.config.vocab_size == len(tokenizer)
