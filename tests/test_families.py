from types import SimpleNamespace

import pytest
from transformers import (
    AlbertConfig,
    BertConfig,
    CamembertConfig,
    ElectraConfig,
    GPT2Config,
    MistralConfig,
    RobertaConfig,
    T5Config,
    ViTConfig,
    XLMRobertaConfig,
)

from autolite.errors import ModelError
from autolite.families import FAMILIES, family_of, head_for, usable_positions


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (BertConfig(), "bert"),
        (XLMRobertaConfig(), "roberta"),
        (CamembertConfig(), "roberta"),
        (MistralConfig(), "llama"),
    ],
)
def test_a_family_is_found_by_the_model_type(config: object, name: str) -> None:
    assert family_of(config) is FAMILIES[name]


def test_what_the_map_does_not_have_is_named_with_what_it_has() -> None:
    with pytest.raises(ModelError, match=r"map has no 't5'; it has albert.*bert.*gpt2.*qwen3.*vit"):
        family_of(T5Config())
    assert usable_positions(ElectraConfig()) == 512


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BertConfig(is_decoder=True), "is_decoder"),
        (AlbertConfig(num_hidden_groups=2), "2 groups"),
        (SimpleNamespace(model_type="gpt2", add_cross_attention=True), "cross-attention"),
    ],
)
def test_a_variant_that_works_differently_is_not_in_the_map(config: object, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        family_of(config)


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (BertConfig(), 512),
        (RobertaConfig(max_position_embeddings=514), 512),
        (GPT2Config(n_positions=1024), 1024),
        (ViTConfig(), 10**9),
    ],
)
def test_a_position_table_may_have_rows_that_no_token_uses(config: object, positions: int) -> None:
    assert usable_positions(config) == positions


def test_heads_go_by_class_name() -> None:
    bert = FAMILIES["bert"]
    head = head_for(bert, "BertForSequenceClassification")
    assert head is not None
    assert head.pooling == "first"
    assert head_for(bert, "BertModel") is None
    with pytest.raises(ModelError, match="no head of BertLMHeadModel"):
        head_for(bert, "BertLMHeadModel")
