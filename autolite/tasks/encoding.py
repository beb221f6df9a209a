"""What the text tasks share: how long an example may be, padded batches, and the fingerprint of the data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from autolite.errors import DataError
from autolite.families import usable_positions
from autolite.tasks.base import Batch, DataSpec, Split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def max_tokens(spec: DataSpec, tokenizer: PreTrainedTokenizerBase, config: Any, default: int) -> int:
    """Return how many tokens an example may have: `spec.max_length`, else `default` or what the model can take.

    Raises:
        DataError: if `spec.max_length` is above the model's limit, or too small for special tokens and a word.
    """
    limit = int(min(usable_positions(config), tokenizer.model_max_length))
    if spec.max_length is None:
        return min(limit, default)
    if not 4 <= spec.max_length <= limit:
        raise DataError(f"a length of {spec.max_length} tokens is outside 4 to {limit}, which this model can take")
    return spec.max_length


def pad(rows: Sequence[np.ndarray], value: int) -> np.ndarray:
    """Return the rows as one int64 array [rows, longest], filled with `value` on the right."""
    out = np.full((len(rows), max(len(row) for row in rows)), value, dtype=np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def padded_batches(split: Split, size: int, pad_id: int, labels: Callable[[np.ndarray], np.ndarray]) -> Iterator[Batch]:
    """Yield right-padded batches of up to `size` examples, shortest first; the same ones every time.

    Args:
        split: the examples.
        size: of a batch.
        pad_id: the token that fills `input_ids`.
        labels: gives a batch's labels from the indices of its examples.
    """
    order = np.argsort([len(ids) for ids in split.input_ids], kind="stable")
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        rows = [split.input_ids[i] for i in chosen]
        inputs = {"input_ids": pad(rows, pad_id), "attention_mask": pad([np.ones_like(row) for row in rows], 0)}
        if split.token_type_ids is not None:
            inputs["token_type_ids"] = pad([split.token_type_ids[i] for i in chosen], 0)
        yield Batch(inputs, labels(chosen), chosen)


def fingerprint(splits: Sequence[Split]) -> str:
    """Return the SHA-256 over every split's digest, in hexadecimal."""
    return hashlib.sha256(" ".join(split.digest for split in splits).encode()).hexdigest()
