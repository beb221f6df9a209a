"""What a model's attention works on, recorded while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RECORDED = "autolite-recorded"  # the name in transformers' registry of attention functions


@dataclass(frozen=True, eq=False)
class Attention:
    """One layer's attention: `query` [batch, heads, tokens, dim], `key` and `value` [batch, kv_heads, tokens, dim] with
    their rotations and norms, and the bool `allowed`, true where a query may look at a key, [batch or 1, 1, tokens,
    tokens]. The scores are query key^T times the layer's `scale` (`autolite.parts`)."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    allowed: torch.Tensor


_record: ContextVar[list[Attention]] = ContextVar("attention of the layers run so far")


def _attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **settings: Any) -> Any:
    tokens = query.shape[2]
    if attention_mask is None:
        everything = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=query.device)
        allowed = everything.tril() if module.is_causal else everything
    else:
        allowed = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
    _record.get().append(Attention(query, key, value, allowed))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)


AttentionInterface.register(RECORDED, _attend)
AttentionMaskInterface.register(RECORDED, sdpa_mask)


@contextmanager
def recorded(model: PreTrainedModel) -> Iterator[list[Attention]]:
    """Collect the attention of every layer in the order they run, while the model is run once.

    Works for the families of the architecture map: all of them pass their attention through transformers' registry.
    """
    before = model.config._attn_implementation
    token = _record.set([])
    model.config._attn_implementation = RECORDED
    try:
        yield _record.get()
    finally:
        model.config._attn_implementation = before
        _record.reset(token)
