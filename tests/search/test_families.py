"""A search carries every family: a classifier of each encoder, sentence pairs, and a language model."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import transformers

import autolite
from autolite import contracts
from autolite.front import Result
from autolite.testing import tiny_model, tiny_tokenizer
from tests.conftest import sentences, write_jsonl


def folder_of(family: str, task: str, folder: Path) -> Path:
    model = tiny_model(family, task)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def reloaded(auto: type, folder: Path) -> transformers.PreTrainedModel:
    model: transformers.PreTrainedModel = auto.from_pretrained(folder)  # type: ignore[attr-defined]
    return model


def check(result: Result, auto: type) -> None:
    """Every candidate's artifact computes what the reloaded model does, up to its quantized activations."""
    ids = np.random.default_rng(0).integers(4, 90, (3, 7))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for candidate in [*result.front]:
        folder = result.path / candidate.path
        session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
        names = json.loads((folder / "autolite.json").read_text(encoding="utf-8"))["inputs"]
        assert names == [i.name for i in session.get_inputs()]
        extra = {"token_type_ids": np.zeros_like(ids)} if "token_type_ids" in names else {}
        (found,) = session.run(None, {**feeds, **extra})
        with torch.no_grad():
            inputs = {name: torch.from_numpy(array) for name, array in feeds.items()}
            expected = reloaded(auto, folder)(**inputs).logits.numpy()
        assert np.linalg.norm(found - expected) < 0.25 * np.linalg.norm(expected)


@pytest.mark.parametrize("family", contracts.TEXT_FAMILIES)
def test_classifiers(family: str, tiny_space: Path, tmp_path: Path) -> None:
    model = folder_of(family, "text-classification", tmp_path / "model")
    data = write_jsonl(tmp_path / "data.jsonl", [{**row, "label": i % 3} for i, row in enumerate(sentences(200, 3))])
    result = autolite.search(model, data, target="pixel8", space=str(tiny_space), budget="4trials", out=tmp_path / "r")
    check(result, transformers.AutoModelForSequenceClassification)


def test_sentence_pairs(tiny_space: Path, tmp_path: Path) -> None:
    model = folder_of("bert", "text-classification", tmp_path / "model")
    ones, others = sentences(200, 4), sentences(200, 5)
    rows = [
        {"s1": a["text"], "s2": b["text"], "same": i % 3} for i, (a, b) in enumerate(zip(ones, others, strict=True))
    ]
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    result = autolite.search(
        model,
        data,
        target="pixel8",
        text="s1",
        text_pair="s2",
        label="same",
        space=str(tiny_space),
        budget="3trials",
        out=tmp_path / "r",
    )
    check(result, transformers.AutoModelForSequenceClassification)
    best = result.pick(max_drop=0.99)
    found = autolite.pipeline(str(best.folder))({"text": "w1 w2", "text_pair": "w3"})
    assert 0 < found["score"] <= 1


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_language_models(family: str, tmp_path: Path) -> None:
    model = folder_of(family, "language-modeling", tmp_path / "model")
    rng = random.Random(0)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(" ".join(f"w{rng.randrange(60)}" for _ in range(12)) for _ in range(300)), "utf-8")
    result = autolite.search(
        model,
        text,
        target="raspberry-pi-5",
        task="language-modeling",
        workload="tokens=32",
        space="quantize-only",
        budget="5trials",
        out=tmp_path / "r",
    )
    check(result, transformers.AutoModelForCausalLM)
    teacher = result.front.teacher["quality"]
    assert (teacher["metric"], teacher["direction"]) == ("perplexity", "minimize")
    for candidate in result.front:
        # Definition: what is kept of a language model is 1 less the rise of its mean loss in nats.
        rise = math.log(candidate.quality.value) - math.log(teacher["value"])
        assert math.isclose(candidate.kept.value, 1 - rise, abs_tol=1e-9)
        assert candidate.ttft_ms is not None
        assert candidate.tokens_per_second is not None
