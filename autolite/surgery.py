"""Operations that cut and share the parts of a live transformers model.

Attention is cut by whole groups: a key/value head with every query head that reads it (with as many key/value heads
as query heads, a group is one head). Weights are shared by giving several layers the same projection modules; the
modules around them, with their norms and cache positions, stay one per layer. The views are those of `autolite.parts`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from autolite.architecture import SOURCE_LAYERS, LayerShape, shape_of
from autolite.delta import Delta, base_of
from autolite.factored import FactoredEmbedding, TiedHead
from autolite.families import Family, family_of, head_for
from autolite.parts import attention_paths, ffn_paths, layer_modules, layer_of, part
from autolite.unmapped import is_conv1d


def _select(module: Any, index: Tensor, side: Literal["out", "in"]) -> None:
    """Keep the output rows or input columns of a Linear or Conv1D at `index`, in that order."""
    axis = int((side == "out") == is_conv1d(module))
    weight = module.weight
    index = index.to(weight.device)
    module.weight = nn.Parameter(weight.detach().index_select(axis, index), requires_grad=weight.requires_grad)
    if side == "out" and module.bias is not None:
        bias = module.bias
        module.bias = nn.Parameter(bias.detach().index_select(0, index), requires_grad=bias.requires_grad)
    note_sizes(module)


def _cut(model: PreTrainedModel, layer: nn.Module, path: str, index: Tensor, side: Literal["out", "in"]) -> None:
    """As `_select`, with the factors of every layer that shares the projection at `path` of `layer`."""
    base = base_of(part(layer, path))
    for other in layer_modules(model):
        module = part(other, path)
        if isinstance(module, Delta) and module.base is base:
            _select(module.up if side == "out" else module.down, index, side)
    _select(base, index, side)


def checked(indices: Iterable[int], size: int, what: str) -> Tensor:
    """Return the indices to keep, ascending and each once.

    Raises:
        ValueError: if there are none, or one is outside 0..size - 1; `what` says of what.
    """
    kept = sorted(set(indices))
    if not kept or kept[0] < 0 or kept[-1] >= size:
        raise ValueError(f"{what} to keep must be a non-empty part of 0..{size - 1}, got {kept}")
    return torch.tensor(kept)


def keep_heads(model: PreTrainedModel, layer_index: int, groups: Sequence[int]) -> None:
    """Keep only these attention groups of a layer: a key/value head with the query heads that read it.

    Layers that share the projections are cut with it, once.

    Raises:
        ValueError: if `groups` is empty or names a group that is not there.
    """
    family = family_of(model.config)
    parts = layer_of(model, layer_index)
    kept = checked(groups, parts.kv_heads, f"attention groups of layer {layer_index}")
    dim, ratio = parts.head_dim, parts.heads // parts.kv_heads
    kv_rows = _expand(kept, dim)
    query_rows = _expand(kept, dim * ratio)
    layer = parts.layer
    if family.fused_qkv:
        width = parts.heads * dim
        _cut(model, layer, family.fused_qkv, torch.cat([query_rows + i * width for i in range(3)]), "out")
    else:
        _cut(model, layer, family.query, query_rows, "out")
        _cut(model, layer, family.key, kv_rows, "out")
        _cut(model, layer, family.value, kv_rows, "out")
    _cut(model, layer, family.out, query_rows, "in")
    out = base_of(part(layer, family.out))
    for other in layer_modules(model):
        if base_of(part(other, family.out)) is out:
            _set_heads(family, other, len(kept) * ratio, dim)


def note_sizes(module: Any) -> None:
    """Let a module say the sizes that its weight has."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.Conv2d):
        module.out_channels = module.weight.shape[0]
    elif is_conv1d(module):
        module.nx, module.nf = module.weight.shape


def _expand(indices: Tensor, width: int) -> Tensor:
    return (indices[:, None] * width + torch.arange(width)).flatten()


def _set_heads(family: Family, layer: nn.Module, heads: int, dim: int) -> None:
    attention = part(layer, family.attention)
    if family.head_count:
        setattr(attention, family.head_count, heads)
    if family.query_width:
        setattr(attention, family.query_width, heads * dim)


def keep_neurons(model: PreTrainedModel, layer_index: int, neurons: Sequence[int]) -> None:
    """Keep only these inner units of a layer's feed-forward block; layers that share it are cut with it, once.

    Raises:
        ValueError: if `neurons` is empty or names a unit that is not there.
    """
    family = family_of(model.config)
    parts = layer_of(model, layer_index)
    kept = checked(neurons, parts.ffn_out.weight.shape[1], f"feed-forward units of layer {layer_index}")
    for path in (family.ffn_in, family.ffn_gate):
        if path:
            _cut(model, parts.layer, path, kept, "out")
    _cut(model, parts.layer, family.ffn_out, kept, "in")


def keep_layers(model: PreTrainedModel, indices: Sequence[int]) -> None:
    """Keep only these layers, in their order, and set the configuration's depth.

    Raises:
        ValueError: if `indices` is empty or names a layer that is not there.
    """
    family = family_of(model.config)
    source = shape_of(model).source_layers[0]
    kept = [int(i) for i in checked(indices, len(source), "layers")]
    config = model.config
    types = getattr(config, "layer_types", None)
    if types is not None:
        config.layer_types = [types[i] for i in kept]
    config.num_hidden_layers = len(kept)
    if not family.repeated:
        stored = part(model.base_model, family.layers)
        for index in sorted(set(range(len(source))) - set(kept), reverse=True):
            del stored[index]
    number_layers(model, tuple(source[i] for i in kept))


def number_layers(model: PreTrainedModel, source: tuple[int, ...]) -> None:
    """Give each layer its place in the cache, and keep what depends on its place in the teacher."""
    family = family_of(model.config)
    setattr(model, SOURCE_LAYERS, source)
    for index, (origin, layer) in enumerate(zip(source, layer_modules(model), strict=True)):
        attention = part(layer, family.attention)
        if hasattr(attention, "layer_idx"):
            attention.layer_idx = index
        if getattr(attention, "scale_attn_by_inverse_layer_idx", False):
            base = attention.head_dim**-0.5 if attention.scale_attn_weights else 1.0
            attention.scaling = base / (origin + 1)


def share_layers(
    model: PreTrainedModel, attention: Sequence[int] | None = None, feed_forward: Sequence[int] | None = None
) -> None:
    """Let layers with equal numbers use the projections of the first layer with that number; norms stay per layer, and
    so do low-rank differences that layers have already.

    `attention` and `feed_forward` hold one number a layer, as in LayerShape; None leaves that block alone.

    Raises:
        ValueError: if layers of different widths would share, or the length is not the number of layers.
    """
    family = family_of(model.config)
    layers = layer_modules(model)
    for numbers, paths in ((attention, attention_paths(family)), (feed_forward, ffn_paths(family))):
        if numbers is None:
            continue
        first: dict[int, nn.Module] = {}
        for number, layer in zip(numbers, layers, strict=True):
            source = first.setdefault(number, layer)
            for path in paths:
                ours, theirs = part(layer, path), part(source, path)
                if ours.weight.shape != theirs.weight.shape:
                    raise ValueError(
                        f"layers of different widths cannot share {path}: "
                        f"{tuple(ours.weight.shape)} and {tuple(theirs.weight.shape)}"
                    )
                if isinstance(ours, Delta):
                    ours.base = base_of(theirs)
                else:
                    layer.set_submodule(path, base_of(theirs))
    _store_shared_once(part(model.base_model, family.layers))


def add_deltas(model: PreTrainedModel, layers: Sequence[LayerShape]) -> None:
    """Give the blocks of each layer that has a rank in `layers` and no low-rank differences yet such, of zeros."""
    family = family_of(model.config)
    for module, layer in zip(layer_modules(model), layers, strict=True):
        blocks = ((layer.attention_rank, attention_paths(family)), (layer.ffn_rank, ffn_paths(family)))
        for path, rank in ((path, rank) for rank, paths in blocks if rank for path in paths):
            if not isinstance(part(module, path), Delta):
                module.set_submodule(path, Delta(part(module, path), rank))


def factor_embedding(model: PreTrainedModel, table: Tensor, projection: Tensor, tied: bool) -> None:
    """Put the product of `table` [tokens, rank] and `projection` [rank, width] in the place of the word embedding, and,
    if the head is `tied` to that, of the head."""
    family, base, loose = family_of(model.config), model.base_model, cast("Any", model)
    words, head = part(base, family.word), head_for(family, type(model).__name__)
    new = FactoredEmbedding(table, projection.T.contiguous(), words.padding_idx)
    if tied and head is not None:
        model.set_submodule(head.dense[-1][0], TiedHead(new))
        loose._tied_weights_keys, loose.all_tied_weights_keys = None, {}  # else transformers ties a parameter to it
    base.set_submodule(family.word, new)


def keep_tokens(model: PreTrainedModel, tokens: Sequence[int]) -> None:
    """Keep only these rows of the word embedding, in this order; the configurations' ids of special tokens follow.

    Raises:
        ValueError: if a special token would go, padding is counted from and would move, or the head is tied to the
            table.
    """
    family, base, config = family_of(model.config), model.base_model, model.config
    words, head = part(base, family.word), head_for(family, type(model).__name__)
    if head is not None and part(model, head.dense[-1][0]).weight is words.weight:
        raise ValueError("the tokens of a head that is tied to its embedding are what the model predicts")
    table, new = getattr(words, "table", words), {old: i for i, old in enumerate(tokens)}
    pad = config.pad_token_id
    if family.positions_after_padding and new.get(pad) != pad:
        raise ValueError(f"positions are counted from the id of padding, {pad}, which must stay what it is")
    weight = table.weight
    index = torch.tensor(list(tokens), device=weight.device)
    table.weight = nn.Parameter(weight.detach().index_select(0, index), requires_grad=weight.requires_grad)
    table.num_embeddings, table.padding_idx = len(tokens), new.get(table.padding_idx)
    for settings in (config, getattr(model, "generation_config", None)):
        for name, value in settings.to_dict().items() if settings is not None else ():
            if name.endswith("_token_id") and value is not None:
                setattr(settings, name, _renumbered(value, new, len(weight), name))
    config.vocab_size = len(tokens)
    loose: tuple[Any, ...] = (model, base)
    for module in loose:
        if hasattr(module, "vocab_size"):
            module.vocab_size = len(tokens)


def _renumbered(value: int | list[int], new: dict[int, int], rows: int, name: str) -> Any:
    if isinstance(value, list):
        return [_renumbered(i, new, rows, name) for i in value]
    if not 0 <= value < rows:
        return None  # an id that the table never had
    if value not in new:
        raise ValueError(f"{name} {value} is not among the tokens to keep")
    return new[value]


def _shared_names(layers: nn.Module) -> set[str]:
    """Return the names under which parameters of `layers` occur again."""
    first = {id(parameter): name for name, parameter in layers.named_parameters()}
    every = layers.named_parameters(remove_duplicate=False)
    return {name for name, parameter in every if first[id(parameter)] != name}


def _drop_shared(layers: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in _shared_names(layers):
        state.pop(prefix + name, None)


def _expect_shared(layers: nn.Module, keys: Any) -> None:
    """What `_drop_shared` left out is not missing."""
    again = _shared_names(layers)
    keys.missing_keys[:] = [
        key for key in keys.missing_keys if not any(key == name or key.endswith(f".{name}") for name in again)
    ]


def _store_shared_once(layers: Any) -> None:
    """Let `state_dict()` name each shared parameter once.

    transformers takes every other name for a missing weight when loading, and declaring it as tied would do harm:
    `tie_weights` cuts the bias of a tied Conv1D to the length of its input.
    """
    if _drop_shared not in layers._state_dict_hooks.values():
        layers.register_state_dict_post_hook(_drop_shared)
        layers.register_load_state_dict_post_hook(_expect_shared)


def moved(model: PreTrainedModel, device: str) -> PreTrainedModel:
    """Return the model itself if it is on that device, else a copy that is."""
    if model.device == torch.device(device):
        return model
    twin: Any = clone(model)
    found: PreTrainedModel = twin.to(device)
    return found


def clone(model: PreTrainedModel) -> PreTrainedModel:
    """Return a deep copy, without gradients, in which shared weights are shared again."""
    twin: PreTrainedModel = copy.deepcopy(model)
    twin.zero_grad(set_to_none=True)
    return twin
