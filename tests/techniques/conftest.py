"""A tiny teacher of any family with a few random sentences to train on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from autolite import contracts, registry
from autolite.architecture import shape_of
from autolite.tasks.base import Split
from autolite.techniques.base import Context, Student
from autolite.testing import PAD, VOCAB, tiny_model

MakeContext = Callable[..., Context]


@pytest.fixture
def make_context() -> MakeContext:
    """Return a function that makes a context: a tiny teacher and `examples` sentences of 3 to 9 tokens."""

    def make(
        family: str = "bert",
        task: str = "text-classification",
        examples: int = 24,
        layers: int = 3,
        seed: int = 0,
        cache: Path | None = None,
    ) -> Context:
        rng = np.random.default_rng(7)
        ids = [rng.integers(4, VOCAB, rng.integers(3, 10)) for _ in range(examples)]
        labels = rng.integers(0, 3, examples) if task == "text-classification" else np.zeros(0, np.int64)
        model = tiny_model(family, task, layers=layers)
        teacher = Student(model, shape_of(model))
        train = Split("train", ids, None, labels)
        return Context(teacher, registry.get("task", task), train, PAD, seed=seed, cache=cache)

    return make


@pytest.fixture
def make_tiny() -> MakeContext:
    """Return a function that makes a context of any family, images included, with the task that fits it."""
    return lambda family, **config: contracts.tiny_context(family, contracts.tiny_task(family), **config)
