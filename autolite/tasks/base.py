"""What a task is: data in, a loss for training, a metric for judging."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np

from autolite.measure import Workload

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


IGNORED = -100  # the label of an example, or of a token, whose label is unknown or not asked for


@dataclass(frozen=True)
class Split:
    """Tokenised examples: one int64 array of ids (and token types, for pairs) each, and the labels, int64 [n].

    An example without a label has `IGNORED` for one; only distillation is given such. In language modelling the ids are
    the targets, and labels say how many first tokens of each example are only given; if there are none, it is one.
    """

    name: str
    input_ids: Sequence[np.ndarray]
    token_type_ids: Sequence[np.ndarray] | None
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.input_ids)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the name, lengths, ids, token types and labels, in hexadecimal."""
        digest = hashlib.sha256(self.name.encode())
        digest.update(np.array([len(ids) for ids in self.input_ids], dtype="<i8").tobytes())
        for rows in (self.input_ids, self.token_type_ids or [], [self.labels]):
            values = np.concatenate([np.zeros(0, np.int64), *(np.ravel(row) for row in rows)])
            digest.update(values.astype("<i8" if values.dtype.kind == "i" else "<f8").tobytes())
        return digest.hexdigest()

    def take(self, indices: Sequence[int] | np.ndarray) -> Split:
        """Return the examples at `indices`, in that order."""
        return Split(
            self.name,
            [self.input_ids[i] for i in indices],
            None if self.token_type_ids is None else [self.token_type_ids[i] for i in indices],
            self.labels[np.asarray(indices, dtype=np.int64)] if len(self.labels) else self.labels,
        )


# Changes or adds training examples for one epoch; labels may be `IGNORED`. All of its randomness is the generator's.
Augment = Callable[[Split, np.random.Generator], Split]


@dataclass(frozen=True)
class Batch:
    """A padded batch: `inputs` maps the model's input names to int64 arrays [batch, tokens]; `indices` says which
    examples of the split it holds; `labels` int64 [batch], or [batch, tokens] with -100 where nothing is asked."""

    inputs: dict[str, np.ndarray]
    labels: np.ndarray
    indices: np.ndarray


@dataclass(frozen=True)
class DataSpec:
    """Where the data is and how to read it; None means found by convention."""

    source: str | None  # a file, a folder, a hub name, or None for the embedded demo
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    max_length: int | None = None
    seed: int = 0
    unlabelled: str | None = None  # more texts to distill on, whose labels (if any) are not read
    stride: int | None = None  # of the windows that texts are scored in (language models)


@dataclass(frozen=True)
class TaskData:
    """The four splits of DESIGN: train (training, calibration), search, selection (both cut from validation), test."""

    train: Split
    search: Split
    selection: Split
    test: Split
    fingerprint: str  # SHA-256 over every split's content
    labels: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())  # what was found or cut, for the user: "test: cut 10 % of train"
    unlabelled: Split | None = None  # more training texts, all labels `IGNORED`

    @property
    def p90_tokens(self) -> int:
        """The 90th percentile of the training examples' lengths in tokens."""
        return int(np.percentile([len(ids) for ids in self.train.input_ids], 90))


class Task(Protocol):
    """A task: one file, one registry line. Instances are stateless."""

    name: str
    auto_class: str  # "AutoModelForSequenceClassification"
    best: float  # the metric's best possible value
    pipeline_tag: str  # the hub's name for what such a model does: "text-classification", "text-generation"
    default_space: str  # name of the search space that suits its models best
    metric: str  # "accuracy", "perplexity"
    direction: Literal["maximize", "minimize"]

    def load(self, spec: DataSpec, tokenizer: PreTrainedTokenizerBase, config: Any) -> TaskData:
        """Read, check and tokenise the data. Raises DataError naming the file, column, row or label."""
        ...

    def workload(self, data: TaskData) -> Workload:
        """Return the call whose latency is meant unless the user names another."""
        ...

    def batches(self, split: Split, size: int, pad_id: int) -> Iterator[Batch]:
        """Yield padded batches, sorted by length so that little is padded; the same ones every time."""
        ...

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean hard loss (scalar) of `logits` [batch, classes] or [batch, tokens, vocab]."""
        ...

    def soft_targets(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the rows [m, classes] of `logits` that distillation compares (language models: non-padding ones)."""
        ...

    def score_examples(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return float64 [batch, 2] per example (a, b), such that the metric is `summary(sum a / sum b)`."""
        ...

    def summary(self, ratio: float) -> float:
        """Turn the ratio of sums into the metric: the identity for accuracy, exp for perplexity."""
        ...

    def kept(self, ratio: float, teacher_ratio: float) -> float:
        """Fraction of the teacher's quality kept, from the two ratios: candidate / teacher, or for perplexity
        1 - (rise of the mean loss in nats)."""
        ...

    def pipeline_outputs(self, logits: np.ndarray, config: Mapping[str, Any]) -> Any:
        """Turn one example's logits into what the transformers pipeline of this name returns."""
        ...


@runtime_checkable
class Further(Protocol):
    """A task that has more to say of a finalist than its metric."""

    def batches(self, split: Split, size: int, pad_id: int) -> Iterator[Batch]:
        """As `Task.batches`."""
        ...

    def further(self, logits: np.ndarray, teacher: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
        """Return numbers by name, from the logits of a finalist and of the teacher: for each, float64 [batch, 2] per
        example (a, b), such that the number is sum a / sum b."""
        ...
