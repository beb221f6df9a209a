"""A search over vocabularies: candidates are scored, exported and run in the tokens of their own tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import autolite
from autolite import registry
from autolite.architecture import ModelShape
from autolite.front import Result
from autolite.runtime.onnxruntime import OnnxRuntime
from autolite.tasks.base import DataSpec
from tests.conftest import RunSearch

SPACE = """
name: vocabulary
description: Fewer tokens and a thin table.
steps:
  - embedding: {rank: [0.5], vocabulary: [30, used], min_count: 2}
  - distill: {batch_size: 16, temperature: 2.0}
  - quantize: {embedding: [int8, fp32]}
stages:
  screen: {trials: 2, effort: 2}
  recover: {trials: 1, effort: 4, max_effort: 20}
  confirm: {trials: 1, effort: 6, max_effort: 40}
"""


@pytest.fixture(scope="module")
def found(run_search: RunSearch, tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("vocabulary")
    (folder / "space.yaml").write_text(SPACE, encoding="utf-8")
    return run_search(space=str(folder / "space.yaml"), out=folder / "run", budget="3trials")


def folders(found: Result) -> list[Path]:
    out = found.path if found.path.is_dir() else found.path.parent
    return [out / c.path for c in found.front.candidates if "embedding" in c.plan.describe()]


def test_a_candidates_quality_is_that_of_its_folder(found: Result, tiny_data: Path) -> None:
    task = registry.get("task", "text-classification")
    assert folders(found)
    for folder, candidate in zip(folders(found), found.front.candidates, strict=False):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModelForSequenceClassification.from_pretrained(folder)
        shape = ModelShape.from_json(model.config.quantization_config.shape)
        assert len(tokenizer) == shape.vocab == model.config.vocab_size < 96
        assert shape.embedding_rank == 16
        data = task.load(DataSpec(str(tiny_data)), tokenizer, model.config)
        runner = OnnxRuntime().load(folder / "model.onnx")
        for split, told in ((data.selection, candidate.quality), (data.test, candidate.test)):
            assert told is not None
            right = 0
            for batch in task.batches(split, 32, tokenizer.pad_token_id):
                logits = runner.run(batch.inputs)["logits"]
                right += int((logits.argmax(-1) == batch.labels).sum())
            assert told.value == pytest.approx(right / len(split))


def test_the_pipeline_reads_any_text_and_agrees_with_transformers(found: Result) -> None:
    for folder in folders(found):
        pipeline = autolite.pipeline(folder)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModelForSequenceClassification.from_pretrained(folder)
        for text in ("w1 great w3", "words it never saw: 東京 🙂"):
            inputs = tokenizer(text, return_tensors="pt")
            with torch.no_grad():
                expected = model(**inputs).logits[0].numpy()
            np.testing.assert_allclose(pipeline.run(text), expected, atol=2e-3)
