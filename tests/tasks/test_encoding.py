"""What the text tasks share."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from transformers import BertConfig, PreTrainedTokenizerFast, RobertaConfig

from autolite.errors import DataError
from autolite.tasks.base import DataSpec, Split
from autolite.tasks.encoding import fingerprint, max_tokens

BERT, ROBERTA = BertConfig(max_position_embeddings=32), RobertaConfig(max_position_embeddings=514)


def test_the_default_length_is_what_tokenizer_and_model_can_take_but_no_more_than_asked(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    assert max_tokens(DataSpec("d"), tokenizer, BERT, 256) == 32
    assert max_tokens(DataSpec("d"), tokenizer, ROBERTA, 1000) == 512
    assert max_tokens(DataSpec("d"), tokenizer, ROBERTA, 256) == 256
    assert max_tokens(DataSpec("d", max_length=7), tokenizer, BERT, 256) == 7


@pytest.mark.parametrize("length", [3, 33])
def test_a_length_that_the_model_cannot_take_is_refused(tokenizer: PreTrainedTokenizerFast, length: int) -> None:
    with pytest.raises(DataError, match=f"{length} tokens is outside 4 to 32"):
        max_tokens(DataSpec("d", max_length=length), tokenizer, BERT, 256)


def test_the_fingerprint_sees_every_part() -> None:
    train = Split("train", [np.arange(n, 9) for n in (3, 5, 8)], None, np.array([0, 1, 2]))
    changed = [
        replace(train, name="test"),
        replace(train, labels=train.labels[::-1]),
        replace(train, token_type_ids=[np.zeros_like(ids) for ids in train.input_ids]),
        replace(train, input_ids=[ids + 1 for ids in train.input_ids]),
        replace(train, input_ids=[np.arange(3, 6), np.array([6, 7, 8, 5, 6]), np.array([7, 8, 8])]),
        train.take([0, 1]),
        train.take([1, 0, 2]),
    ]
    assert len({fingerprint([split]) for split in [train, *changed]}) == 1 + len(changed)
    assert fingerprint([train.take([0, 1, 2])]) == fingerprint([train])
    assert fingerprint([train, train]) != fingerprint([train])
