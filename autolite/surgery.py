"""Views on the parts of a live transformers model, found by the family map, and operations that cut and share them.

Attention is cut by whole groups: a key/value head with every query head that reads it (with as many key/value heads
as query heads, a group is one head). Weights are shared by giving several layers the same projection modules; the
modules around them, with their norms and cache positions, stay one per layer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from autolite.architecture import SOURCE_LAYERS, ModelShape, shape_of
from autolite.errors import ModelError
from autolite.families import Family, family_of, head_for


@dataclass(frozen=True, eq=False)
class Matrix:
    """A weight matrix. `weight` is a view of the parameter as [out, in] (for an embedding table, [rows, width]).

    `key` is the parameter's name in `state_dict()`; a weight shared by several layers has the name in the first.
    The stored parameter is `weight` transposed where `transposed`. `rows` is the half-open range of output rows
    that `weight` covers when one parameter holds several matrices (GPT-2's query, key and value), else None.
    """

    key: str
    weight: Tensor
    bias: Tensor | None = None
    transposed: bool = False
    rows: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class Norm:
    """A LayerNorm, or an RMSNorm where `bias` is None. `weight` and `bias` are [width]."""

    key: str
    weight: Tensor
    bias: Tensor | None
    eps: float


@dataclass(frozen=True, eq=False)
class LayerParts:
    """The parts of one layer. With a fused projection, query, key and value are row ranges of `qkv`, else it is None.

    `scale` multiplies the attention scores; `window` is the sliding attention window in tokens, None for none.
    """

    index: int
    layer: nn.Module
    attention: nn.Module
    query: Matrix
    key: Matrix
    value: Matrix
    qkv: Matrix | None
    out: Matrix
    ffn_in: Matrix
    ffn_gate: Matrix | None
    ffn_out: Matrix
    attention_norm: Norm
    ffn_norm: Norm
    query_norm: Norm | None
    key_norm: Norm | None
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None

    @property
    def attention_matrices(self) -> tuple[Matrix, ...]:
        """The stored matrices of the attention block, the output projection last."""
        inputs = (self.qkv,) if self.qkv is not None else (self.query, self.key, self.value)
        return (*inputs, self.out)

    @property
    def ffn_matrices(self) -> tuple[Matrix, ...]:
        """The stored matrices of the feed-forward block, the output projection last."""
        return tuple(m for m in (self.ffn_in, self.ffn_gate, self.ffn_out) if m is not None)


@dataclass(frozen=True, eq=False)
class EmbeddingParts:
    """What turns inputs into the first hidden state. Tables are [rows, width].

    Positions of real tokens start at `position_offset`; with `positions_after_padding` padding does not count and
    takes position `position_offset - 1`. For images `patch` is the convolution as [hidden, channels * height * width]
    and `class_token` is [hidden].
    """

    word: Matrix | None
    position: Matrix | None
    token_type: Matrix | None
    norm: Norm | None
    projection: Matrix | None
    position_offset: int
    positions_after_padding: bool
    patch: Matrix | None
    class_token: Tensor | None


@dataclass(frozen=True, eq=False)
class HeadParts:
    """What turns the last hidden state into logits: `final_norm`, the position that `pooling` picks, then each
    matrix with the name of the activation after it ("" for none). `tied`: the last one is the word embedding."""

    final_norm: Norm | None
    pooling: Literal["none", "first", "last"]
    dense: tuple[tuple[Matrix, str], ...]
    tied: bool


@dataclass(frozen=True, eq=False)
class _View:
    """Finds parts by path and names each parameter by where it first occurs."""

    model: PreTrainedModel
    family: Family
    names: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: PreTrainedModel) -> _View:
        return cls(model, family_of(model.config), {id(p): name for name, p in model.named_parameters()})

    def matrix(self, root: nn.Module, path: str) -> Matrix:
        module = _part(root, path)
        weight = module.weight
        view = weight.T if _is_conv1d(module) else weight.flatten(1)
        return Matrix(self.names[id(weight)], view, getattr(module, "bias", None), _is_conv1d(module))

    def optional(self, root: nn.Module, path: str) -> Matrix | None:
        return self.matrix(root, path) if path else None

    def norm(self, root: nn.Module, path: str) -> Norm | None:
        if not path:
            return None
        module = _part(root, path)
        eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
        return Norm(self.names[id(module.weight)], module.weight, getattr(module, "bias", None), float(eps))


def _part(root: nn.Module, path: str) -> Any:
    """The module at `path`; Any, because torch types every attribute of a module as Tensor or Module."""
    return root.get_submodule(path)


def layer_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Return the layer modules in the order they run; ALBERT's one stored layer is repeated."""
    family = family_of(model.config)
    stored: list[nn.Module] = list(_part(model.base_model, family.layers))
    return stored * int(model.config.num_hidden_layers) if family.repeated else stored


def layers_of(model: PreTrainedModel) -> list[LayerParts]:
    """Return the parts of every layer, in order; tensors are views of the live parameters."""
    view = _View.of(model)
    return [_layer_parts(view, index, layer) for index, layer in enumerate(layer_modules(model))]


def _layer_parts(view: _View, index: int, layer: nn.Module) -> LayerParts:
    family = view.family
    attention = _part(layer, family.attention)
    dim = int(getattr(attention, family.head_width))
    out = view.matrix(layer, family.out)
    width = out.weight.shape[1]
    qkv = view.optional(layer, family.fused_qkv)
    if qkv is not None:
        query, key, value = (_rows(qkv, i * width, (i + 1) * width) for i in range(3))
    else:
        query, key, value = (view.matrix(layer, path) for path in (family.query, family.key, family.value))
    attention_norm, ffn_norm = view.norm(layer, family.attention_norm), view.norm(layer, family.ffn_norm)
    assert attention_norm is not None
    assert ffn_norm is not None
    window = getattr(attention, "sliding_window", None)
    if view.model.config.model_type == "mistral":  # the only one that keeps it in the configuration
        window = view.model.config.sliding_window
    return LayerParts(
        index=index,
        layer=layer,
        attention=attention,
        query=query,
        key=key,
        value=value,
        qkv=qkv,
        out=out,
        ffn_in=view.matrix(layer, family.ffn_in),
        ffn_gate=view.optional(layer, family.ffn_gate),
        ffn_out=view.matrix(layer, family.ffn_out),
        attention_norm=attention_norm,
        ffn_norm=ffn_norm,
        query_norm=view.norm(layer, family.query_norm),
        key_norm=view.norm(layer, family.key_norm),
        heads=width // dim,
        kv_heads=key.weight.shape[0] // dim,
        head_dim=dim,
        scale=float(attention.scaling),
        window=window,
    )


def _rows(matrix: Matrix, start: int, stop: int) -> Matrix:
    bias = None if matrix.bias is None else matrix.bias[start:stop]
    return Matrix(matrix.key, matrix.weight[start:stop], bias, matrix.transposed, (start, stop))


def embeddings_of(model: PreTrainedModel) -> EmbeddingParts:
    """Return the embedding tables and what follows them, up to the first layer."""
    view = _View.of(model)
    family, base, config = view.family, model.base_model, model.config
    position = None
    if family.patch:  # a bare parameter, [1, positions, hidden]
        owner, _, name = family.position.rpartition(".")
        table = getattr(_part(base, owner), name)
        position = Matrix(view.names[id(table)], table[0])
    elif family.position:
        position = view.matrix(base, family.position)
    token = base.get_parameter(family.class_token).flatten() if family.class_token else None
    return EmbeddingParts(
        word=view.optional(base, family.word),
        position=position,
        token_type=view.optional(base, family.token_type),
        norm=view.norm(base, family.embedding_norm),
        projection=view.optional(base, family.embedding_projection),
        position_offset=int(config.pad_token_id) + 1 if family.positions_after_padding else 0,
        positions_after_padding=family.positions_after_padding,
        patch=view.optional(base, family.patch),
        class_token=token,
    )


def head_of(model: PreTrainedModel) -> HeadParts:
    """Return what follows the last layer.

    Raises:
        ModelError: if the model's class has a head this version does not know.
    """
    view = _View.of(model)
    head = head_for(view.family, type(model).__name__)
    dense = tuple((view.matrix(model, path), act) for path, act in head.dense) if head else ()
    table = view.optional(model.base_model, view.family.word)
    tied = bool(dense) and table is not None and dense[-1][0].key == table.key
    return HeadParts(view.norm(model.base_model, view.family.final_norm), head.pooling if head else "none", dense, tied)


def matrices_of(model: PreTrainedModel) -> dict[str, dict[str, Matrix]]:
    """Return every stored matrix by its key, each once, a fused projection whole, in the groups that number formats
    are chosen for: "attention", "ffn", "embedding" (with ALBERT's projection) and "head" (with its pooler)."""
    layers, embeddings, head = layers_of(model), embeddings_of(model), head_of(model)
    tables = [t for t in (embeddings.word, embeddings.projection) if t is not None]
    return {
        "attention": {m.key: m for layer in layers for m in layer.attention_matrices},
        "ffn": {m.key: m for layer in layers for m in layer.ffn_matrices},
        "embedding": {m.key: m for m in tables},
        "head": {m.key: m for m, _ in head.dense},
    }


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


def _select(module: Any, index: Tensor, side: Literal["out", "in"]) -> None:
    """Keep the output rows or input columns of a Linear or Conv1D at `index`, in that order."""
    axis = int((side == "out") == _is_conv1d(module))
    weight = module.weight
    index = index.to(weight.device)
    module.weight = nn.Parameter(weight.detach().index_select(axis, index), requires_grad=weight.requires_grad)
    if side == "out" and module.bias is not None:
        bias = module.bias
        module.bias = nn.Parameter(bias.detach().index_select(0, index), requires_grad=bias.requires_grad)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    else:
        module.nx, module.nf = module.weight.shape


def _checked(indices: Iterable[int], size: int, what: str) -> Tensor:
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
    parts = layers_of(model)[layer_index]
    kept = _checked(groups, parts.kv_heads, f"attention groups of layer {layer_index}")
    dim, ratio = parts.head_dim, parts.heads // parts.kv_heads
    kv_rows = _expand(kept, dim)
    query_rows = _expand(kept, dim * ratio)
    layer = parts.layer
    if family.fused_qkv:
        width = parts.heads * dim
        _select(_part(layer, family.fused_qkv), torch.cat([query_rows + i * width for i in range(3)]), "out")
    else:
        _select(_part(layer, family.query), query_rows, "out")
        _select(_part(layer, family.key), kv_rows, "out")
        _select(_part(layer, family.value), kv_rows, "out")
    out = _part(layer, family.out)
    _select(out, query_rows, "in")
    for other in layer_modules(model):
        if _part(other, family.out) is out:
            _set_heads(family, other, len(kept) * ratio, dim)


def _expand(indices: Tensor, width: int) -> Tensor:
    return (indices[:, None] * width + torch.arange(width)).flatten()


def _set_heads(family: Family, layer: nn.Module, heads: int, dim: int) -> None:
    attention = _part(layer, family.attention)
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
    parts = layers_of(model)[layer_index]
    kept = _checked(neurons, parts.ffn_out.weight.shape[1], f"feed-forward units of layer {layer_index}")
    for path in (family.ffn_in, family.ffn_gate):
        if path:
            _select(_part(parts.layer, path), kept, "out")
    _select(_part(parts.layer, family.ffn_out), kept, "in")


def keep_layers(model: PreTrainedModel, indices: Sequence[int]) -> None:
    """Keep only these layers, in their order, and set the configuration's depth.

    Raises:
        ValueError: if `indices` is empty or names a layer that is not there.
    """
    family = family_of(model.config)
    source = shape_of(model).source_layers[0]
    kept = [int(i) for i in _checked(indices, len(source), "layers")]
    config = model.config
    types = getattr(config, "layer_types", None)
    if types is not None:
        config.layer_types = [types[i] for i in kept]
    config.num_hidden_layers = len(kept)
    if not family.repeated:
        stored = _part(model.base_model, family.layers)
        for index in sorted(set(range(len(source))) - set(kept), reverse=True):
            del stored[index]
    _number_layers(model, tuple(source[i] for i in kept))


def _number_layers(model: PreTrainedModel, source: tuple[int, ...]) -> None:
    """Give each layer its place in the cache, and keep what depends on its place in the teacher."""
    family = family_of(model.config)
    setattr(model, SOURCE_LAYERS, source)
    for index, (origin, layer) in enumerate(zip(source, layer_modules(model), strict=True)):
        attention = _part(layer, family.attention)
        if hasattr(attention, "layer_idx"):
            attention.layer_idx = index
        if getattr(attention, "scale_attn_by_inverse_layer_idx", False):
            base = attention.head_dim**-0.5 if attention.scale_attn_weights else 1.0
            attention.scaling = base / (origin + 1)


def share_layers(
    model: PreTrainedModel, attention: Sequence[int] | None = None, feed_forward: Sequence[int] | None = None
) -> None:
    """Let layers with equal numbers use the projections of the first layer with that number; norms stay per layer.

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
                ours, theirs = _part(layer, path), _part(source, path)
                if ours.weight.shape != theirs.weight.shape:
                    raise ValueError(
                        f"layers of different widths cannot share {path}: "
                        f"{tuple(ours.weight.shape)} and {tuple(theirs.weight.shape)}"
                    )
                layer.set_submodule(path, theirs)
    _store_shared_once(_part(model.base_model, family.layers))


def attention_paths(family: Family) -> tuple[str, ...]:
    """Return the paths of the attention block's matrices in a layer."""
    return tuple(p for p in (family.query, family.key, family.value, family.fused_qkv, family.out) if p)


def ffn_paths(family: Family) -> tuple[str, ...]:
    """Return the paths of the feed-forward block's matrices in a layer."""
    return tuple(p for p in (family.ffn_in, family.ffn_gate, family.ffn_out) if p)


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


def reshape(model: PreTrainedModel, shape: ModelShape) -> None:
    """Give a freshly built model (its weights may be on the meta device) exactly `shape`; what its weights are
    afterwards is undefined, so that a state dict of the compressed model can be loaded.

    Raises:
        ModelError: if the shape is of another family or cannot be cut out of this model.
    """
    family = family_of(model.config)
    (stack,) = shape.stacks
    if shape.family != family.name:
        raise ModelError(f"the manifest is of a {shape.family} model, but the configuration of a {family.name} model")
    source = shape.source_layers[0] if shape.source_layers else tuple(range(len(stack.layers)))
    try:
        origins = shape_of(model).source_layers[0]
        if len(origins) != len(stack.layers):
            keep_layers(model, [origins.index(i) for i in source])
        _number_layers(model, source)
        for index, (layer, now) in enumerate(zip(stack.layers, shape_of(model).stacks[0].layers, strict=True)):
            if layer.kv_heads * now.heads != layer.heads * now.kv_heads or layer.head_dim != now.head_dim:
                raise ValueError(f"layer {index} cannot become {layer} from {now}")
            if layer.kv_heads != layers_of(model)[index].kv_heads:
                keep_heads(model, index, range(layer.kv_heads))
            if layer.ffn != layers_of(model)[index].ffn_out.weight.shape[1]:
                keep_neurons(model, index, range(layer.ffn))
        share_layers(model, [x.attention for x in stack.layers], [x.feed_forward for x in stack.layers])
    except ValueError as error:
        raise ModelError(f"the manifest does not fit the configuration: {error}") from None


def clone(model: PreTrainedModel) -> PreTrainedModel:
    """Return a deep copy, without gradients, in which shared weights are shared again."""
    twin: PreTrainedModel = copy.deepcopy(model)
    twin.zero_grad(set_to_none=True)
    return twin
