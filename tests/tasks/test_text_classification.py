import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    PreTrainedTokenizerFast,
    pipeline,
)

from autolite import registry
from autolite.errors import DataError
from autolite.measure import Workload
from autolite.tasks.base import DataSpec, Split, TaskData
from autolite.tasks.text_classification import TextClassification

TASK = TextClassification()


def bert_config(labels: Sequence[str] = ("negative", "positive"), **settings: Any) -> BertConfig:
    names = dict(enumerate(labels))
    return BertConfig(
        vocab_size=64,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=32,
        id2label=names,
        label2id={name: i for i, name in names.items()},
        **settings,
    )


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def rows(n: int, labels: Sequence[Any] = ("negative", "positive")) -> list[dict[str, Any]]:
    return [{"text": f"w{i % 60} w{i // 60} w{i * 7 % 60}", "label": labels[i % len(labels)]} for i in range(n)]


def load(
    source: str, tokenizer: PreTrainedTokenizerFast, labels: Sequence[str] = ("negative", "positive"), **spec: Any
) -> TaskData:
    return TASK.load(DataSpec(source, **spec), tokenizer, bert_config(labels))


def test_it_is_registered() -> None:
    assert isinstance(registry.get("task", "text-classification"), TextClassification)


def test_one_file_becomes_four_splits_that_share_nothing(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = write(tmp_path / "d.jsonl", rows(200))
    data = load(source, tokenizer)
    splits = (data.train, data.search, data.selection, data.test)
    assert [len(s) for s in splits] == [162, 9, 9, 20]
    assert [s.name for s in splits] == ["train", "search", "selection", "test"]
    seen = [tuple(ids) for s in splits for ids in s.input_ids]
    assert len(seen) == len(set(seen)) == 200
    assert data.labels == ("negative", "positive")
    assert data.notes == (
        "train: 200 rows, d.jsonl",
        "text 'text', label 'label'",
        "test: 20 rows, 10% cut from train by seed 0",
        "validation: 18 rows, 10% cut from train by seed 0",
    )


def test_the_workload_is_a_text_than_which_nine_of_ten_are_no_longer() -> None:
    split = Split("train", [np.arange(n) for n in range(1, 12)], None, np.zeros(11, np.int64))
    assert TASK.workload(TaskData(split, split, split, split, "")) == Workload(batch=1, tokens=10)


def test_equal_seeds_give_equal_data_and_other_seeds_and_contents_other_fingerprints(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    source = write(tmp_path / "d.jsonl", rows(60))
    first = load(source, tokenizer)
    again = load(source, tokenizer)
    assert first.fingerprint == again.fingerprint
    assert len(first.fingerprint) == 64
    assert all(np.array_equal(a, b) for a, b in zip(first.test.input_ids, again.test.input_ids, strict=True))
    flipped = rows(60)
    flipped[0]["label"] = "positive"
    others = [
        load(source, tokenizer, seed=1),
        load(write(tmp_path / "e.jsonl", rows(59)), tokenizer),
        load(write(tmp_path / "f.jsonl", flipped), tokenizer),
    ]
    assert len({first.fingerprint, *(o.fingerprint for o in others)}) == 4


def test_equal_rows_never_lie_on_both_sides_of_a_cut(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    data = load(write(tmp_path / "d.jsonl", rows(40) * 5), tokenizer)
    sets = [{tuple(ids) for ids in s.input_ids} for s in (data.train, data.search, data.selection, data.test)]
    assert sum(map(len, sets)) == len(set.union(*sets)) == 40


def test_ids_and_labels_are_the_tokenizers_and_the_models(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "w1 w2", "label": "positive"}\n{"text": "w3", "label": "negative"}')
    (tmp_path / "dev.jsonl").write_text('{"text": "w4", "label": 0}\n{"text": "w5", "label": 1}')
    (tmp_path / "test.csv").write_text("text,label\nw1 unheard,POSITIVE\n")
    data = load(str(tmp_path), tokenizer)
    assert [ids.tolist() for ids in data.train.input_ids] == [[2, 5, 6, 3], [2, 7, 3]]
    assert data.train.labels.tolist() == [1, 0]
    assert data.test.input_ids[0].tolist() == [2, 5, 1, 3]
    assert data.test.labels.tolist() == [1]
    assert sorted([*data.search.labels, *data.selection.labels]) == [0, 1]
    assert data.train.input_ids[0].dtype == data.train.labels.dtype == np.int64
    assert data.train.token_type_ids is None


def test_pairs_have_token_types_where_the_model_has(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    pairs = [{"premise": f"w{i} w1", "hypothesis": "w2", "label": i % 2} for i in range(20)]
    source = write(tmp_path / "d.jsonl", pairs)
    data = load(source, tokenizer)
    assert data.train.token_type_ids is not None
    assert all(types.tolist() == [0, 0, 0, 0, 1, 1] for types in data.train.token_type_ids)
    assert all(ids.tolist()[-3:] == [3, 6, 3] for ids in data.train.input_ids)
    assert "text 'premise', second text 'hypothesis', label 'label'" in data.notes
    names: dict[str, Any] = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    untyped = TASK.load(DataSpec(source), tokenizer, DistilBertConfig(**names))
    assert untyped.train.token_type_ids is None


@pytest.mark.parametrize(
    ("labels", "known", "ids"),
    [
        ([0, 1], ("negative", "positive"), [0, 1]),
        (["0", "1"], ("negative", "positive"), [0, 1]),
        ([0.0, 1.0], ("negative", "positive"), [0, 1]),
        ([False, True], ("negative", "positive"), [0, 1]),
        (["Positive", "NEGATIVE"], ("negative", "positive"), [1, 0]),
        (["LABEL_1", "LABEL_0"], ("LABEL_0", "LABEL_1"), [1, 0]),
        ([1, 2], ("2", "1"), [1, 0]),  # all of them are names: the names win over the numbers
        ([0, 1], ("1", "2"), [0, 1]),
    ],
)
def test_labels_are_names_or_numbers(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, labels: list[Any], known: tuple[str, ...], ids: list[int]
) -> None:
    data = load(write(tmp_path / "d.jsonl", rows(40, labels)), tokenizer, known)
    expected = {tuple(tokenizer(r["text"])["input_ids"]): ids[i % 2] for i, r in enumerate(rows(40))}
    for split in (data.train, data.search, data.selection, data.test):
        assert split.labels.tolist() == [expected[tuple(i)] for i in split.input_ids]


def test_names_that_are_numbers_hold_for_all_splits_or_for_none(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The test split has no 0: by itself it would go by the names 1 to 3, and be wrong by one."""
    write(tmp_path / "train.jsonl", rows(40, [0, 1, 2]))
    write(tmp_path / "test.jsonl", rows(4, [1, 2]))
    assert load(str(tmp_path), tokenizer, ("1", "2", "3")).test.labels.tolist() == [1, 2, 1, 2]


def test_names_that_differ_in_case_alone_are_told_apart(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    found = load(write(tmp_path / "d.jsonl", rows(40, ["us", "US"])), tokenizer, ("US", "us"))
    plain = load(write(tmp_path / "e.jsonl", rows(40, [1, 0])), tokenizer)
    assert found.train.labels.tolist() == plain.train.labels.tolist()


def test_a_missing_label_is_no_class_called_none(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    content = [*rows(9, ["none", "some"]), {"text": "z", "label": None}]
    with pytest.raises(DataError, match=r"row 10 of d\.jsonl: the label None is unknown to the model"):
        load(write(tmp_path / "d.jsonl", content), tokenizer, ("none", "some"))


def test_label_names_beside_the_numbers_settle_their_order(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    named = [{**r, "label_text": ("positive", "negative")[r["label"]]} for r in rows(40, [0, 1])]
    data = load(write(tmp_path / "d.jsonl", named), tokenizer)
    plain = load(write(tmp_path / "e.jsonl", rows(40, [1, 0])), tokenizer)
    assert data.train.labels.tolist() == plain.train.labels.tolist()


def test_a_test_split_that_hides_its_labels_is_not_used(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    write(tmp_path / "train.jsonl", rows(40))
    write(tmp_path / "test.jsonl", rows(5, [-1]))
    data = load(str(tmp_path), tokenizer)
    assert len(data.test) == 4
    assert "test of test.jsonl has no labels and is not used" in data.notes


def test_rows_with_an_empty_text_are_left_out_and_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    empty: list[dict[str, Any]] = [{"text": "  ", "label": "negative"}, {"text": None, "label": "positive"}]
    data = load(write(tmp_path / "d.jsonl", [*empty, *rows(40)]), tokenizer)
    assert "d.jsonl: 2 rows with an empty text left out" in data.notes
    assert sum(map(len, (data.train, data.search, data.selection, data.test))) == 40


@pytest.mark.parametrize(
    ("content", "spec", "says"),
    [
        (
            [{"text": "a", "label": "negative"}, {"text": "b", "label": "neutral"}],
            {},
            "row 2 of d.jsonl: the label 'neutral' is unknown to the model; it knows negative, positive",
        ),
        (
            [{"text": "a", "label": 0}, {"text": "b", "label": 1}, {"text": "c", "label": 2}],
            {},
            "row 3 of d.jsonl: the label 2 is unknown to the model; it knows 0 to 1, or negative, positive",
        ),
        (
            [{"text": "a", "label": 0}, {"text": "b"}],
            {},
            "row 2 of d.jsonl: the label None is unknown to the model; it knows 0 to 1, or negative, positive",
        ),
        (rows(9, ["positive"]), {}, "every row of d.jsonl has the label 'positive': there is nothing to tell apart"),
        ([{"text": "", "label": 0}, {"text": " ", "label": 1}], {}, "every text in d.jsonl is empty"),
        (
            [{"text": "a"}],
            {},
            "no label column in d.jsonl: name it with --label (data without labels cannot be used yet). Columns:",
        ),
        (
            rows(9),
            {"label": "lable"},
            "no column 'lable' in d.jsonl (option --label (data without labels cannot be used yet)): did you mean"
            " 'label'? Columns: 'text', 'label'",
        ),
        (rows(2), {}, "train: too few different rows to cut (1, of 1 rows); give more rows, or a folder with train,"),
        (rows(9), {"max_length": 33}, "a length of 33 tokens is outside 4 to 32, which this model can take"),
    ],
)
def test_data_that_does_not_fit_says_why(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, content: list[dict[str, Any]], spec: dict[str, Any], says: str
) -> None:
    with pytest.raises(DataError) as error:
        load(write(tmp_path / "d.jsonl", content), tokenizer, **spec)
    assert str(error.value).startswith(says)


def test_a_model_without_exclusive_labels_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = write(tmp_path / "d.jsonl", rows(40))
    for config in (bert_config(["score"]), bert_config(problem_type="multi_label_classification")):
        with pytest.raises(DataError, match="needs two or more labels that exclude one another"):
            TASK.load(DataSpec(source), tokenizer, config)


def test_the_demo_refuses_a_model_of_other_labels(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="the demo's data needs a model that knows the label 'asyncio'"):
        TASK.load(DataSpec(None), tokenizer, bert_config())


def test_long_texts_are_cut_at_the_models_limit_and_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = write(tmp_path / "d.jsonl", [{"text": " ".join(["w1"] * 99), "label": "negative"}, *rows(40)])
    data = load(source, tokenizer)
    assert max(len(i) for s in (data.train, data.search, data.selection, data.test) for i in s.input_ids) == 32
    assert "texts are cut at 32 tokens (1 of 41 reach that)" in data.notes


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=20), size=st.integers(1, 7), typed=st.booleans())
def test_batches_are_the_split_padded_on_the_right(lengths: list[int], size: int, typed: bool) -> None:
    ids = [np.arange(1, n + 1) for n in lengths]
    split = Split("train", ids, [i % 2 for i in ids] if typed else None, np.arange(len(ids)))
    batches = list(TASK.batches(split, size, pad_id=77))
    assert sorted(i for b in batches for i in b.indices) == list(range(len(ids)))
    widths = [b.inputs["input_ids"].shape[1] for b in batches]
    assert widths == sorted(widths)
    for batch in batches:
        assert len(batch.indices) <= size
        assert set(batch.inputs) == {"input_ids", "attention_mask"} | ({"token_type_ids"} if typed else set())
        assert np.array_equal(batch.labels, batch.indices)
        for row, i in enumerate(batch.indices):
            mask = batch.inputs["attention_mask"][row]
            assert mask.tolist() == [1] * lengths[i] + [0] * (len(mask) - lengths[i])
            assert np.array_equal(batch.inputs["input_ids"][row], np.where(mask, np.arange(1, len(mask) + 1), 77))
            if typed:
                assert np.array_equal(
                    batch.inputs["token_type_ids"][row], np.where(mask, np.arange(1, len(mask) + 1) % 2, 0)
                )
    again = list(TASK.batches(split, size, pad_id=77))
    assert all(np.array_equal(a.indices, b.indices) for a, b in zip(batches, again, strict=True))


def test_the_score_is_the_share_of_right_labels() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(50, 4)).astype(np.float32), rng.integers(0, 4, 50)
    sums = TASK.score_examples(logits, labels).sum(axis=0)
    assert TASK.summary(sums[0] / sums[1]) == (logits.argmax(1) == labels).mean()
    assert TASK.score_examples(logits, labels).dtype == np.float64


def test_kept_is_a_fraction_of_the_teachers_accuracy() -> None:
    assert TASK.kept(0.45, 0.9) == pytest.approx(0.5)
    assert TASK.kept(0.9, 0.9) == 1.0
    assert TASK.kept(0.0, 0.0) == 1.0
    assert TASK.direction == "maximize"


def test_the_loss_is_the_models_own() -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification(bert_config())
    ids, labels = torch.randint(4, 64, (3, 5)), torch.tensor([0, 1, 1])
    out = model(input_ids=ids, labels=labels)
    assert TASK.loss(out.logits, labels).item() == pytest.approx(out.loss.item(), abs=1e-7)
    assert TASK.soft_targets(out.logits, labels).shape == (3, 2)


def test_outputs_are_those_of_the_transformers_pipeline(tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification(bert_config(["a", "b", "c"])).train(False)
    expected = pipeline("text-classification", model=model, tokenizer=tokenizer)("w1 w2 w3")
    with torch.no_grad():
        logits = model(**tokenizer("w1 w2 w3", return_tensors="pt")).logits[0].numpy()
    for config in (model.config.to_dict(), json.loads(model.config.to_json_string())):
        outputs = TASK.pipeline_outputs(logits, config)
        assert [o["label"] for o in outputs] == [o["label"] for o in expected]
        assert [o["score"] for o in outputs] == pytest.approx([o["score"] for o in expected], abs=1e-6)
