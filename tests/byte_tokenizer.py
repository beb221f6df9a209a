"""A tokenizer whose tokens are bytes, with a chat template or without."""

from __future__ import annotations

from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def byte_tokenizer(template: str | None = None) -> Any:
    """One token for each byte and one that ends a text: characters of several bytes are several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate([*alphabet, "<end>"])}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast: Any = transformers.PreTrainedTokenizerFast
    made = fast(tokenizer_object=core, eos_token="<end>", pad_token="<end>", model_max_length=128)
    made.chat_template = template
    return made
