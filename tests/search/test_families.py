"""A search carries every family: a classifier of each encoder, sentence pairs, and a language model."""

from __future__ import annotations

import io
import json
import math
import random
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from rich.console import Console

import autolite
from autolite import contracts, registry
from autolite.errors import InputError
from autolite.front import Result
from autolite.hardware import load_target
from autolite.report.tables import front_table
from autolite.runtime import tune
from autolite.search import problem, timing
from autolite.search.reprice import reprice
from autolite.tasks.base import DataSpec
from autolite.testing import tiny_model, tiny_tokenizer
from tests.conftest import sentences, write_jsonl


def folder_of(family: str, task: str, folder: Path, **config: Any) -> Path:
    model = tiny_model(family, task, **config)
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
        # Some processors need the options of our own loader, or products of 8-bit codes overflow.
        found = registry.get("runtime", "onnxruntime").load(folder / "model.onnx").run(feeds)["logits"]
        with torch.no_grad():
            inputs = {name: torch.from_numpy(array) for name, array in feeds.items()}
            expected = reloaded(auto, folder)(**inputs).logits.numpy()
        assert np.linalg.norm(found - expected) < 0.25 * np.linalg.norm(expected)


# BERT's are what all other tests of a search are of; ALBERT's layers share their weights.
@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=[] if name == "albert" else pytest.mark.slow) for name in contracts.TEXT_FAMILIES],
)
def test_classifiers(family: str, tiny_space: Path, tmp_path: Path) -> None:
    model = folder_of(family, "text-classification", tmp_path / "model")
    data = write_jsonl(tmp_path / "data.jsonl", [{**row, "label": i % 3} for i, row in enumerate(sentences(200, 3))])
    result = autolite.search(model, data, target="pixel8", space=str(tiny_space), budget="4trials", out=tmp_path / "r")
    check(result, transformers.AutoModelForSequenceClassification)


def test_a_classifier_that_the_map_does_not_have(tiny_space: Path, tmp_path: Path) -> None:
    model = folder_of("electra", "text-classification", tmp_path / "model", layers=2, embedding_size=16)
    data = write_jsonl(tmp_path / "data.jsonl", [{**row, "label": i % 3} for i, row in enumerate(sentences(200, 3))])
    notes: list[str] = []
    run: dict[str, Any] = {"target": "pixel8", "space": str(tiny_space), "out": tmp_path / "r"}
    result = autolite.search(model, data, budget="6trials", **run, observer=lambda shown: notes.append(shown.doing))
    (note,) = {text for text in notes if "architecture map" in text}
    assert note == (
        "the architecture map does not have this 'electra' model: share, prune left out, and distill, which would have "
        "nothing to recover"
    )
    assert json.loads((result.path / "front.json").read_text(encoding="utf-8"))["model"]["family"] == "electra"
    check(result, transformers.AutoModelForSequenceClassification)
    assert {step.technique for candidate in result.front for step in candidate.plan.steps} <= {"quantize"}
    best = result.pick(max_drop=0.99)
    assert autolite.pipeline(str(best.folder))("w1 great")[0]["label"].startswith("LABEL_")


def test_levels_by_layer_need_the_map(tiny_space: Path, tmp_path: Path) -> None:
    model = folder_of("electra", "text-classification", tmp_path / "model", layers=2, embedding_size=16)
    data = write_jsonl(tmp_path / "data.jsonl", [{**row, "label": i % 3} for i, row in enumerate(sentences(200, 3))])
    space = tmp_path / "layers.yaml"
    text = tiny_space.read_text(encoding="utf-8").replace("ffn: [int8, kmeans4", "ffn: [by-layer, int8, kmeans4")
    space.write_text(text, encoding="utf-8")
    result = autolite.search(model, data, target="pixel8", space=str(space), budget="5trials", out=tmp_path / "r")
    assert {step.technique for candidate in result.front for step in candidate.plan.steps} <= {"quantize"}


def test_a_space_of_which_nothing_works_without_the_map_is_refused(tmp_path: Path) -> None:
    model = folder_of("electra", "text-classification", tmp_path / "model", layers=2, embedding_size=16)
    data = write_jsonl(tmp_path / "data.jsonl", [{**row, "label": i % 3} for i, row in enumerate(sentences(200, 3))])
    space = tmp_path / "prune.yaml"
    stages = ", ".join(f"{stage}: {{trials: 2, effort: 0}}" for stage in ("screen", "recover", "confirm"))
    space.write_text(
        f"name: p\ndescription: p\nsteps: [prune: {{heads: [1.0, 0.5]}}]\nstages: {{{stages}}}\n", encoding="utf-8"
    )
    with pytest.raises(InputError, match=r"'p' has only what needs the architecture map \(prune\), .*'electra' model"):
        autolite.search(model, data, target="pixel8", space=str(space), out=tmp_path / "r")


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


def search_text(model: Path, folder: Path, **settings: Any) -> Result:
    """Search for number formats of a language model, unless another space is named, with a text of random words."""
    rng, text = random.Random(0), folder / "text.txt"
    text.write_text("\n".join(" ".join(f"w{rng.randrange(60)}" for _ in range(12)) for _ in range(300)), "utf-8")
    usual = {"task": "language-modeling", "space": "quantize-only", "out": folder / "r"}
    return autolite.search(model, text, **{**usual, **settings})


@pytest.mark.parametrize(
    ("family", "config"),
    [("gpt2", {}), ("llama", {}), ("opt", {"layers": 2, "ffn_dim": 64, "word_embed_proj_dim": 32})],
)
def test_language_models(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    model = folder_of(family, "language-modeling", tmp_path / "model", **config)
    result = search_text(model, tmp_path, target="raspberry-pi-5", workload="tokens=32", budget="5trials")
    check(result, transformers.AutoModelForCausalLM)
    teacher = result.front.teacher["quality"]
    assert (teacher["metric"], teacher["direction"]) == ("perplexity", "minimize")
    for candidate in result.front:
        # Definition: what is kept of a language model is 1 less the rise of its mean loss in nats.
        rise = math.log(candidate.quality.value) - math.log(teacher["value"])
        assert math.isclose(candidate.kept.value, 1 - rise, abs_tol=1e-9)
        assert candidate.ttft_ms is not None
        assert candidate.tokens_per_second is not None
        # What has a cache runs in onnxruntime-genai; what is outside the map has none.
        files = json.loads((result.path / candidate.path / "autolite.json").read_text(encoding="utf-8"))["sha256"]
        assert ("genai_config.json" in files) == (family != "opt")


def test_a_language_model_that_follows_instructions(tiny_space: Path, tmp_path: Path) -> None:
    model = folder_of("llama", "language-modeling", tmp_path / "model")
    rows: list[dict[str, object]] = [
        {"prompt": str(asked["text"]), "response": str(said["text"])}
        for asked, said in zip(sentences(150, 6), sentences(150, 7), strict=True)
    ]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    usual: dict[str, Any] = {
        "target": "pixel8",
        "space": str(tiny_space),
        "workload": "tokens=32",
        "out": tmp_path / "r",
    }
    result = autolite.search(model, data, task="language-modeling", budget="6trials", **usual)
    check(result, transformers.AutoModelForCausalLM)
    schema = json.loads((Path(__file__).parents[2] / "docs" / "front.schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(json.loads((result.path / "front.json").read_text(encoding="utf-8")), schema)
    # The finalists beside the teacher, by torch on what its artifact and theirs say of the responses.
    task, load = registry.get("task", "language-modeling"), registry.get("runtime", "onnxruntime").load
    test = task.load(
        DataSpec(str(data)), tiny_tokenizer(), reloaded(transformers.AutoModelForCausalLM, model).config
    ).test
    (batch,) = task.batches(test, len(test), 1)
    asked = torch.from_numpy(batch.labels != -100)
    labels = torch.from_numpy(batch.labels)[asked]
    teacher = torch.from_numpy(load(result.path / result.front.baseline["path"]).run(batch.inputs)["logits"])[asked]
    said = result.front.teacher["further"]
    assert said["next_token_accuracy"]["value"] == pytest.approx((teacher.argmax(-1) == labels).float().mean().item())
    assert (said["kl_to_teacher_nats"]["value"], said["teacher_agreement"]["value"]) == (0, 1)
    for candidate in result.front:
        own = torch.from_numpy(load(result.path / candidate.path / "model.onnx").run(batch.inputs)["logits"])[asked]
        kl = torch.nn.functional.kl_div(
            own.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True
        )
        # Formats that quantize activations compute a little else in batches of another length.
        assert candidate.further["kl_to_teacher_nats"].value == pytest.approx(kl.item(), rel=0.05, abs=1e-6)
        agreement = (own.argmax(-1) == teacher.argmax(-1)).float().mean().item()
        assert candidate.further["teacher_agreement"].value == pytest.approx(agreement, abs=0.05)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(front_table(result.front))
    assert "test kl to teacher nats" in console.export_text()
    assert "teacher_agreement" in result.front.to_frame().columns
    assert {c.further["teacher_agreement"] for c in reprice(result.path, "pixel8-pro").front} <= {
        c.further["teacher_agreement"] for c in result.front
    }


def check_generation(result: Result) -> None:
    """Whole calls, prompts and steps were measured together, and add up."""
    for candidate in result.front:
        whole, first, rate = candidate.latency_ms, candidate.ttft_ms, candidate.tokens_per_second
        assert first is not None
        assert rate is not None
        assert {each.source for each in (whole, first, rate, candidate.faster)} == {"measured"}
        assert first.value < whole.value
        # Medians of sums are not sums of medians, and this machine may be busy.
        assert whole.value == pytest.approx(first.value + 8e3 / rate.value, rel=0.5)


def test_what_a_language_model_generates_is_timed_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    monkeypatch.setattr(tune, "SECONDS", 0.0)
    monkeypatch.setattr(problem, "load_target", lambda *_: load_target("pixel8").model_copy(update={"name": "local"}))
    model = folder_of("llama", "language-modeling", tmp_path / "model")
    call = "tokens=16,generated=8,threads=1"
    result = search_text(model, tmp_path, target="local", workload=call, budget="3trials")
    check_generation(result)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(front_table(result.front))
    shown = console.export_text()
    assert "16 tokens, 8 generated, 1 thread;" in shown
    assert "tokens/s" in shown
    assert "ms each" in shown


def test_this_machine_as_a_device_times_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    model = folder_of("llama", "language-modeling", tmp_path / "model")
    result = search_text(
        model,
        tmp_path,
        target="pixel8",
        measure_on="local",
        workload="tokens=16,generated=8,threads=1",
        budget="3trials",
    )
    check_generation(result)
    for candidate in result.front:
        assert candidate.latency_ms.runtime.endswith(" on local")
        assert candidate.memory_bytes.source == "predicted"
