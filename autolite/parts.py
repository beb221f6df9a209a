"""Views on the parts of a live transformers model, found by the family map."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from autolite.delta import Delta
from autolite.factored import FactoredEmbedding
from autolite.families import Family, family_of, head_for, is_mapped
from autolite.unmapped import is_conv1d, look


@dataclass(frozen=True, eq=False)
class Matrix:
    """A weight matrix. `weight` is a view of the parameter as [out, in] (for an embedding table, [rows, width]).

    `key` is the parameter's name in `state_dict()`; a weight shared by several layers has the name in the first.
    The stored parameter is `weight` transposed where `transposed`. `rows` is the half-open range of output rows
    that `weight` covers when one parameter holds several matrices (GPT-2's query, key and value), else None. `delta`
    are the factors (down [rank, in], up [out, rank]) of what the layer adds to a matrix that it shares, if it does:
    it multiplies with `weight` + up down, and its bias is `bias` + that of up. `factor` says that the matrix is one of
    those two, or the thin factor of an embedding table.
    """

    key: str
    weight: Tensor
    bias: Tensor | None = None
    transposed: bool = False
    rows: tuple[int, int] | None = None
    delta: tuple[Matrix, Matrix] | None = None
    factor: bool = False


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
    def attention_readers(self) -> tuple[Matrix, ...]:
        """What reads the residual stream in the attention block."""
        return (self.query, self.key, self.value)

    @property
    def ffn_readers(self) -> tuple[Matrix, ...]:
        """What reads the residual stream in the feed-forward block."""
        return tuple(m for m in (self.ffn_in, self.ffn_gate) if m is not None)

    @property
    def attention_matrices(self) -> tuple[Matrix, ...]:
        """The stored matrices of the attention block, the output projection last; factors are in their `delta`."""
        inputs = (self.qkv,) if self.qkv is not None else self.attention_readers
        return (*inputs, self.out)

    @property
    def ffn_matrices(self) -> tuple[Matrix, ...]:
        """The stored matrices of the feed-forward block, the output projection last; factors are in their `delta`."""
        return (*self.ffn_readers, self.ffn_out)


@dataclass(frozen=True, eq=False)
class EmbeddingParts:
    """What turns inputs into the first hidden state. Tables are [rows, width].

    Positions of real tokens start at `position_offset`; with `positions_after_padding` padding does not count and
    takes position `position_offset - 1`. `factor` is the [width, rank] that follows a `word` table [tokens, rank],
    before anything is added. For images `patch` is the convolution as [hidden, channels * height * width] and
    `class_token` is [hidden].
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
    factor: Matrix | None = None


@dataclass(frozen=True, eq=False)
class HeadParts:
    """What turns the last hidden state into logits: `final_norm`, the position that `pooling` picks, then each
    matrix with the name of the activation after it ("" for none). `tied`: the last one is the word embedding; if that
    has two factors the state is multiplied with the transposed `factor` [width, rank] before."""

    final_norm: Norm | None
    pooling: Literal["none", "first", "last"]
    dense: tuple[tuple[Matrix, str], ...]
    tied: bool
    factor: Matrix | None = None


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
        module = part(root, path)
        delta = None
        if isinstance(module, Delta):
            down, up = (
                Matrix(self.names[id(m.weight)], m.weight, m.bias, factor=True) for m in (module.down, module.up)
            )
            delta, module = (down, up), module.base
        weight = module.weight
        view = weight.T if is_conv1d(module) else weight.flatten(1)
        return Matrix(self.names[id(weight)], view, getattr(module, "bias", None), is_conv1d(module), delta=delta)

    def optional(self, root: nn.Module, path: str) -> Matrix | None:
        return self.matrix(root, path) if path else None

    def factor(self) -> Matrix | None:
        """The second factor of the word embedding, if it has one."""
        words = part(self.model.base_model, self.family.word) if self.family.word else None
        if not isinstance(words, FactoredEmbedding):
            return None
        weight = words.projection.weight
        return Matrix(self.names[id(weight)], weight, factor=True)

    def norm(self, root: nn.Module, path: str) -> Norm | None:
        if not path:
            return None
        module = part(root, path)
        eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
        return Norm(self.names[id(module.weight)], module.weight, getattr(module, "bias", None), float(eps))


def part(root: nn.Module, path: str) -> Any:
    """Return the module at `path`; Any, because torch types every attribute of a module as Tensor or Module."""
    return root.get_submodule(path)


def layer_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Return the layer modules in the order they run; ALBERT's one stored layer is repeated."""
    family = family_of(model.config)
    stored: list[nn.Module] = list(part(model.base_model, family.layers))
    return stored * int(model.config.num_hidden_layers) if family.repeated else stored


def layers_of(model: PreTrainedModel) -> list[LayerParts]:
    """Return the parts of every layer, in order; tensors are views of the live parameters."""
    view = _View.of(model)
    return [_layer_parts(view, index, layer) for index, layer in enumerate(layer_modules(model))]


def layer_of(model: PreTrainedModel, index: int) -> LayerParts:
    """Return the parts of the layer at `index`, as `layers_of` does."""
    return _layer_parts(_View.of(model), index, layer_modules(model)[index])


def _layer_parts(view: _View, index: int, layer: nn.Module) -> LayerParts:
    family = view.family
    attention = part(layer, family.attention)
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
    delta = None
    if matrix.delta is not None:
        down, up = matrix.delta
        own = None if up.bias is None else up.bias[start:stop]
        delta = (down, replace(up, weight=up.weight[start:stop], bias=own, rows=(start, stop)))
    return Matrix(matrix.key, matrix.weight[start:stop], bias, matrix.transposed, (start, stop), delta)


def embeddings_of(model: PreTrainedModel) -> EmbeddingParts:
    """Return the embedding tables and what follows them, up to the first layer."""
    view = _View.of(model)
    family, base, config = view.family, model.base_model, model.config
    position = None
    if family.patch:  # a bare parameter, [1, positions, hidden]
        owner, _, name = family.position.rpartition(".")
        table = getattr(part(base, owner), name)
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
        factor=view.factor(),
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
    norm, pooling = view.norm(model.base_model, view.family.final_norm), head.pooling if head else "none"
    return HeadParts(norm, pooling, dense, tied, view.factor() if tied else None)


def matrices_of(model: PreTrainedModel) -> dict[str, dict[str, Matrix]]:
    """Return every stored matrix by its key, each once, a fused projection whole, factors of low-rank differences with
    the matrices they are of, in the groups that number formats are chosen for: "attention", "ffn", "embedding" (the
    tables of words and of positions, the second factor and ALBERT's projection) and "head" (with its pooler). Token
    types, a row or two, and the positions of images, which are no table that is looked up, are in none.

    Of a model that the map does not have these are the matrices that a pass over a few tokens uses, grouped by the
    names of their modules.

    Raises:
        ModelError: if it is such a model and cannot be run on token ids alone.
    """
    if not is_mapped(model):
        return _matrices_without_map(model)
    layers, embeddings, head = layers_of(model), embeddings_of(model), head_of(model)
    position = embeddings.position if embeddings.patch is None else None
    tables = [t for t in (embeddings.word, embeddings.factor, position, embeddings.projection) if t is not None]
    return {
        "attention": {m.key: m for layer in layers for m in with_factors(layer.attention_matrices)},
        "ffn": {m.key: m for layer in layers for m in with_factors(layer.ffn_matrices)},
        "embedding": {m.key: m for m in tables},
        "head": {m.key: m for m, _ in head.dense},
    }


def with_factors(matrices: Iterable[Matrix]) -> Iterator[Matrix]:
    """Yield each matrix, and after it the factors of its low-rank difference if it has one."""
    for matrix in matrices:
        yield matrix
        yield from matrix.delta or ()


def _matrices_without_map(model: PreTrainedModel) -> dict[str, dict[str, Matrix]]:
    groups: dict[str, dict[str, Matrix]] = {"attention": {}, "ffn": {}, "embedding": {}, "head": {}}
    found = look(model)
    for matrix in found.matrices:
        transposed = is_conv1d(matrix.module)
        weight, bias = matrix.module.weight, getattr(matrix.module, "bias", None)
        groups[matrix.group][matrix.key] = Matrix(matrix.key, weight.T if transposed else weight, bias, transposed)
    return groups


def attention_paths(family: Family) -> tuple[str, ...]:
    """Return the paths of the attention block's matrices in a layer."""
    return tuple(p for p in (family.query, family.key, family.value, family.fused_qkv, family.out) if p)


def ffn_paths(family: Family) -> tuple[str, ...]:
    """Return the paths of the feed-forward block's matrices in a layer."""
    return tuple(p for p in (family.ffn_in, family.ffn_gate, family.ffn_out) if p)
