"""Models that the architecture map does not have: what is found out about them, and what works without the map."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from autolite import contracts, registry, unmapped
from autolite.architecture import ModelShape, shape_of
from autolite.errors import ModelError, PlanError
from autolite.formats import nbytes
from autolite.hardware.predict import predict, predict_faster
from autolite.hardware.profile_files import load_profile
from autolite.measure import Workload
from autolite.parts import matrices_of
from autolite.plan import make_step
from autolite.products import matmuls
from autolite.reload import load_model, load_student, save_student
from autolite.surgery import clone
from autolite.techniques.base import Student
from autolite.testing import VOCAB, tiny_inputs, tiny_model, tiny_tokenizer

CLASSIFIER = "AutoModelForSequenceClassification"
# By type: the settings that the tiny model needs beside the usual ones, and its task.
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "electra": ({"embedding_size": 16}, "text-classification"),
    "mpnet": ({}, "text-classification"),
    "opt": ({"ffn_dim": 64, "word_embed_proj_dim": 32}, "language-modeling"),
    "fnet": ({}, "text-classification"),
    "bert": ({}, "language-modeling"),
}
every_model = pytest.mark.parametrize("kind", MODELS)


def tiny(kind: str) -> PreTrainedModel:
    settings, task = MODELS[kind]
    return tiny_model(kind, task, layers=2, **settings)


@every_model
def test_every_matrix_of_the_layers_is_found_once_in_its_group(kind: str) -> None:
    model = tiny(kind)
    shape, groups = shape_of(model), matrices_of(model)
    assert shape.unmapped is not None
    assert (shape.family, shape.unmapped.layers) == (kind, 2)
    found = {key: group for group, matrices in groups.items() for key in matrices if group != "head"}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and (".0." in name or ".1." in name):
            attends = "attn" in name or "attention" in name
            assert found.pop(name) == ("attention" if attends else "ffn"), name
    assert all("embed" in key or "pooler" in key for key in found)
    assert model.get_input_embeddings().weight is matrices_weight(groups["embedding"], model)
    products = {p.weights: p for p in shape.unmapped.products}
    assert all(p.calls == 1 for p in products.values())
    matrices = {key: m for matrices in groups.values() for key, m in matrices.items()}
    assert all((p.n, p.k) == tuple(matrices[p.weights].weight.shape) for p in products.values())
    assert sum(m.weight.numel() for m in matrices.values()) + shape.unmapped.floats == model.num_parameters()


def matrices_weight(tables: dict[str, Any], model: PreTrainedModel) -> Any:
    (word,) = [m for m in tables.values() if m.weight.shape[0] == VOCAB]
    return model.get_parameter(word.key)


def test_a_head_that_is_read_once_a_sequence_is_told_from_one_that_every_token_has() -> None:
    classifier, generator = shape_of(tiny("electra")), shape_of(tiny("opt"))
    assert [p.pooled for p in matmuls(classifier) if p.part == "head"] == [True, True]
    assert [p.pooled for p in matmuls(generator) if p.part == "head"] == [False]
    assert (classifier.outputs, classifier.stacks[0].causal, classifier.tied) == (3, False, False)
    assert (generator.outputs, generator.stacks[0].causal, generator.tied) == (VOCAB, True, True)
    assert (classifier.embedding, classifier.stacks[0].hidden, classifier.vocab) == (16, 32, VOCAB)


def test_a_matrix_that_is_used_twice_is_stored_once_and_priced_twice() -> None:
    settings = {"num_hidden_groups": 2, "embedding_size": 16, "intermediate_size": 64}
    model = tiny_model("albert", layers=4, **settings)  # two groups, each applied twice
    shape = shape_of(model)
    assert shape.unmapped is not None
    inner = [p for p in shape.unmapped.products if p.part in ("attention", "ffn")]
    assert len(inner) == 2 * 6
    assert {p.calls for p in inner} == {2}
    assert sum(p.part in ("attention", "ffn") for p in matmuls(shape)) == 4 * 6


def test_a_matrix_that_is_not_used_is_none_of_the_models() -> None:
    model: Any = tiny("electra")
    model.spare = torch.nn.Linear(32, 32)
    assert shape_of(model) == shape_of(tiny("electra"))
    assert not any("spare" in key for group in matrices_of(model).values() for key in group)


def test_a_shape_without_a_map_survives_json() -> None:
    shape = shape_of(tiny("electra")).with_formats("int8", "int4", "int8", "fp32")
    assert ModelShape.from_json(json.loads(json.dumps(shape.to_json()))) == shape
    assert shape.formats == {"int8", "int4", "fp32"}
    assert shape.without_formats() == shape_of(tiny("electra"))


@pytest.mark.parametrize(
    ("kind", "positions"), [("mpnet", 64 - 2), ("electra", 64), ("opt", 64)], ids=lambda value: str(value)
)
def test_as_many_tokens_are_taken_as_the_model_has_positions_for(kind: str, positions: int) -> None:
    model = tiny(kind)
    assert unmapped.positions_of(model) == shape_of(model).positions == positions
    ids = torch.full((1, positions), 5)
    model(input_ids=ids, attention_mask=torch.ones_like(ids))
    longer = torch.full((1, positions + 1), 5)
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=longer, attention_mask=torch.ones_like(longer))


def test_a_tokenizer_cuts_where_the_positions_end(tmp_path: Path) -> None:
    tiny("mpnet").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    _, tokenizer = load_model(str(tmp_path), CLASSIFIER)
    assert len(tokenizer("w1 " * 100, truncation=True)["input_ids"]) == 62


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [
        ("electra", ["input_ids", "attention_mask", "token_type_ids"]),
        ("mpnet", ["input_ids", "attention_mask"]),
        ("fnet", ["input_ids", "token_type_ids"]),
    ],
)
def test_inputs_are_those_that_the_model_takes(kind: str, inputs: list[str]) -> None:
    assert unmapped.inputs_of(tiny(kind)) == inputs


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("distill", {"steps": 2, "batch_size": 8}),
        ("quantize", {"attention": "int8", "ffn": "kmeans4", "embedding": "int4"}),
        ("quantize", {"ffn": "int8-static"}),
    ],
)
@pytest.mark.parametrize("kind", ["electra", "fnet", "opt"])
def test_what_needs_no_map_keeps_its_promises(name: str, settings: dict[str, Any], kind: str) -> None:
    task = registry.get("task", MODELS[kind][1])
    context = contracts.tiny_context(kind, task, **MODELS[kind][0])
    contracts.check_technique(registry.get("technique", name), context, settings)


@pytest.mark.parametrize(("name", "settings"), [("share", {"part": "ffn"}), ("prune", {"depth": 0.5})])
def test_what_needs_the_map_says_so(name: str, settings: dict[str, Any]) -> None:
    technique, shape = registry.get("technique", name), shape_of(tiny("electra"))
    assert technique.needs_map
    with pytest.raises(PlanError, match=f"{name} needs the architecture map, which does not have this 'electra'"):
        technique.shape(shape, make_step(name, settings).config)
    assert technique.shape(shape, make_step(name, {}).config) == shape  # what changes nothing, can be done


def test_students_are_distilled_by_their_hidden_states_too() -> None:
    context = contracts.tiny_context("electra", registry.get("task", "text-classification"), embedding_size=16)
    distill = registry.get("technique", "distill")
    student = Student(clone(context.teacher.model), context.teacher.shape)
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    inputs = tiny_inputs(student.model)
    truth = context.teacher.model(**inputs, output_hidden_states=True).hidden_states

    @torch.no_grad()
    def distance(model: Any) -> float:
        states = model(**inputs, output_hidden_states=True).hidden_states
        return float(sum((a - b).square().mean() for a, b in zip(states[1:], truth[1:], strict=True)))

    settings = {"steps": 30, "batch_size": 8, "alpha": 0.0, "temperature": 1.0, "learning_rate": 3e-3}
    learnt = [
        distance(distill.apply(student, make_step("distill", {**settings, "hidden": weight}).config, context).model)
        for weight in (0.0, 100.0)
    ]
    assert learnt[1] < 0.7 * learnt[0]


@every_model
def test_a_student_reloads_with_its_formats(kind: str, tmp_path: Path) -> None:
    model = tiny(kind)
    shape = shape_of(model).with_formats("int8", "int4", "int8", "int8")
    save_student(model, shape, tmp_path)
    loaded, found = load_student(tmp_path)
    assert found == shape
    inputs = unmapped.sample(model)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_plain_transformers_reloads_a_student(tmp_path: Path) -> None:
    model = tiny("electra")
    save_student(model, shape_of(model), tmp_path)
    inputs = tiny_inputs(model)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    body = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(body(**inputs)[0], model.base_model(**inputs)[0])


def test_a_manifest_of_another_model_is_refused(tmp_path: Path) -> None:
    save_student(model := tiny("electra"), shape_of(model), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["shape"] = shape_of(tiny("mpnet")).to_json()
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="the manifest is of a mpnet model, but the configuration of a electra model"):
        load_student(tmp_path)


def test_prices_follow_formats_and_calls_and_are_less_certain_than_with_a_map() -> None:
    profile, workload = load_profile("pixel8"), Workload(tokens=64)
    big = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024, "vocab_size": 4000}
    ours = shape_of(tiny_model("electra", layers=4, embedding_size=128, **big))
    theirs = shape_of(tiny_model("bert", layers=4, **big))
    plain, mapped = (predict(shape, profile, workload) for shape in (ours, theirs))
    assert 0.5 < plain["latency_ms"].value / mapped["latency_ms"].value < 2
    spread = [found["latency_ms"].high / found["latency_ms"].value for found in (plain, mapped)]
    assert spread[0] > spread[1]
    coded = ours.with_formats("int8", "int8", "int8", "int8")
    faster = predict(coded, profile, workload)
    assert faster["latency_ms"].value < plain["latency_ms"].value
    assert predict_faster(ours, coded, profile, workload).value > 1
    assert ours.unmapped is not None
    matrices = [(p.n, p.k) for p in ours.unmapped.products] + [(ours.vocab, ours.embedding)]
    saved = sum(nbytes("fp32", *each) - nbytes("int8", *each) for each in matrices)
    assert plain["size_bytes"].value - faster["size_bytes"].value == saved
    generator = predict(shape_of(tiny("opt")), profile, Workload(tokens=16, generated=8))
    # Without a cache, each further token takes a call over all before it.
    again = predict(shape_of(tiny("opt")), profile, Workload(tokens=16 + 8 // 2))["ttft_ms"].value
    assert generator["tokens_per_second"].value == pytest.approx(1e3 / again)
    assert generator["latency_ms"].value == pytest.approx(generator["ttft_ms"].value + 8 * again)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("beit", {"image_size": 16, "patch_size": 4}, "takes pixel_values, and the architecture map has no 'beit'"),
        (
            "nystromformer",
            {"num_landmarks": 4},
            "NystromformerForSequenceClassification cannot be run on a batch of token ids alone: shape",
        ),
    ],
)
def test_a_model_that_text_alone_does_not_run_is_refused(kind: str, settings: dict[str, Any], message: str) -> None:
    from transformers import AutoModelForImageClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    config = AutoConfig.for_model(kind, **sizes, **settings)
    auto: Any = AutoModelForImageClassification if kind == "beit" else AutoModelForSequenceClassification
    with pytest.raises(ModelError, match=message):
        shape_of(auto.from_config(config))
