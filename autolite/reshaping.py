"""Giving a freshly built transformers model the shape that a manifest describes."""

from __future__ import annotations

from transformers import PreTrainedModel

from autolite.architecture import ModelShape, shape_of
from autolite.errors import ModelError
from autolite.families import family_for, family_of, head_for
from autolite.parts import part
from autolite.residual import keep_hidden
from autolite.surgery import (
    add_deltas,
    factor_embedding,
    keep_heads,
    keep_layers,
    keep_neurons,
    number_layers,
    share_layers,
)


def reshape(model: PreTrainedModel, shape: ModelShape) -> None:
    """Give a freshly built model (its weights may be on the meta device) exactly `shape`; what its weights are
    afterwards is undefined, so that a state dict of the compressed model can be loaded.

    Raises:
        ModelError: if the shape is of another family or cannot be cut out of this model.
    """
    kind = str(model.config.model_type)
    known = family_for(kind)
    named = kind if known is None or shape.unmapped is not None else known.name
    if shape.family != named:
        raise ModelError(f"the manifest is of a {shape.family} model, but the configuration of a {named} model")
    if shape.unmapped is not None:
        return  # nothing is ever cut out of a model without a map
    head_for(family_of(model.config), type(model).__name__)
    (stack,) = shape.stacks
    source = shape.source_layers[0] if shape.source_layers else tuple(range(len(stack.layers)))
    try:
        origins = shape_of(model).source_layers[0]
        if len(origins) != len(stack.layers):
            keep_layers(model, [origins.index(i) for i in source])
        number_layers(model, source)
        if stack.hidden != shape_of(model).stacks[0].hidden:
            keep_hidden(model, range(stack.hidden))
        for index, (layer, now) in enumerate(zip(stack.layers, shape_of(model).stacks[0].layers, strict=True)):
            if layer.kv_heads * now.heads != layer.heads * now.kv_heads or layer.head_dim != now.head_dim:
                raise ValueError(f"layer {index} cannot become {layer} from {now}")
            if layer.kv_heads != now.kv_heads and now.attention == index:  # else cut with the layer it shares with
                keep_heads(model, index, range(layer.kv_heads))
            if layer.ffn != now.ffn and now.feed_forward == index:
                keep_neurons(model, index, range(layer.ffn))
        share_layers(model, [x.attention for x in stack.layers], [x.feed_forward for x in stack.layers])
        add_deltas(model, stack.layers)
        _reshape_table(model, shape)
        if (found := shape_of(model).stacks) != shape.without_formats().stacks:
            raise ValueError(f"the nearest to {shape.stacks} is {found}")
    except ValueError as error:
        raise ModelError(f"the manifest does not fit the configuration: {error}") from None


def _reshape_table(model: PreTrainedModel, shape: ModelShape) -> None:
    found = shape_of(model)
    if shape.embedding_rank and not found.embedding_rank:
        weight = part(model.base_model, family_of(model.config).word).weight
        table = weight.detach().new_zeros(found.vocab, shape.embedding_rank)
        projection = weight.detach().new_zeros(shape.embedding_rank, found.embedding)
        factor_embedding(model, table, projection, shape.tied)
    ours, theirs = ((s.vocab, s.embedding, s.embedding_rank) for s in (shape_of(model), shape))
    if ours != theirs:
        raise ValueError(f"the nearest to a table of (tokens, width, rank) {theirs} is {ours}")
