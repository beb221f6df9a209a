"""Surgery against independent references: masking, transformers itself, and a forward pass computed from the parts."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autolite.architecture import shape_of
from autolite.errors import ModelError
from autolite.families import FAMILIES, family_of
from autolite.parts import LayerParts, Matrix, Norm, embeddings_of, head_of, layers_of, matrices_of
from autolite.reshaping import reshape
from autolite.residual import keep_hidden
from autolite.surgery import clone, keep_heads, keep_layers, keep_neurons, share_layers
from autolite.testing import PAD, tiny_inputs, tiny_model

every_family = pytest.mark.parametrize("family", FAMILIES)
not_albert = pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"albert"}))
decoders = pytest.mark.parametrize("family", [name for name, f in FAMILIES.items() if f.causal])


@torch.no_grad()
def logits(model: Any, **changes: Any) -> Tensor:
    result: Tensor = model(**(tiny_inputs(model) | changes)).logits
    return result


def mask_columns(matrix: Matrix, kept: list[int], width: int = 1) -> None:
    """Zero the input columns of a live matrix outside the kept blocks of `width`."""
    keep = torch.zeros(matrix.weight.shape[1] // width, dtype=torch.bool)
    keep[kept] = True
    with torch.no_grad():
        matrix.weight[:, ~keep.repeat_interleave(width)] = 0


@every_family
@pytest.mark.parametrize("groups", [[1], [0, 1]])
def test_cutting_heads_equals_masking_them(family: str, groups: list[int]) -> None:
    extra: dict[str, Any] = {"head_dim": 4} if family == "qwen3" else {}
    masked = tiny_model(family, num_attention_heads=8, **extra)
    cut = clone(masked)
    layer = layers_of(masked)[1]
    mask_columns(layer.out, groups, layer.head_dim * layer.heads // layer.kv_heads)
    keep_heads(cut, 1, groups)
    torch.testing.assert_close(logits(cut), logits(masked), atol=1e-5, rtol=0)
    assert shape_of(cut).stacks[0].layers[1].kv_heads == len(groups)


@every_family
def test_cutting_neurons_equals_masking_them(family: str) -> None:
    masked = tiny_model(family)
    cut = clone(masked)
    mask_columns(layers_of(masked)[1].ffn_out, kept := [2, 3, 5, 7, 11, 63])
    keep_neurons(cut, 1, kept)
    torch.testing.assert_close(logits(cut), logits(masked), atol=1e-5, rtol=0)
    assert shape_of(cut).stacks[0].layers[1].ffn == len(kept)


@every_family
def test_every_layer_may_have_its_own_width(family: str) -> None:
    model = tiny_model(family, layers=3)
    for index, (groups, width) in enumerate([([0], 5), ([1], 64), ([0, 1], 9)]):
        if family == "albert" and index:
            continue  # one set of weights: cut with the first layer
        keep_heads(model, index, groups)
        keep_neurons(model, index, range(width))
    layers = shape_of(model).stacks[0].layers
    assert [x.ffn for x in layers] == ([5] * 3 if family == "albert" else [5, 64, 9])
    assert [x.kv_heads for x in layers] == ([1] * 3 if family == "albert" else [1, 1, 2])
    assert logits(model).isfinite().all()


@not_albert
def test_dropping_a_layer_equals_skipping_it(family: str) -> None:
    model, skipped = tiny_model(family, layers=3), tiny_model(family, layers=3)
    keep_layers(model, [0, 2])
    layers_of(skipped)[1].layer.forward = lambda hidden, *args, **kwargs: hidden
    assert torch.equal(logits(model), logits(skipped))
    assert model.config.num_hidden_layers == 2
    assert shape_of(model).source_layers == ((0, 2),)
    keep_layers(model, [1])
    assert shape_of(model).source_layers == ((2,),)


def test_dropping_layers_of_albert_applies_the_one_layer_less_often() -> None:
    model = tiny_model("albert", layers=4)
    keep_layers(model, [0, 3])
    assert torch.equal(logits(model), logits(tiny_model("albert", layers=2)))
    assert shape_of(model).source_layers == ((0, 3),)


@every_family
def test_hidden_states_of_every_layer_left_are_returned(family: str) -> None:
    model = clone(tiny_model(family, layers=3))
    keep_layers(model, [0, 2])
    assert len(model(**tiny_inputs(model), output_hidden_states=True).hidden_states) == 3


@not_albert
def test_sharing_equals_copying_the_weights(family: str) -> None:
    shared, copied = tiny_model(family, layers=4), tiny_model(family, layers=4)
    share_layers(shared, [0, 0, 2, 2], [0, 1, 0, 1])
    layers = layers_of(copied)
    with torch.no_grad():
        for target, source in ((1, 0), (3, 2)):
            copy_matrices(layers[target].attention_matrices, layers[source].attention_matrices)
        for target, source in ((2, 0), (3, 1)):
            copy_matrices(layers[target].ffn_matrices, layers[source].ffn_matrices)
    assert torch.equal(logits(shared), logits(copied))
    found = shape_of(shared).stacks[0].layers
    assert [x.attention for x in found] == [0, 0, 2, 2]
    assert [x.feed_forward for x in found] == [0, 1, 0, 1]
    stored = {name: len(group) for name, group in matrices_of(shared).items()}
    assert {name: 2 * stored[name] for name in ("attention", "ffn")}.items() <= {
        name: len(group) for name, group in matrices_of(copied).items()
    }.items()


def copy_matrices(targets: tuple[Matrix, ...], sources: tuple[Matrix, ...]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.weight.copy_(source.weight)
        if target.bias is not None and source.bias is not None:
            target.bias.copy_(source.bias)


@not_albert
def test_layers_that_share_are_cut_together(family: str) -> None:
    model = tiny_model(family, layers=3)
    share_layers(model, [0, 0, 2], [0, 1, 0])
    keep_heads(model, 1, [0])
    keep_neurons(model, 0, range(7))
    layers = shape_of(model).stacks[0].layers
    assert [x.kv_heads for x in layers][:2] == [1, 1]
    assert [x.ffn for x in layers] == [7, 64, 7]
    assert logits(model).isfinite().all()


def test_layers_of_different_widths_cannot_share() -> None:
    model = tiny_model("bert")
    keep_neurons(model, 0, range(7))
    with pytest.raises(ValueError, match="different widths"):
        share_layers(model, None, [0, 0, 0])


@pytest.mark.parametrize("cut", [keep_heads, keep_neurons])
@pytest.mark.parametrize("kept", [[], [0, 64], [-1]])
def test_what_is_kept_must_be_there(cut: Callable[[Any, int, list[int]], None], kept: list[int]) -> None:
    with pytest.raises(ValueError, match="must be a non-empty part of"):
        cut(tiny_model("bert"), 0, kept)


@decoders
def test_the_cache_of_a_cut_and_shared_decoder_is_exact(family: str) -> None:
    extra: dict[str, Any] = {"scale_attn_by_inverse_layer_idx": True} if family == "gpt2" else {}
    model = tiny_model(family, "language-modeling", layers=4, **extra)
    keep_layers(model, [0, 2, 3])
    keep_heads(model, 1, [1])
    share_layers(model, [0, 1, 0], [0, 0, 0])
    ids = tiny_inputs(model, batch=1)["input_ids"]
    whole, cache, steps = logits(model, input_ids=ids, attention_mask=torch.ones_like(ids)), None, list[Tensor]()
    for token in ids[0]:
        with torch.no_grad():
            output = model(input_ids=token.reshape(1, 1), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-5, rtol=1e-5)


@not_albert
def test_a_clone_shares_what_its_original_shares_and_nothing_with_it(family: str) -> None:
    model = tiny_model(family)
    share_layers(model, [0, 0, 0], [0, 1, 1])
    before, twin = logits(model), clone(model)
    assert shape_of(twin) == shape_of(model)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    keep_heads(twin, 0, [0])
    keep_layers(twin, [1])
    assert torch.equal(logits(model), before)
    assert model.config.num_hidden_layers == 3


@not_albert
def test_a_state_dict_names_what_is_shared_once_and_loads(family: str) -> None:
    model, other = tiny_model(family), tiny_model(family, seed=1)
    for each in (model, other):
        share_layers(each, [0, 1, 1], [0, 0, 2])
    state = copy.deepcopy(model.state_dict())
    assert list(state) == [name for name, _ in model.named_parameters()]
    other.load_state_dict(state)
    assert torch.equal(logits(other), logits(model))
    lost = layers_of(model)[0].out.key
    del state[lost]
    with pytest.raises(RuntimeError, match=lost):
        other.load_state_dict(state)


def test_a_compressed_teacher_is_cut_by_where_its_layers_came_from() -> None:
    teacher = tiny_model("bert", layers=4)
    keep_layers(teacher, [0, 2, 3])
    target = shape_of(teacher).keep_layers(0, [0, 2])
    assert target.source_layers == ((0, 3),)
    reshape(teacher, target)
    assert shape_of(teacher) == target


@every_family
def test_a_fresh_model_is_given_the_shape_of_a_cut_one(family: str) -> None:
    extra: dict[str, Any] = {"scale_attn_by_inverse_layer_idx": True} if family == "gpt2" else {}
    fresh, model = tiny_model(family, layers=4, seed=1, **extra), tiny_model(family, layers=4, **extra)
    keep_layers(model, [0, 2, 3])
    keep_heads(model, 0, [1])
    keep_neurons(model, 2, range(6))
    if family != "albert":
        share_layers(model, [0, 1, 1], [0, 0, 2])
    reshape(fresh, shape_of(model))
    assert shape_of(fresh) == shape_of(model)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh), logits(model))


def test_a_shape_that_cannot_be_cut_out_is_refused() -> None:
    with pytest.raises(ModelError, match="of a gpt2 model"):
        reshape(tiny_model("bert"), shape_of(tiny_model("gpt2")))
    with pytest.raises(ModelError, match="does not fit"):
        reshape(tiny_model("bert"), shape_of(tiny_model("bert", intermediate_size=65)))
    with pytest.raises(ModelError, match="does not fit"):
        reshape(tiny_model("bert"), shape_of(tiny_model("bert", layers=4)))
    shared = tiny_model("bert")
    share_layers(shared, [0, 0, 0])
    with pytest.raises(ModelError, match="does not fit"):
        reshape(shared, shape_of(tiny_model("bert")))  # what is one cannot be told apart again


# A forward pass from nothing but the family's facts and the parts: what an emitter of another runtime sees.

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
}


def linear(x: Tensor, matrix: Matrix) -> Tensor:
    return F.linear(x, matrix.weight, matrix.bias)


def normalise(x: Tensor, norm: Norm | None, kept: list[int] | None = None) -> Tensor:
    """With `kept`, of channels that are zero elsewhere: the statistics are theirs alone."""
    if norm is None:
        return x
    if kept is not None and x.shape[-1] > len(kept):
        part = x[..., kept]
        spread = (part.square() if norm.bias is None else (part - part.mean(-1, keepdim=True)).square()).mean(-1)
        centre = 0.0 if norm.bias is None else part.mean(-1, keepdim=True)
        scaled = (x - centre) * torch.rsqrt(spread + norm.eps)[..., None] * norm.weight
        mask = torch.zeros(x.shape[-1])
        mask[kept] = 1
        return (scaled if norm.bias is None else scaled + norm.bias) * mask
    if norm.bias is None:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight
    return F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.eps)


def embed(model: nn.Module, inputs: dict[str, Tensor], kept: list[int] | None = None) -> Tensor:
    parts = embeddings_of(model)  # type: ignore[arg-type]
    if parts.patch is not None and parts.class_token is not None and parts.position is not None:
        side = math.isqrt(parts.patch.weight.shape[1] // 3)
        patches = F.unfold(inputs["pixel_values"], side, stride=side).transpose(1, 2)
        x = linear(patches, parts.patch)
        return torch.cat([parts.class_token.expand(len(x), 1, -1), x], 1) + parts.position.weight
    assert parts.word is not None
    ids = inputs["input_ids"]
    x = parts.word.weight[ids]
    if parts.position is not None:
        steps = torch.arange(ids.shape[1]).expand_as(ids)
        if parts.positions_after_padding:
            real = (ids != PAD).long()
            steps = real.cumsum(1) * real - 1
        x = x + parts.position.weight[steps + parts.position_offset]
    if parts.token_type is not None:
        x = x + parts.token_type.weight[0]
    x = normalise(x, parts.norm, kept if parts.projection is None else None)
    return linear(x, parts.projection) if parts.projection is not None else x


def rotate(x: Tensor, inverse: Tensor) -> Tensor:
    angle = torch.arange(x.shape[-2])[:, None] * torch.cat([inverse, inverse])
    one, two = x.chunk(2, -1)
    return x * angle.cos() + torch.cat([-two, one], -1) * angle.sin()


def attend(model: Any, layer: LayerParts, x: Tensor, allowed: Tensor) -> Tensor:
    def split(matrix: Matrix, heads: int) -> Tensor:
        return linear(x, matrix).reshape(*x.shape[:2], heads, layer.head_dim).transpose(1, 2)

    query = normalise(split(layer.query, layer.heads), layer.query_norm)
    key, value = normalise(split(layer.key, layer.kv_heads), layer.key_norm), split(layer.value, layer.kv_heads)
    if path := family_of(model.config).rotary:
        inverse = model.base_model.get_submodule(path).inv_freq
        query, key = rotate(query, inverse), rotate(key, inverse)
    key, value = (t.repeat_interleave(layer.heads // layer.kv_heads, 1) for t in (key, value))
    scores = (query @ key.transpose(2, 3) * layer.scale).masked_fill(~allowed, -1e9)
    return linear((scores.softmax(-1) @ value).transpose(1, 2).flatten(2), layer.out)


@torch.no_grad()
def forward(model: Any, kept: list[int] | None = None) -> Tensor:
    """With `kept`, the residual stream is multiplied by zero in all other channels."""
    inputs, family = tiny_inputs(model), family_of(model.config)
    activation = ACTIVATIONS[getattr(model.config, family.activation)]

    def feed_forward(x: Tensor) -> Tensor:
        inner = linear(x, layer.ffn_in)
        gated = activation(linear(x, layer.ffn_gate)) * inner if layer.ffn_gate is not None else activation(inner)
        return linear(gated, layer.ffn_out)

    x = embed(model, inputs, kept)
    there = torch.ones(x.shape[-1]) if kept is None else torch.zeros(x.shape[-1]).index_fill(0, torch.tensor(kept), 1)
    x = x * there
    mask = inputs.get("attention_mask", torch.ones(x.shape[:2])).bool()
    allowed = mask[:, None, None, :].expand(-1, -1, x.shape[1], -1)
    if family.causal:
        allowed = allowed & torch.ones(x.shape[1], x.shape[1]).tril().bool()
    for layer in layers_of(model):
        if family.pre_norm:
            x = x + there * attend(model, layer, normalise(x, layer.attention_norm, kept), allowed)
            x = x + there * feed_forward(normalise(x, layer.ffn_norm, kept))
        else:
            x = normalise(x + there * attend(model, layer, x, allowed), layer.attention_norm, kept)
            x = normalise(x + there * feed_forward(x), layer.ffn_norm, kept)
    head = head_of(model)
    x = normalise(x, head.final_norm, kept)
    if head.pooling == "first":
        x = x[:, 0]
    elif head.pooling == "last":
        x = x[torch.arange(len(x)), mask.sum(1) - 1]
    for index, (matrix, act) in enumerate(head.dense):
        x = ACTIVATIONS[act](linear(x, matrix))
        x = x * there if index < len(head.dense) - 1 else x
    return x


@every_family
@pytest.mark.parametrize("cut", [False, True])
def test_the_map_says_enough_to_compute_the_model(family: str, cut: bool) -> None:
    model = tiny_model(family)
    if cut:
        keep_heads(model, 1, [1])
        keep_neurons(model, 0, range(20))
        keep_layers(model, [0, 1])
    torch.testing.assert_close(forward(model), logits(model), atol=2e-5, rtol=1e-5)


@decoders
def test_the_map_says_enough_to_compute_a_language_model(family: str) -> None:
    model = tiny_model(family, "language-modeling")
    real = tiny_inputs(model)["attention_mask"].bool()
    torch.testing.assert_close(forward(model)[real], logits(model)[real], atol=2e-5, rtol=1e-5)
    assert head_of(model).tied == (family == "gpt2")


KEPT = [i for i in range(32) if i % 4 != 1]  # 24 of 32 hidden channels


@every_family
def test_cutting_hidden_channels_equals_masking_them(family: str) -> None:
    """The masked model's norms take their statistics over the channels that are left."""
    model = tiny_model(family)
    masked = forward(model, KEPT)
    keep_hidden(model, KEPT)
    torch.testing.assert_close(logits(model), masked, atol=2e-5, rtol=1e-4)
    assert shape_of(model).stacks[0].hidden == 24
    assert shape_of(model).embedding == {"albert": 16, "vit": 48}.get(family, 24)


@decoders
def test_hidden_channels_of_a_language_model_go_from_its_head_too(family: str) -> None:
    model = tiny_model(family, "language-modeling", tie_word_embeddings=True)
    real = tiny_inputs(model)["attention_mask"].bool()
    masked = forward(model, KEPT)[real]
    keep_hidden(model, KEPT)
    torch.testing.assert_close(logits(model)[real], masked, atol=5e-5, rtol=1e-4)
    assert shape_of(model).tied


@not_albert
def test_hidden_channels_of_shared_and_uneven_layers_are_cut_once(family: str) -> None:
    model = tiny_model(family)
    keep_heads(model, 2, [1])
    keep_neurons(model, 0, range(24))
    share_layers(model, [0, 0, 2], [0, 1, 1])
    masked = forward(model, KEPT)
    keep_hidden(model, KEPT)
    torch.testing.assert_close(logits(model), masked, atol=2e-5, rtol=1e-4)


def test_the_head_s_own_matrix_keeps_the_outputs_it_is_told_to() -> None:
    model = tiny_model("bert")
    inner = [*range(20), 28, 29, 30, 31]
    weight = model.bert.pooler.dense.weight.detach().clone()
    keep_hidden(model, KEPT, inner)
    assert torch.equal(model.bert.pooler.dense.weight, weight[inner][:, KEPT])
    with pytest.raises(ValueError, match="must keep 2 outputs"):
        keep_hidden(tiny_model("bert"), [0, 1], [0])
    with pytest.raises(ValueError, match="hidden channels to keep"):
        keep_hidden(tiny_model("bert"), [32])
