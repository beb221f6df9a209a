"""A smaller word table, against the whole one that its factors make and ids translated by hand, and through files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from autolite import contracts, registry
from autolite.architecture import ModelShape, factor_format, shape_of
from autolite.compress import compress, read_weights, resolve, shape_after
from autolite.errors import ModelError, PlanError
from autolite.export import decoded
from autolite.families import FAMILIES, family_of
from autolite.formats import nbytes
from autolite.hardware.footprint import file_size
from autolite.hardware.predict import predict
from autolite.hardware.profile_files import load_profile
from autolite.measure import Workload
from autolite.parts import embeddings_of, head_of, matrices_of
from autolite.plan import Plan, make_step
from autolite.reload import load_student, save_student
from autolite.runtime.onnxruntime import OnnxRuntime
from autolite.surgery import clone, keep_tokens
from autolite.tasks.base import Split
from autolite.techniques.base import Context, Student
from autolite.techniques.embedding import Embedding, EmbeddingConfig, factors
from autolite.testing import PAD, VOCAB, tiny_inputs, tiny_model, tiny_tokenizer

embedding = Embedding()
WORDS = sorted(set(FAMILIES) - {"vit"})
GENERATING = [(family, "language-modeling") for family in (*contracts.DECODERS, "llama tied")]
MODELS = [(family, "text-classification") for family in WORDS] + GENERATING
models = pytest.mark.parametrize(("family", "task"), MODELS)
CLASSIFIER = "AutoModelForSequenceClassification"


def context_of(family: str, task: str = "text-classification") -> Context:
    """A teacher with few distinct words in its training split."""
    rng = np.random.default_rng(7)
    ids = [np.concatenate([[2], rng.integers(4, 40, n), [3]]) for n in (3, 5, 9, 4) * 4]
    labels = rng.integers(0, 3, len(ids)) if task == "text-classification" else np.zeros(0, np.int64)
    name, *tied = family.split()
    model = tiny_model(name, task, **({"tie_word_embeddings": True} if tied else {}))
    teacher, train = Student(model, shape_of(model)), Split("train", ids, None, labels)
    return Context(teacher, registry.get("task", task), train, PAD, tokenizer=tiny_tokenizer())


def compressed(context: Context, *steps: tuple[str, dict[str, Any]], **settings: Any) -> Student:
    return compress(Plan((make_step("embedding", settings), *(make_step(n, s) for n, s in steps))), context)


def whole(student: Student) -> Any:
    """The student with a plain table in the place of its factors: the reference that knows nothing of them."""
    model = clone(student.model)
    family, base = family_of(model.config), model.base_model
    words: Any = base.get_submodule(family.word)
    table = (words.table.weight.double() @ words.projection.weight.double().T).float()
    plain = nn.Embedding.from_pretrained(table, freeze=False)
    base.set_submodule(family.word, plain)
    if head_of(student.model).tied:
        head = nn.Linear(table.shape[1], len(table), bias=False)
        head.weight = plain.weight
        model.set_submodule("lm_head", head)
    return model


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Tensor] | None = None) -> Tensor:
    result: Tensor = model(**(tiny_inputs(model) if inputs is None else inputs)).logits
    return result


def check_files(student: Student, folder: Path, task: str, tolerance: float = 1e-4) -> None:
    """Saved, loaded by plain transformers, trained on and saved again, and emitted, the student computes the same."""
    expected = logits(student.model)
    save_student(student.model, student.shape, folder / "one")
    loaded, shape = load_student(folder / "one")
    assert shape == student.shape == shape_of(loaded)
    assert torch.equal(logits(loaded), expected)
    auto = getattr(transformers, CLASSIFIER if task == "text-classification" else "AutoModelForCausalLM")
    plain, info = auto.from_pretrained(folder / "one", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(plain), expected)
    optimizer = torch.optim.SGD(plain.parameters(), lr=1e-2)
    logits_now = plain(**tiny_inputs(plain)).logits
    torch.autograd.backward(logits_now.square().mean())
    optimizer.step()
    assert not torch.equal(logits(plain), expected)
    plain.save_pretrained(folder / "two")
    assert torch.equal(logits(auto.from_pretrained(folder / "two")), logits(plain))
    runtime = OnnxRuntime()
    (folder / "onnx").mkdir()
    files = runtime.emit(student, folder / "onnx")
    inputs = tiny_inputs(student.model)
    found = runtime.load(files[0]).run({name: array.numpy() for name, array in inputs.items()})["logits"]
    real = inputs["attention_mask"].bool() if expected.ndim == 3 else slice(None)
    torch.testing.assert_close(torch.from_numpy(found)[real], expected[real], atol=tolerance, rtol=0)
    size, predicted = sum(file.stat().st_size for file in files), file_size(student.shape)
    assert abs(predicted - size) < 1500 + 0.02 * size, (predicted, size)


@models
def test_factors_equal_the_table_they_multiply_to_in_memory_and_in_files(
    family: str, task: str, tmp_path: Path
) -> None:
    context = context_of(family, task)
    student = compressed(context, rank=5)
    assert student.shape.embedding_rank == 5
    assert student.shape.embedding == context.teacher.shape.embedding
    torch.testing.assert_close(logits(student.model), logits(whole(student)), atol=2e-5, rtol=0)
    shared = head_of(student.model)
    word = embeddings_of(student.model).word
    assert word is not None
    assert tuple(word.weight.shape) == (VOCAB, 5)
    assert shared.tied == (family in ("gpt2", "llama tied") and task == "language-modeling")
    check_files(student, tmp_path, task)


@pytest.mark.parametrize("family", WORDS)
def test_fewer_tokens_equal_the_whole_table_with_ids_translated_by_hand(family: str, tmp_path: Path) -> None:
    context = context_of(family)
    student = compressed(context, vocabulary="used")
    vocabulary = student.vocabulary
    assert vocabulary is not None
    used = set(np.concatenate(context.train.input_ids).tolist()) | {0, 1, 2, 3}
    assert vocabulary.kept == tuple(sorted(used))
    assert student.shape.vocab == len(used) == student.model.config.vocab_size
    theirs = tiny_inputs(context.teacher.model)
    theirs["input_ids"] = torch.where(theirs["attention_mask"].bool(), theirs["input_ids"] % 36 + 4, PAD)
    stays = torch.isin(theirs["input_ids"], torch.tensor(vocabulary.kept))
    theirs["input_ids"] = torch.where(stays, theirs["input_ids"], 0)  # [UNK]
    by_hand = {old: new for new, old in enumerate(vocabulary.kept)}
    ours = theirs | {"input_ids": theirs["input_ids"].clone().apply_(by_hand.__getitem__)}
    assert torch.equal(logits(student.model, ours), logits(context.teacher.model, theirs))
    check_files(student, tmp_path, "text-classification")


@models
def test_it_composes_with_every_other_technique(family: str, task: str, tmp_path: Path) -> None:
    context = context_of(family, task)
    cut = {"vocabulary": 0.5} if task == "text-classification" else {}
    steps = (
        ("prune", {"heads": 0.5, "ffn": 0.5, "round_to": 8, "depth": 0.7}),
        ("distill", {"steps": 2, "batch_size": 8}),
        ("quantize", {"attention": "int8-weight", "ffn": "int8-weight", "embedding": "int8"}),
    )
    settings = {"rank": 0.5, **cut}
    plan = Plan((make_step("share", {"part": "ffn", "groups": 2}), make_step("embedding", settings)))
    plan = replace(plan, steps=(*plan.steps, *(make_step(*step) for step in steps)))
    student = compress(plan, context)
    assert student.shape == shape_after(resolve(plan, context), context.teacher.shape)
    assert shape_of(student.model) == student.shape.without_formats()
    factor = embeddings_of(student.model).factor
    assert factor is not None
    assert student.encoded[factor.key].format == factor_format("int8") == "int8-weight"
    runtime, model = OnnxRuntime(), decoded(student)
    inputs = tiny_inputs(model)
    files = runtime.emit(student, tmp_path)
    found = runtime.load(files[0]).run({name: array.numpy() for name, array in inputs.items()})["logits"]
    expected = logits(model)
    real = inputs["attention_mask"].bool() if expected.ndim == 3 else slice(None)
    # A tied head and ALBERT's own projection quantize their inputs to 8 bits
    tolerance = 0.1 if student.shape.tied or family == "albert" else 1e-3
    torch.testing.assert_close(torch.from_numpy(found)[real], expected[real], atol=tolerance, rtol=0)
    assert predict(student.shape, load_profile("pixel8"), Workload(tokens=16))["latency_ms"].value > 0


@pytest.mark.parametrize("family", ["bert", "roberta", "albert", "llama"])
def test_a_stored_student_comes_back_with_its_vocabulary(family: str, tmp_path: Path) -> None:
    context = context_of(family)
    step = ("distill", {"steps": 2, "batch_size": 8})
    plan = Plan((make_step("embedding", {"rank": 6, "vocabulary": 50}), make_step(*step)))
    student = compress(plan, context, tmp_path)
    (file,) = tmp_path.iterdir()
    back = read_weights(file, resolve(plan, context), context.teacher)
    assert back is not None
    assert back.vocabulary == student.vocabulary
    assert back.shape == student.shape
    ours, theirs = back.model.state_dict(), student.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert back.model.config.to_dict() == student.model.config.to_dict()


@given(st.integers(0, 2**16), st.integers(1, 12))
def test_factors_are_the_best_of_their_rank(seed: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(40, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    weights = torch.rand(40, generator=generator).exp()
    a, p = factors(table, weights, rank)
    root = weights.double().sqrt()[:, None]
    s = np.linalg.svd((root * table.double()).numpy(), compute_uv=False)
    best = float((s[rank:] ** 2).sum())  # Eckart & Young
    found = float((root * (table.double() - a.double() @ p.double())).square().sum())
    assert found == pytest.approx(best, rel=1e-4, abs=1e-4)
    torch.testing.assert_close(p @ p.T, torch.eye(rank), atol=1e-5, rtol=0)


def test_frequent_words_are_kept_better_by_weighted_factors() -> None:
    context = context_of("bert")
    counts = np.bincount(np.concatenate(context.train.input_ids), minlength=VOCAB)
    errors = {}
    for weighting in ("frequency", "none"):
        student = compressed(context, rank=8, weighting=weighting)
        word, factor = embeddings_of(student.model).word, embeddings_of(student.model).factor
        table = embeddings_of(context.teacher.model).word
        assert word is not None
        assert factor is not None
        assert table is not None
        rows = (table.weight - word.weight @ factor.weight.T).square().sum(1).detach().numpy()
        errors[weighting] = (float((counts * rows).sum()), float(rows.sum()))
    assert errors["frequency"][0] < errors["none"][0]
    assert errors["frequency"][1] > errors["none"][1]


def test_both_factors_are_priced_and_named() -> None:
    student = compressed(context_of("bert"), rank=8)
    groups = matrices_of(student.model)["embedding"]
    sizes = {key.removeprefix("bert.embeddings."): tuple(m.weight.shape) for key, m in groups.items()}
    assert sizes == {
        "word_embeddings.table.weight": (VOCAB, 8),
        "word_embeddings.projection.weight": (32, 8),
        "position_embeddings.weight": (64, 32),
    }
    shape = student.shape.with_formats("fp32", "fp32", "int8", "fp32")
    assert shape.formats == {"fp32", "int8", "int8-weight"}
    plain = replace(shape, embedding_rank=0)
    saved = nbytes("int8", VOCAB, 32) - nbytes("int8", VOCAB, 8) - nbytes("int8-weight", 32, 8)
    assert file_size(plain) - file_size(shape) == pytest.approx(saved, abs=400)
    assert ModelShape.from_json(shape.to_json()) == shape


@pytest.mark.parametrize(
    ("family", "task", "settings", "message"),
    [
        ("vit", "text-classification", {"rank": 0.5}, "no table of words"),
        ("gpt2", "language-modeling", {"vocabulary": 0.5}, "does not compare"),
        ("bert", "text-classification", {"vocabulary": "used"}, "resolve the plan first"),
    ],
)
def test_what_cannot_be_is_refused_before_work(family: str, task: str, settings: Any, message: str) -> None:
    shape = shape_of(tiny_model(family, task))
    with pytest.raises(PlanError, match=message):
        embedding.shape(shape, EmbeddingConfig(**settings))


def test_settings_that_contradict_the_tokenizer_or_the_student_are_refused() -> None:
    context = context_of("bert")
    with pytest.raises(PlanError, match="3 tokens are fewer than the 4"):
        compressed(context, vocabulary=3)
    with pytest.raises(PlanError, match="needs a fast tokenizer"):
        compressed(replace(context, tokenizer=None), vocabulary="used")
    with pytest.raises(PlanError, match="rank 5 already"):
        compressed(context, ("embedding", {"rank": 4}), rank=5)
    with pytest.raises(PlanError, match="cut already"):
        compressed(context, ("embedding", {"vocabulary": 20}), vocabulary=30)
    for wrong in ({"rank": 0}, {"vocabulary": 0}, {"vocabulary": "all"}, {"min_count": 0}):
        with pytest.raises(PlanError, match=next(iter(wrong))):
            make_step("embedding", wrong)


def test_special_tokens_and_paddings_place_are_guarded() -> None:
    with pytest.raises(ValueError, match="pad_token_id 1 is not among"):
        keep_tokens(tiny_model("bert"), [0, 2, 3, 5])
    with pytest.raises(ValueError, match="must stay what it is"):
        keep_tokens(tiny_model("roberta"), [1, 2, 3, 5])
    with pytest.raises(ValueError, match="what the model predicts"):
        keep_tokens(tiny_model("gpt2", "language-modeling"), range(9))


def test_a_manifest_with_another_vocabulary_is_refused(tmp_path: Path) -> None:
    student = compressed(context_of("bert"), vocabulary=50, rank=4)
    save_student(student.model, student.shape, tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 50', '"vocab_size": 49'))
    with pytest.raises(ModelError, match="does not fit"):
        load_student(tmp_path)


def test_only_the_thin_factor_learns_unless_tables_do() -> None:
    context = context_of("bert")
    before = compressed(context, rank=6)
    for tables in (False, True):
        after = compressed(context, ("distill", {"steps": 2, "batch_size": 8, "embeddings": tables}), rank=6)
        ours, theirs = embeddings_of(before.model), embeddings_of(after.model)
        assert ours.factor is not None
        assert theirs.factor is not None
        assert not torch.equal(ours.factor.weight, theirs.factor.weight)
        assert ours.word is not None
        assert theirs.word is not None
        assert torch.equal(ours.word.weight, theirs.word.weight) == (not tables)
