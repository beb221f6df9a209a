"""Where each Hugging Face family keeps its parts, as data. Paths are dotted attribute names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from autolite.errors import ModelError


@dataclass(frozen=True, slots=True)
class Head:
    """What follows the last layer in the model classes whose name ends in `suffix`.

    `pooling` picks the position that is read: "first" ([CLS]), "last" (the last token that is not padding) or
    "none" (all of them). `dense` lists the matrices from there to the logits as (path from the whole model, name of
    the activation after it, "" for none).
    """

    suffix: str
    pooling: Literal["none", "first", "last"]
    dense: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Family:
    """Where one architecture keeps its parts, and the facts that its weights do not show.

    Paths start at the base model (`model.base_model`) or, from `attention` to `key_norm`, at one layer; "" says that
    there is no such part.
    """

    name: str
    model_types: tuple[str, ...]
    heads: tuple[Head, ...]
    # The layers
    layers: str
    attention: str  # the module that computes attention and keeps the head counts
    query: str
    key: str
    value: str
    out: str
    ffn_in: str
    ffn_out: str
    attention_norm: str
    ffn_norm: str
    fused_qkv: str = ""  # one matrix instead of query, key and value (GPT-2)
    ffn_gate: str = ""
    query_norm: str = ""
    key_norm: str = ""
    repeated: bool = False  # one stored layer, applied `num_hidden_layers` times (ALBERT)
    # Around the layers
    word: str = ""
    position: str = ""
    token_type: str = ""
    embedding_norm: str = ""
    embedding_projection: str = ""  # from the embedding's width to the hidden width (ALBERT)
    patch: str = ""  # convolution over image patches, in the place of words (ViT)
    class_token: str = ""
    rotary: str = ""  # the module that holds the inverse frequencies
    final_norm: str = ""
    # Facts
    pre_norm: bool = False  # normalise before each block instead of after its residual sum
    rms_norm: bool = False
    causal: bool = False
    transposed: bool = False  # weights are stored [in, out] (GPT-2's Conv1D)
    positions_after_padding: bool = False  # positions count from pad_token_id + 1, padding excluded (RoBERTa)
    activation: str = "hidden_act"  # the configuration's name for it
    # Attributes of the attention module that follow the number of heads
    head_count: str = ""
    head_width: str = "head_dim"
    query_width: str = ""  # heads x head width


def _pooled(base: str, pooler: str) -> tuple[Head, ...]:
    return (Head("ForSequenceClassification", "first", ((f"{base}.{pooler}", "tanh"), ("classifier", ""))),)


_DECODER_HEADS = (
    Head("ForSequenceClassification", "last", (("score", ""),)),
    Head("LMHeadModel", "none", (("lm_head", ""),)),
    Head("ForCausalLM", "none", (("lm_head", ""),)),
)

_BERT: dict[str, Any] = {
    "layers": "encoder.layer",
    "attention": "attention.self",
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "ffn_in": "intermediate.dense",
    "ffn_out": "output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "ffn_norm": "output.LayerNorm",
    "word": "embeddings.word_embeddings",
    "position": "embeddings.position_embeddings",
    "token_type": "embeddings.token_type_embeddings",
    "embedding_norm": "embeddings.LayerNorm",
    "head_count": "num_attention_heads",
    "head_width": "attention_head_size",
    "query_width": "all_head_size",
}

_LLAMA: dict[str, Any] = {
    "heads": _DECODER_HEADS,
    "layers": "layers",
    "attention": "self_attn",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "ffn_in": "mlp.up_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_out": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "word": "embed_tokens",
    "rotary": "rotary_emb",
    "final_norm": "norm",
    "pre_norm": True,
    "rms_norm": True,
    "causal": True,
}

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("bert", ("bert",), heads=_pooled("bert", "pooler.dense"), **_BERT),
        Family(
            "roberta",
            ("roberta", "xlm-roberta", "camembert"),
            heads=(
                Head("ForSequenceClassification", "first", (("classifier.dense", "tanh"), ("classifier.out_proj", ""))),
            ),
            positions_after_padding=True,
            **_BERT,
        ),
        Family(
            "distilbert",
            ("distilbert",),
            heads=(Head("ForSequenceClassification", "first", (("pre_classifier", "relu"), ("classifier", ""))),),
            layers="transformer.layer",
            attention="attention",
            query="attention.q_lin",
            key="attention.k_lin",
            value="attention.v_lin",
            out="attention.out_lin",
            ffn_in="ffn.lin1",
            ffn_out="ffn.lin2",
            attention_norm="sa_layer_norm",
            ffn_norm="output_layer_norm",
            word="embeddings.word_embeddings",
            position="embeddings.position_embeddings",
            embedding_norm="embeddings.LayerNorm",
            activation="activation",
            head_count="n_heads",
            head_width="attention_head_size",
        ),
        Family(
            "albert",
            ("albert",),
            heads=_pooled("albert", "pooler"),
            layers="encoder.albert_layer_groups.0.albert_layers",
            attention="attention",
            query="attention.query",
            key="attention.key",
            value="attention.value",
            out="attention.dense",
            ffn_in="ffn",
            ffn_out="ffn_output",
            attention_norm="attention.LayerNorm",
            ffn_norm="full_layer_layer_norm",
            repeated=True,
            word="embeddings.word_embeddings",
            position="embeddings.position_embeddings",
            token_type="embeddings.token_type_embeddings",
            embedding_norm="embeddings.LayerNorm",
            embedding_projection="encoder.embedding_hidden_mapping_in",
            head_count="num_attention_heads",
            head_width="attention_head_size",
            query_width="all_head_size",
        ),
        Family(
            "vit",
            ("vit",),
            heads=(Head("ForImageClassification", "first", (("classifier", ""),)),),
            layers="layers",
            attention="attention",
            query="attention.q_proj",
            key="attention.k_proj",
            value="attention.v_proj",
            out="attention.o_proj",
            ffn_in="mlp.fc1",
            ffn_out="mlp.fc2",
            attention_norm="layernorm_before",
            ffn_norm="layernorm_after",
            position="embeddings.position_embeddings",
            patch="embeddings.patch_embeddings.projection",
            class_token="embeddings.cls_token",
            final_norm="layernorm",
            pre_norm=True,
            head_count="num_attention_heads",
        ),
        Family(
            "gpt2",
            ("gpt2",),
            heads=_DECODER_HEADS,
            layers="h",
            attention="attn",
            query="",
            key="",
            value="",
            fused_qkv="attn.c_attn",
            out="attn.c_proj",
            ffn_in="mlp.c_fc",
            ffn_out="mlp.c_proj",
            attention_norm="ln_1",
            ffn_norm="ln_2",
            word="wte",
            position="wpe",
            final_norm="ln_f",
            pre_norm=True,
            causal=True,
            transposed=True,
            activation="activation_function",
            head_count="num_heads",
            query_width="split_size",
        ),
        Family("llama", ("llama", "mistral"), **_LLAMA),
        Family("qwen2", ("qwen2",), **_LLAMA),
        Family("qwen3", ("qwen3",), query_norm="self_attn.q_norm", key_norm="self_attn.k_norm", **_LLAMA),
    )
}


_PLACES = ("layers", "attention", "query", "key", "value", "out", "ffn_in", "ffn_out", "attention_norm", "ffn_norm")
_NOWHERE: dict[str, Any] = dict.fromkeys(_PLACES, "")
# Of transformers that read with one stack and write with another there are only shapes, which can be priced. They
# normalise after each block and have no table of positions (fairseq's, Marian).
ENCODER_DECODER = Family(
    "encoder-decoder",
    (),
    heads=(Head("ForConditionalGeneration", "none", (("lm_head", ""),)),),
    causal=True,
    **_NOWHERE,
)
# All that a shape can be of
DESCRIBED: dict[str, Family] = {**FAMILIES, ENCODER_DECODER.name: ENCODER_DECODER}


def family_for(model_type: str | None) -> Family | None:
    """Return the family of transformers' `model_type`, None if the map has none."""
    return next((family for family in FAMILIES.values() if model_type in family.model_types), None)


def family_of(config: Any) -> Family:
    """Return the family of a transformers configuration.

    Raises:
        ModelError: if the map has no family of its `model_type`, or the model is a variant of one that works
            differently (an encoder used as a decoder, ALBERT with several groups of layers). Such models are
            compressed without the map; see `autolite.unmapped`.
    """
    kind = getattr(config, "model_type", None)
    family = family_for(kind)
    if family is None:
        raise ModelError(f"the architecture map has no '{kind}'; it has {', '.join(mapped_types())}")
    if not family.causal and (getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False)):
        raise ModelError(f"the architecture map has no '{kind}' that is used as a decoder (is_decoder=True)")
    if family.causal and getattr(config, "add_cross_attention", False):
        raise ModelError(f"the architecture map has no '{kind}' with cross-attention")
    if family.repeated and (config.num_hidden_groups, config.inner_group_num) != (1, 1):
        raise ModelError(
            f"the architecture map has no '{kind}' with {config.num_hidden_groups} groups of {config.inner_group_num} "
            "layers, only with one group of one layer"
        )
    return family


def mapped_types() -> list[str]:
    """Return transformers' names of the model types that the map has."""
    return sorted(kind for family in FAMILIES.values() for kind in family.model_types)


def is_mapped(model: Any) -> bool:
    """Whether the map says where a live transformers model keeps its parts, its head included."""
    try:
        head_for(family_of(model.config), type(model).__name__)
    except ModelError:
        return False
    return True


def usable_positions(config: Any) -> int:
    """Return how many tokens a model with this transformers configuration takes at once; 10**9 if it sets no limit.

    A position table can have more rows: RoBERTa counts from `pad_token_id` + 1, so that of 514 rows 512 serve. Of
    models outside the map only the table itself shows that (`autolite.unmapped.positions_of`).
    """
    rows = getattr(config, "max_position_embeddings", None) or -1
    rows = rows if rows > 0 else 10**9  # XLNet says -1
    family = family_for(config.model_type)
    return int(rows - (config.pad_token_id + 1 if family is not None and family.positions_after_padding else 0))


def head_for(family: Family, class_name: str) -> Head | None:
    """Return the head of the transformers class called `class_name`, or None for a bare model without one.

    Raises:
        ModelError: if that class has a head that the map has not.
    """
    for head in family.heads:
        if class_name.endswith(head.suffix):
            return head
    if class_name.endswith("Model") and not class_name.endswith(("HeadModel", "HeadsModel")):
        return None
    known = ", ".join(f"...{head.suffix}" for head in family.heads)
    raise ModelError(f"the architecture map has no head of {class_name}; for the {family.name} family it has {known}")
