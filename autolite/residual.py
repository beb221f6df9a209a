"""Cutting the residual stream: the channels that run through all layers of a live transformers model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from autolite.delta import Delta
from autolite.factored import FactoredEmbedding, TiedHead
from autolite.families import family_of, head_for
from autolite.parts import layer_modules, part
from autolite.surgery import checked, note_sizes
from autolite.unmapped import is_conv1d


def keep_hidden(model: PreTrainedModel, channels: Sequence[int], inner: Sequence[int] | None = None) -> None:
    """Keep only these channels of the residual stream: in the embedding, every matrix that reads or writes it, every
    norm, and the head. Norms then take their statistics over the channels that are left.

    A head with a matrix of its own (BERT's pooler) keeps as many of that matrix's outputs: those at `inner`, by
    default at `channels`. The configuration keeps the original's width, which heads get theirs from.

    Raises:
        ValueError: if `channels` is empty or names a channel that is not there, or `inner` has another length.
    """
    family, base = family_of(model.config), model.base_model
    layers = layer_modules(model)
    kept = checked(channels, part(layers[0], family.attention_norm).weight.shape[0], "hidden channels")
    outputs = kept if inner is None else checked(inner, len(_dense(model)[0].weight), "outputs of the head's matrix")
    if len(outputs) != len(kept):
        raise ValueError(f"the head's matrix must keep {len(kept)} outputs, as the hidden state, not {len(outputs)}")
    cut = _Cut()
    for layer in layers:
        for path in (family.query, family.key, family.value, family.fused_qkv, family.ffn_in, family.ffn_gate):
            if path:
                cut.inputs(part(layer, path), kept)
        for path in (family.out, family.ffn_out, family.attention_norm, family.ffn_norm):
            cut.outputs(part(layer, path), kept)
    for path in (family.final_norm, family.patch, family.embedding_projection):
        if path:
            cut.outputs(part(base, path), kept)
    if family.patch:
        owner, _, name = family.position.rpartition(".")
        cut.parameter(part(base, owner), name, 2, kept)
        owner, _, name = family.class_token.rpartition(".")
        cut.parameter(part(base, owner), name, 2, kept)
    elif not family.embedding_projection:
        for path in (family.word, family.position, family.token_type):
            if path and isinstance(table := part(base, path), FactoredEmbedding):
                cut.outputs(table.projection, kept)
            elif path:
                cut.parameter(table, "weight", 1, kept)
        if family.embedding_norm:
            cut.outputs(part(base, family.embedding_norm), kept)
    dense = _dense(model)
    for index, module in enumerate(dense):
        cut.inputs(module, kept if index == 0 else outputs)
        if index < len(dense) - 1 or not head_for(family, type(model).__name__):
            cut.outputs(module, outputs)


def _dense(model: PreTrainedModel) -> list[Any]:
    """The matrices between the last layer and the logits; of a bare model, the pooler that it may have."""
    family = family_of(model.config)
    head = head_for(family, type(model).__name__)
    if head is not None:
        return [part(model, path) for path, _ in head.dense]
    modules = dict(model.named_modules())
    return [m for m in (modules.get("pooler.dense"), modules.get("pooler")) if isinstance(m, nn.Linear)]


class _Cut:
    """Cuts parameters along their axes, each once, so that what is tied or shared stays so."""

    def __init__(self) -> None:
        self.new: dict[tuple[int, int], nn.Parameter] = {}
        self.done: set[tuple[int, int]] = set()
        self.old: list[nn.Parameter] = []  # kept alive, so that no new one gets the identity of an old one

    def outputs(self, module: Any, kept: Tensor) -> None:
        """Cut the outputs of a matrix or convolution, or the channels of a norm."""
        if isinstance(module, Delta):
            self.outputs(module.up, kept)
            module = module.base
        self.parameter(module, "weight", int(is_conv1d(module)), kept)
        if getattr(module, "bias", None) is not None:
            self.parameter(module, "bias", 0, kept)

    def inputs(self, module: Any, kept: Tensor) -> None:
        """Cut the inputs of a matrix; a head that is tied to a table of two factors is cut with that."""
        if isinstance(module, TiedHead):
            return
        if isinstance(module, Delta):
            self.inputs(module.down, kept)
            module = module.base
        self.parameter(module, "weight", int(not is_conv1d(module)), kept)

    def parameter(self, module: Any, name: str, axis: int, kept: Tensor) -> None:
        old = getattr(module, name)
        if (id(old), axis) in self.done:
            return
        if (id(old), axis) not in self.new:
            self.old.append(old)
            values = old.detach().index_select(axis, kept.to(old.device))
            new = self.new[id(old), axis] = nn.Parameter(values, requires_grad=old.requires_grad)
            self.done |= {(id(new), axis)} | {(id(new), other) for known, other in self.done if known == id(old)}
        setattr(module, name, self.new[id(old), axis])
        note_sizes(module)
