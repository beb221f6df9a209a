from typing import Any

import pytest
import torch

from autolite.families import FAMILIES
from autolite.testing import PAD, VOCAB, tiny_inputs, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_seeds_give_equal_models_and_others_differ(family: str) -> None:
    one, same, other = (tiny_model(family, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"vit"}))
def test_padding_does_not_change_what_a_tiny_model_says(family: str) -> None:
    model: Any = tiny_model(family)
    inputs = tiny_inputs(model)
    short = int(inputs["attention_mask"][2].sum())
    assert short < inputs["input_ids"].shape[1]
    alone = {name: tensor[2:, :short] for name, tensor in inputs.items()}
    torch.testing.assert_close(model(**inputs).logits[2:], model(**alone).logits, atol=1e-5, rtol=1e-5)


def test_a_tiny_tokenizer_fits_the_tiny_models() -> None:
    tokenizer = tiny_tokenizer(["Good", "bad"])
    assert (len(tokenizer), tokenizer.pad_token_id) == (VOCAB, PAD)
    assert tokenizer("good BAD unheard")["input_ids"] == [2, 4, 5, 0, 3]


@pytest.mark.parametrize(
    ("family", "task", "message"),
    [
        ("brt", "text-classification", "did you mean 'bert'"),
        ("bert", "translation", "Known: language-modeling, text-classification"),
        ("distilbert", "language-modeling", "Unrecognized configuration class"),
    ],
)
def test_what_cannot_be_made_is_refused(family: str, task: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model(family, task)
