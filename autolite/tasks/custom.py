"""A task judged, or trained, by functions of the user's own."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from autolite.errors import InputError
from autolite.measure import Workload
from autolite.tasks.base import Batch, DataSpec, Further, Split, Task, TaskData

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

Loss = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]
Metric = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass
class CustomTask:
    """The task `inner` with another loss, another metric, or both.

    Attributes:
        inner: does all the rest.
        own_loss: returns the mean loss, a scalar tensor, of `logits` [batch, classes] or [batch, tokens, vocab] in
            float32 against the int64 `labels` of `Task.batches`; None for the task's.
        own_metric: returns a score for each example, float [batch], whose mean is the metric; or two columns
            [batch, 2], such that the metric is the sum of the first / the sum of the second (F1 is 2 * tp and
            2 * tp + fp + fn). The larger, the better. None for the task's.
    """

    inner: Task
    own_loss: Loss | None = None
    own_metric: Metric | None = None
    name: str = field(init=False)
    auto_class: str = field(init=False)
    best: float = field(init=False)
    pipeline_tag: str = field(init=False)
    default_space: str = field(init=False)
    metric: str = field(init=False)
    direction: Literal["maximize", "minimize"] = field(init=False)

    def __post_init__(self) -> None:
        """Take the inner task's names, and the metric's from its function."""
        inner = self.inner
        self.name, self.auto_class, self.pipeline_tag = inner.name, inner.auto_class, inner.pipeline_tag
        self.default_space, self.best = inner.default_space, inner.best
        self.metric, self.direction = inner.metric, inner.direction
        if isinstance(inner, Further):
            self.further = inner.further
        if self.own_metric is not None:
            self.metric = str(getattr(self.own_metric, "__name__", "metric"))
            self.direction, self.best = "maximize", math.inf

    @property
    def identity(self) -> str:
        """Say which loss is trained with; the metric changes no student."""
        return identity_of(self.own_loss)

    def load(self, spec: DataSpec, tokenizer: PreTrainedTokenizerBase, config: Any) -> TaskData:
        """As the inner task."""
        return self.inner.load(spec, tokenizer, config)

    def workload(self, data: TaskData) -> Workload:
        """As the inner task."""
        return self.inner.workload(data)

    def batches(self, split: Split, size: int, pad_id: int) -> Iterator[Batch]:
        """As the inner task."""
        return self.inner.batches(split, size, pad_id)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the user's loss.

        Raises:
            InputError: if it is no scalar tensor.
        """
        if self.own_loss is None:
            return self.inner.loss(logits, labels)
        loss = self.own_loss(logits.float(), labels)
        if getattr(loss, "ndim", None) != 0:
            shape = tuple(loss.shape) if hasattr(loss, "shape") else loss
            raise InputError(f"the loss must return a scalar tensor, the mean over the batch, but returned {shape}")
        return loss

    def soft_targets(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """As the inner task."""
        return self.inner.soft_targets(logits, labels)

    def score_examples(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return the user's scores as [batch, 2].

        Raises:
            InputError: if they are not one or two numbers an example.
        """
        if self.own_metric is None:
            return self.inner.score_examples(logits, labels)
        scores = np.asarray(self.own_metric(logits, labels), dtype=np.float64)
        if scores.shape not in ((len(labels),), (len(labels), 2)):
            raise InputError(
                f"the metric must return a score for each of the {len(labels)} examples of a batch, or two columns, "
                f"but returned the shape {scores.shape}"
            )
        return np.stack([scores, np.ones(len(labels))], axis=1) if scores.ndim == 1 else scores

    def summary(self, ratio: float) -> float:
        """The user's metric is the ratio itself."""
        return ratio if self.own_metric is not None else self.inner.summary(ratio)

    def kept(self, ratio: float, teacher_ratio: float) -> float:
        """The user's metric as a fraction of the teacher's; where that is not positive, 1 plus the difference."""
        if self.own_metric is None:
            return self.inner.kept(ratio, teacher_ratio)
        return ratio / teacher_ratio if teacher_ratio > 0 else 1.0 + ratio - teacher_ratio

    def pipeline_outputs(self, logits: np.ndarray, config: Mapping[str, Any]) -> Any:
        """As the inner task."""
        return self.inner.pipeline_outputs(logits, config)


def identity_of(function: Any) -> str:
    """Name a function by its qualified name and its source (its bytecode where there is none); "" for None.

    What the function reads from outside, such as a global, is not seen.
    """
    if function is None:
        return ""
    named = function if hasattr(function, "__qualname__") else type(function)
    try:
        content = inspect.getsource(named).encode()
    except (OSError, TypeError):
        content = getattr(getattr(named, "__code__", None), "co_code", b"")
    return f"{named.__module__}.{named.__qualname__} {hashlib.sha256(content).hexdigest()[:12]}"
