"""Tiny random models for tests: ours, and those of plug-in authors. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from autolite.errors import unknown
from autolite.families import FAMILIES
from autolite.tasks.base import Batch, Split
from autolite.tasks.text_classification import TextClassification

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VOCAB = 96
PAD = 1  # RoBERTa counts positions from here


def tiny_model(
    family: str, task: str = "text-classification", seed: int = 0, layers: int = 3, **config: Any
) -> PreTrainedModel:
    """Return a small random model of `family` in evaluation mode: hidden width 32, 4 heads, feed-forward width 64.

    Weights are large enough for attention, gates and biases to matter in the output. Llama and Qwen have two
    key/value heads, and ALBERT an embedding of width 16. `vit` classifies images, whatever the task.

    Args:
        family: a name in `autolite.families.FAMILIES`, or transformers' type of any other text model; `config` may
            have to give it the sizes that it calls by names of its own.
        task: "text-classification" (three labels) or "language-modeling".
        seed: equal seeds give equal weights.
        layers: number of layers.
        config: further settings of the transformers configuration.

    Raises:
        ValueError: if there is no such family or task, or transformers has no such head for the family.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification
    from transformers import AutoModelForSequenceClassification as Classifier
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    known = FAMILIES.get(family)
    if known is None and family not in CONFIG_MAPPING:
        raise ValueError(unknown("family", family, FAMILIES))
    builders = {"text-classification": Classifier, "language-modeling": AutoModelForCausalLM}
    if task not in builders:
        raise ValueError(unknown("task", task, builders))
    sizes: dict[str, Any] = {
        "num_hidden_layers": layers,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
        "pad_token_id": PAD,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "num_labels": 3,
    }
    special: dict[str, dict[str, Any]] = {
        "distilbert": {"hidden_dim": 64},
        "albert": {"intermediate_size": 64, "embedding_size": 16},
        "gpt2": {"n_inner": 64},
        "vit": {"intermediate_size": 64, "image_size": 16, "patch_size": 4},
        **{name: {"intermediate_size": 64, "num_key_value_heads": 2} for name in ("llama", "qwen2", "qwen3")},
    }
    sizes |= special.get(family, {"intermediate_size": 64})
    if family == "qwen3":
        sizes["head_dim"] = 8
    if family == "vit":
        sizes = {k: v for k, v in sizes.items() if not k.endswith("token_id") and "vocab" not in k and "max_" not in k}
    settings = AutoConfig.for_model(known.model_types[0] if known else family, **(sizes | config))
    builder: Any = AutoModelForImageClassification if family == "vit" else builders[task]
    model: PreTrainedModel = builder.from_config(settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                is_norm = name.endswith("weight")
                parameter.copy_((1.0 if is_norm else 0.0) + 0.2 * noise)
            else:
                fan_in = parameter.shape[0] if known and known.transposed else parameter[0].numel()
                parameter.copy_(noise * (1.5 / fan_in**0.5))
    model.train(False)
    return model


def tiny_inputs(model: PreTrainedModel, batch: int = 3, tokens: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return inputs for `tiny_model`: sequences of different lengths, padded on the right (images for `vit`)."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    if model.config.model_type == "vit":
        side = model.config.image_size
        return {"pixel_values": torch.randn(batch, model.config.num_channels, side, side, generator=generator)}
    ids = torch.randint(4, model.config.vocab_size, (batch, tokens), generator=generator)
    lengths = torch.linspace(tokens, max(2, tokens // 2), batch).long()
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    return {"input_ids": torch.where(mask.bool(), ids, PAD), "attention_mask": mask}


def tiny_tokenizer(words: Iterable[str] = ()) -> PreTrainedTokenizerBase:
    """Return a tokenizer of `VOCAB` lower-case words for `tiny_model`: `words` first, then "w0", "w1" and so on.

    A text becomes [CLS] words [SEP], a pair [CLS] words [SEP] words [SEP] with token types.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[UNK]", "[PAD]", "[CLS]", "[SEP]"]  # 1 is PAD
    chosen = list(dict.fromkeys(word.lower() for word in words))
    every = (special + chosen + [f"w{i}" for i in range(VOCAB)])[:VOCAB]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(every)}, unk_token="[UNK]"))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast: Any = PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerBase = fast(
        tokenizer_object=raw,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    return tokenizer


class TinyImages(TextClassification):
    """Classification of the images that `tiny_model("vit")` takes: float32 [channels, side, side] in the place of ids.

    It cannot load data: for tests of techniques, which only see batches.
    """

    name = "tiny-images"
    auto_class = "AutoModelForImageClassification"
    pipeline_tag = "image-classification"

    def batches(self, split: Split, size: int, pad_id: int) -> Iterator[Batch]:
        """Yield the images in order, `size` at a time."""
        for start in range(0, len(split), size):
            chosen = np.arange(start, min(start + size, len(split)))
            images = np.stack(split.take(chosen).input_ids)
            yield Batch({"pixel_values": images}, split.labels[chosen], chosen)
