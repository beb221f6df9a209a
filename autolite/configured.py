"""The shape of a model of which there is only a configuration: no weights are made."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from autolite.architecture import CrossAttention, LayerShape, ModelShape, Stack, shape_of
from autolite.errors import ModelError, first_line, unknown
from autolite.families import ENCODER_DECODER, family_of, mapped_types

# Transformers with two stacks whose configurations call their sizes as BART's does.
ENCODER_DECODERS = ("bart", "blenderbot", "m2m_100", "marian", "mbart", "pegasus")


def shape_of_config(fields: Mapping[str, Any], checked: Collection[str] = ()) -> ModelShape:
    """Return the shape of the model that a transformers configuration describes: encoders with the head of a
    classifier, decoders with that of a language model. What it does not say is as transformers has it by default.

    Args:
        fields: of the configuration, `model_type` among them.
        checked: those that it has to know; others may be remarks, of which files are full.

    Raises:
        ModelError: if there is no such type or field, or the sizes do not fit together.
    """
    kind, kinds = str(fields.get("model_type", "")), sorted({*mapped_types(), *ENCODER_DECODERS})
    if not kind:
        raise ModelError(f"it has no model_type; known are {', '.join(kinds)}")
    if kind not in kinds:
        raise ModelError(unknown("model_type", kind, kinds))
    from transformers import AutoConfig

    sizes = {name: value for name, value in fields.items() if name != "model_type"}
    default = AutoConfig.for_model(kind)
    known = {"model_type", "num_labels", *default.to_dict(), *default.attribute_map}
    if missing := sorted(set(checked) - known):
        raise ModelError(unknown(f"field of {kind}", missing[0], known))
    try:
        config = AutoConfig.for_model(kind, **sizes)
        return _two_stacks(config) if kind in ENCODER_DECODERS else shape_of(_without_weights(config))
    except ModelError:
        raise
    except Exception as error:  # of whatever kind, as transformers and torch have them
        raise ModelError(f"no {kind} can be made of these fields: {first_line(error)}") from None


def _without_weights(config: Any) -> Any:
    """A model on the device of tensors that have sizes alone."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageClassification,
        AutoModelForSequenceClassification,
    )

    family = family_of(config)
    builder: Any = AutoModelForCausalLM if family.causal else AutoModelForSequenceClassification
    if family.patch:
        builder = AutoModelForImageClassification
    with torch.device("meta"):
        return builder.from_config(config)


def _two_stacks(config: Any) -> ModelShape:
    hidden = int(config.d_model)
    stacks = []
    for name in ("encoder", "decoder"):
        depth, heads, ffn = (
            int(getattr(config, f"{name}_{what}")) for what in ("layers", "attention_heads", "ffn_dim")
        )
        if min(depth, heads, ffn) < 1 or hidden % heads:
            raise ModelError(f"an {name} of {depth} layers, width {hidden}, {heads} heads and {ffn} neurons cannot be")
        cross = CrossAttention(heads, hidden // heads) if name == "decoder" else None
        layers = tuple(LayerShape(heads, heads, hidden // heads, ffn, i, i, cross=cross) for i in range(depth))
        stacks.append(Stack(name, hidden, layers, causal=name == "decoder"))
    vocab = int(config.vocab_size)
    tied = bool(getattr(config, "tie_word_embeddings", True))
    return ModelShape(ENCODER_DECODER.name, tuple(stacks), vocab, hidden, 0, vocab, tied=tied)
