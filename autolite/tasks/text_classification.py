"""Text classification, of single texts and of pairs: cross-entropy, judged by accuracy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from autolite.errors import DataError
from autolite.measure import Workload
from autolite.tasks import data, demo
from autolite.tasks.base import IGNORED, Batch, DataSpec, Split, TaskData
from autolite.tasks.encoding import fingerprint, max_tokens, padded_batches

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

MAX_TOKENS = 256  # default cut of long texts; longer ones cost quadratic time and rarely change a label


@dataclass(frozen=True)
class _Rows:
    origin: str
    texts: Sequence[str]
    pairs: Sequence[str] | None
    labels: Sequence[Any] | np.ndarray
    names: Sequence[Any] | None = None  # the labels in words, where the data has both

    def keys(self) -> list[str]:
        """What makes two rows the same one: their texts."""
        return (
            list(self.texts)
            if self.pairs is None
            else [f"{a}\x1f{b}" for a, b in zip(self.texts, self.pairs, strict=True)]
        )


class TextClassification:
    """One label a text or a pair of texts."""

    name = "text-classification"
    auto_class = "AutoModelForSequenceClassification"
    best = 1.0
    pipeline_tag = "text-classification"
    default_space = "default"
    metric = "accuracy"
    direction: Literal["maximize", "minimize"] = "maximize"

    def load(self, spec: DataSpec, tokenizer: PreTrainedTokenizerBase, config: Any) -> TaskData:
        """Read, check, cut and tokenise the data; without a source, the embedded demo's.

        Texts without labels (`spec.unlabelled`) that occur in what candidates are judged by are left out.

        Raises:
            DataError: naming the file, the column, the row or the label that is wrong.
        """
        if spec.stride is not None:
            raise DataError(f"--stride {spec.stride} is for the texts of language models; leave it out")
        names = _label_names(config)
        limit = max_tokens(spec, tokenizer, config, MAX_TOKENS)
        notes: list[str] = []
        found = _demo(names) if spec.source is None else _columns(spec, notes)
        known = _with_ids(_labelled(found, notes), names)
        rows = {split: _filled(r, notes) for split, r in known.items()}
        notes[:0] = [f"{split}: {len(r.texts)} rows, {r.origin}" for split, r in rows.items()]
        if len(classes := np.unique(rows["train"].labels)) < 2:
            origin, only = rows["train"].origin, names[classes[0]]
            raise DataError(f"every row of {origin} has the label '{only}': there is nothing to tell apart")
        keys = {split: r.keys() for split, r in rows.items()}
        where, cuts = data.assign(keys, spec.seed)
        if spec.unlabelled is not None:
            judged = {keys[where[s][0]][i] for s in ("search", "selection", "test") for i in where[s][1]}
            rows["unlabelled"] = _unlabelled(spec, rows["train"].pairs is not None, judged, notes)
        encoded = _tokenise(rows, tokenizer, config, limit)
        long = sum(len(ids) == limit for split in encoded.values() for ids in split.input_ids)
        if long:
            notes.append(f"texts are cut at {limit} tokens ({long} of {sum(map(len, encoded.values()))} reach that)")
        train, search, selection, test = (
            replace(encoded[where[name][0]].take(where[name][1]), name=name)
            for name in ("train", "search", "selection", "test")
        )
        unlabelled = encoded.get("unlabelled")
        digest = fingerprint([s for s in (train, search, selection, test, unlabelled) if s is not None])
        return TaskData(train, search, selection, test, digest, names, (*notes, *cuts), unlabelled)

    def workload(self, data: TaskData) -> Workload:
        """Return a call for one text of the 90th percentile of the training examples' lengths."""
        return Workload(tokens=data.p90_tokens)

    def batches(self, split: Split, size: int, pad_id: int) -> Iterator[Batch]:
        """Return right-padded batches of up to `size` examples, shortest first; the same ones every time."""
        return padded_batches(split, size, pad_id, lambda chosen: split.labels[chosen])

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy (nats) of `logits` [batch, classes] against `labels` [batch]."""
        from torch.nn.functional import cross_entropy

        return cross_entropy(logits.float(), labels)

    def soft_targets(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return `logits` [batch, classes] as they are: every example counts."""
        return logits

    def score_examples(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return [batch, 2]: whether the largest of `logits` [batch, classes] is the label's (0 or 1), and 1."""
        right = logits.argmax(axis=-1) == labels
        return np.stack([right.astype(np.float64), np.ones(len(labels))], axis=1)

    def summary(self, ratio: float) -> float:
        """Accuracy is the ratio itself."""
        return ratio

    def kept(self, ratio: float, teacher_ratio: float) -> float:
        """Accuracy as a fraction of the teacher's (1 if both are 0)."""
        return ratio / teacher_ratio if teacher_ratio else 1.0 + ratio

    def pipeline_outputs(self, logits: np.ndarray, config: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return `[{"label", "score"}]` of the most probable class of `logits` [classes], as transformers does."""
        shifted = np.exp(logits.astype(np.float64) - logits.max())
        best = int(logits.argmax())
        id2label = config["id2label"]  # JSON makes strings of the integer keys
        return [{"label": id2label.get(best, id2label.get(str(best))), "score": float(shifted[best] / shifted.sum())}]


def _label_names(config: Any) -> tuple[str, ...]:
    if config.num_labels < 2 or getattr(config, "problem_type", None) in ("regression", "multi_label_classification"):
        raise DataError(
            f"the model has {config.num_labels} output(s) and problem type {getattr(config, 'problem_type', None)}; "
            "text-classification needs two or more labels that exclude one another"
        )
    return tuple(str(config.id2label[i]) for i in range(config.num_labels))


def _demo(names: Sequence[str]) -> dict[str, _Rows]:
    if strange := set(demo.PARTS) - set(names):
        raise DataError(
            f"the demo's data needs a model that knows the label '{min(strange)}'; give the model's own (--data)"
        )
    passages = demo.read_corpus()
    if not passages:
        raise DataError(
            "this Python has no sources of its standard library to read docstrings from; give data (--data)"
        )
    rows = {}
    for split in ("train", "validation", "test"):
        chosen = [p for p in passages if p.split == split]
        labels = [p.label for p in chosen]
        rows[split] = _Rows("docstrings of the standard library", [p.text for p in chosen], None, labels)
    return rows


def _columns(spec: DataSpec, notes: list[str]) -> dict[str, _Rows]:
    assert spec.source is not None
    rows = {}
    for split, table in data.read(spec.source).items():
        text, pair = data.text_columns(table, spec.text, spec.text_pair)
        option = "--label (data without labels cannot be used yet)"
        label = data.column(table, spec.label, data.LABEL, "label", option)
        columns = f"text '{text}'" + (f", second text '{pair}'" if pair else "") + f", label '{label}'"
        if columns not in notes:
            notes.append(columns)
        rows[split] = _Rows(
            table.origin,
            data.texts(table, text),
            data.texts(table, pair) if pair else None,
            table.columns[label],
            next((table.columns[n] for n in (f"{label}_text", f"{label}_name") if n in table.columns), None),
        )
    return rows


def _unlabelled(spec: DataSpec, pairs: bool, judged: Set[str], notes: list[str]) -> _Rows:
    """Read the texts without labels, and leave out those that candidates are judged by."""
    assert spec.unlabelled is not None
    table = data.read(spec.unlabelled)["train"]
    first, second = data.text_columns(table, None if table.plain else spec.text, spec.text_pair)
    if (second is not None) != pairs:
        raise DataError(
            f"{table.origin} has {'pairs of texts' if second else 'single texts'}, but the data with labels "
            f"{'pairs' if pairs else 'single texts'}"
        )
    seconds = data.texts(table, second) if second else None
    found = _filled(_Rows(table.origin, data.texts(table, first), seconds, [IGNORED] * len(table)), notes)
    kept = [i for i, key in enumerate(found.keys()) if key not in judged]
    if not kept:
        raise DataError(
            f"every text in {table.origin} is one of the validation or test split: nothing is left to learn"
        )
    notes.append(f"unlabelled: {len(kept)} rows, {table.origin}")
    if len(kept) < len(found.texts):
        notes.append(f"{table.origin}: {len(found.texts) - len(kept)} texts of the validation or test split left out")
    chosen = None if found.pairs is None else [found.pairs[i] for i in kept]
    return _Rows(table.origin, [found.texts[i] for i in kept], chosen, [IGNORED] * len(kept))


def _filled(rows: _Rows, notes: list[str]) -> _Rows:
    """Leave out the rows with an empty text."""
    pairs = rows.texts if rows.pairs is None else rows.pairs
    full = [i for i, (a, b) in enumerate(zip(rows.texts, pairs, strict=True)) if a.strip() and b.strip()]
    if not full:
        raise DataError(f"every text in {rows.origin} is empty")
    if len(full) < len(rows.texts):
        notes.append(f"{rows.origin}: {len(rows.texts) - len(full)} rows with an empty text left out")
        cut_pairs = None if rows.pairs is None else [rows.pairs[i] for i in full]
        return _Rows(rows.origin, [rows.texts[i] for i in full], cut_pairs, np.asarray(rows.labels)[full])
    return rows


def _labelled(rows: dict[str, _Rows], notes: list[str]) -> dict[str, _Rows]:
    """Leave out a test or validation split that hides its labels (all -1 or missing), as public benchmarks do."""
    kept = {}
    for split, r in rows.items():
        if split != "train" and all(label is None or label in (-1, "-1", "") for label in r.labels):
            notes.append(f"{split} of {r.origin} has no labels and is not used")
        else:
            kept[split] = r
    return kept


def _with_ids(rows: Mapping[str, _Rows], names: Sequence[str]) -> dict[str, _Rows]:
    """Replace labels by the model's label ids, int64 [rows]: by name where all are names of the model's, else as
    integers. Which of both a column has is asked of all splits together: "1" to "5" may be names, too."""
    folded = [name.casefold() for name in names]
    fold = str.casefold if len(set(folded)) == len(names) else str
    ids: dict[Any, int] = {fold(name): i for i, name in reversed(list(enumerate(names)))}

    def by_name(values: Iterable[Any]) -> list[int | None]:
        return [None if v is None else ids.get(fold(str(v))) for v in values]

    named = all(None not in by_name(r.labels) for r in rows.values())
    found = {}
    for split, r in rows.items():
        values = [None] if r.names is None else by_name(r.names)
        if None in values:
            values = by_name(r.labels) if named else list(_numbered(r, names, by_name(r.labels)))
        found[split] = replace(r, labels=np.array(values, dtype=np.int64))
    return found


def _numbered(rows: _Rows, names: Sequence[str], named: Sequence[int | None]) -> np.ndarray:
    """Return the ids, int64 [rows], of labels that are integers; or if none is, those that they are by name."""
    numbers, what = [_integer(value) for value in rows.labels], f"0 to {len(names) - 1}, or "
    if all(n is None for n in numbers):  # else integers throughout, but for the one that is wrong
        numbers, what = list(named), ""
    known = [n is not None and 0 <= n < len(names) for n in numbers]
    if not all(known):
        row = known.index(False)
        shown = ", ".join(names[:20]) + (f", … ({len(names)} in all)" if len(names) > 20 else "")
        raise DataError(
            f"row {row + 1} of {rows.origin}: the label {rows.labels[row]!r} is unknown to the model;"
            f" it knows {what}{shown}"
        )
    return np.array(numbers, dtype=np.int64)


def _integer(value: Any) -> int | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return int(number) if number.is_integer() else None


def _tokenise(
    rows: Mapping[str, _Rows], tokenizer: PreTrainedTokenizerBase, config: Any, limit: int
) -> dict[str, Split]:
    encoded = {
        split: tokenizer(
            list(r.texts),
            None if r.pairs is None else list(r.pairs),
            truncation=True,
            max_length=limit,
            return_attention_mask=False,
        )
        for split, r in rows.items()
    }
    typed = getattr(config, "type_vocab_size", 0) > 1 and any(
        any(map(any, e.get("token_type_ids", ()))) for e in encoded.values()
    )
    return {
        split: Split(
            split,
            [np.array(ids, dtype=np.int64) for ids in e["input_ids"]],
            [np.array(ids, dtype=np.int64) for ids in e["token_type_ids"]] if typed else None,
            np.asarray(rows[split].labels, dtype=np.int64),
        )
        for split, e in encoded.items()
    }
