"""A task with the user's own loss and metric keeps every promise of a task, and a run notices another function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autolite import contracts, registry
from autolite.errors import InputError, RunError
from autolite.search.scoring import Score
from autolite.tasks.base import IGNORED, Further, Split
from autolite.tasks.custom import CustomTask, identity_of
from tests.conftest import RunSearch

USED: set[str] = set()
INNER = registry.get("task", "text-classification")


def smooth(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    USED.add("loss")
    return torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)


def f1(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    said, true = logits.argmax(-1) == 1, labels == 1
    hit = said & true
    return np.stack([2 * hit, 2 * hit + (said ^ true)], axis=1)


def halves(split: Split, rng: np.random.Generator) -> Split:
    """Train on half of the examples, and on their first words without a label."""
    USED.add("augment")
    chosen = split.take(rng.permutation(len(split))[: len(split) // 2])
    cut = [ids[: max(3, len(ids) // 2)] for ids in chosen.input_ids]
    labels = np.concatenate([chosen.labels, np.full(len(chosen), IGNORED)])
    return Split(split.name, [*chosen.input_ids, *cut], None, labels)


def test_it_keeps_the_promises_of_a_task(tiny_data: Path) -> None:
    own = CustomTask(INNER, smooth, lambda logits, labels: (logits.argmax(-1) == labels).astype(float))
    contracts.check_task(own, tiny_data, "bert")
    contracts.check_task(CustomTask(registry.get("task", "language-modeling"), smooth_tokens), tiny_data, "llama")


def test_it_says_further_what_the_inner_task_does() -> None:
    inner = registry.get("task", "language-modeling")
    own = CustomTask(inner, smooth_tokens)
    assert isinstance(own, Further)
    assert own.further == inner.further
    assert not isinstance(CustomTask(INNER, smooth), Further)


def smooth_tokens(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)


def test_two_columns_are_the_sums_of_a_quotient() -> None:
    logits, labels = np.eye(2)[[1, 1, 0, 1, 0]], np.array([1, 0, 1, 1, 0])
    task = CustomTask(INNER, own_metric=f1)
    precision, recall = 2 / 3, 2 / 3
    assert task.metric == "f1"
    assert Score(task.score_examples(logits, labels)).ratio == pytest.approx(
        2 * precision * recall / (precision + recall)
    )


@pytest.mark.parametrize(
    ("score", "teacher", "kept"),
    [(0.4, 0.5, 0.8), (-0.9, -0.3, 0.4), (-0.2, -0.3, 1.1), (0.0, 0.0, 1.0), (0.2, 0.0, 1.2)],
)
def test_kept_is_a_part_of_a_positive_metric_and_falls_with_any_other(
    score: float, teacher: float, kept: float
) -> None:
    assert CustomTask(INNER, own_metric=f1).kept(score, teacher) == pytest.approx(kept)


@pytest.mark.parametrize("wrong", [lambda a, b: a, lambda a, b: (a**2).mean(-1)])
def test_a_loss_that_is_no_number_is_refused(wrong: Any) -> None:
    with pytest.raises(InputError, match="must return a scalar tensor"):
        CustomTask(INNER, own_loss=wrong).loss(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("wrong", [lambda a, b: 0.5, lambda a, b: np.zeros((4, 3))])
def test_a_metric_that_scores_no_examples_is_refused(wrong: Any) -> None:
    with pytest.raises(InputError, match="a score for each of the 4 examples"):
        CustomTask(INNER, own_metric=wrong).score_examples(np.zeros((4, 2)), np.zeros(4, np.int64))


def test_functions_are_told_apart_by_their_source() -> None:
    def one() -> int:
        return 1

    first = identity_of(one)

    def one() -> int:  # type: ignore[no-redef]
        return 2

    assert first != identity_of(one)
    assert first.split()[0] == identity_of(one).split()[0]
    assert identity_of(None) == ""


def test_a_search_uses_them_and_a_resumed_one_notices_others(
    run_search: RunSearch, tmp_path: Path, tiny_data: Path
) -> None:
    usual: dict[str, Any] = {"out": tmp_path / "run", "budget": "6trials", "unlabelled": tiny_data}
    usual |= {"loss": smooth, "metric": f1, "augment": halves}
    USED.clear()
    result = run_search(**usual)
    assert {"loss", "augment"} == USED
    assert {c.quality.metric for c in result.front} == {"f1"}
    assert run_search(**usual).path == result.path, "finished: answers at once"
    for what in ("loss", "metric", "augment", "unlabelled"):
        with pytest.raises(RunError, match=f"made with another {what}"):
            run_search(**{**usual, what: None})
    with pytest.raises(RunError, match="made with another augment"):
        run_search(**{**usual, "augment": lambda split, rng: split})


def test_texts_that_are_judged_are_not_learned(tiny_teacher: Path, tiny_data: Path, tmp_path: Path) -> None:
    from autolite.tasks.base import DataSpec
    from autolite.testing import tiny_model, tiny_tokenizer

    model, tokenizer = tiny_model("bert", num_labels=2), tiny_tokenizer()
    more = tmp_path / "more.txt"
    more.write_text("w1 w2 w3\n\n" + "w4 w5\n", encoding="utf-8")
    plain = INNER.load(DataSpec(str(tiny_data)), tokenizer, model.config)
    found = INNER.load(DataSpec(str(tiny_data), unlabelled=str(more)), tokenizer, model.config)
    assert plain.unlabelled is None
    assert [len(ids) for ids in found.unlabelled.input_ids] == [5, 4]
    assert found.unlabelled.labels.tolist() == [IGNORED, IGNORED]
    assert found.fingerprint != plain.fingerprint
    again = INNER.load(DataSpec(str(tiny_data), unlabelled=str(tiny_data)), tokenizer, model.config)
    judged = {ids.tobytes() for split in (again.search, again.selection, again.test) for ids in split.input_ids}
    assert len(again.unlabelled) < 400
    # The tokenizer knows few words, so that two texts can have the same ids.
    assert len([ids for ids in again.unlabelled.input_ids if ids.tobytes() in judged]) < len(again.unlabelled) / 10
    assert any("left out" in note for note in again.notes)
