"""What onnxruntime-genai reads beside a language model's ONNX file: `genai_config.json`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autolite.architecture import ModelShape
from autolite.families import usable_positions
from autolite.runtime.sequences import BEFORE, PRESENT

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE = "genai_config.json"


def genai_config(model: PreTrainedModel, shape: ModelShape, artifact: str) -> dict[str, Any]:
    """Return the configuration of a decoder with a key/value cache, greedy unless its user says otherwise.

    Source: the configuration reference of onnxruntime-genai (0.18). Its types differ in which inputs a graph takes;
    ours takes those of "llama", whatever the family.

    Args:
        model: says how long its texts may be, and which tokens begin, end and pad them.
        shape: of its one stack of layers. Heads may differ from layer to layer: what caches are made of is read off the
            graph's inputs.
        artifact: the name of the ONNX file in the same folder.
    """
    layers, most = shape.stacks[-1].layers, usable_positions(model.config)
    settings = getattr(model, "generation_config", None) or model.config
    ends = getattr(settings, "eos_token_id", None)
    pad = getattr(settings, "pad_token_id", None)
    if pad is None:
        pad = next(iter(ends if isinstance(ends, list) else [ends]), None)
    special = {"bos_token_id": getattr(settings, "bos_token_id", None), "eos_token_id": ends, "pad_token_id": pad}
    decoder = {
        "session_options": {"provider_options": []},
        "filename": artifact,
        "head_size": layers[0].head_dim,
        "hidden_size": shape.stacks[-1].hidden,
        "num_attention_heads": layers[0].heads,
        "num_hidden_layers": len(layers),
        "num_key_value_heads": layers[0].kv_heads,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": f"{BEFORE}%d.key",
            "past_value_names": f"{BEFORE}%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": f"{PRESENT}%d.key",
            "present_value_names": f"{PRESENT}%d.value",
        },
    }
    return {
        "model": {
            "type": "llama",
            **{name: token for name, token in special.items() if token is not None},
            "context_length": most,
            "vocab_size": shape.vocab,
            "decoder": decoder,
        },
        "search": {"do_sample": False, "max_length": most, "past_present_share_buffer": False},
    }
