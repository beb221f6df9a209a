import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autolite.architecture import LayerShape, ModelShape, Stack, numbered, shape_of
from autolite.families import FAMILIES
from autolite.products import matmuls
from autolite.testing import VOCAB, tiny_model

GQA = ("llama", "qwen2", "qwen3")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shape_is_read_off_a_model(family: str) -> None:
    causal = FAMILIES[family].causal
    shape = shape_of(tiny_model(family, layers=3))
    layers = tuple(
        LayerShape(4, 2 if family in GQA else 4, 8, 64, *((0, 0) if family == "albert" else (i, i))) for i in range(3)
    )
    assert shape == ModelShape(
        family=family,
        stacks=(Stack("decoder" if causal else "encoder", 32, layers, gated=family in GQA, causal=causal),),
        vocab=0 if family == "vit" else VOCAB,
        embedding={"albert": 16, "vit": 3 * 4 * 4}.get(family, 32),
        positions=17 if family == "vit" else 64,
        outputs=3,
        source_layers=((0, 1, 2),),
    )


def test_a_tied_language_model_head_is_the_embedding() -> None:
    tied, untied = shape_of(tiny_model("gpt2", "language-modeling")), shape_of(tiny_model("llama", "language-modeling"))
    assert (tied.outputs, tied.tied) == (VOCAB, True)
    assert (untied.outputs, untied.tied) == (VOCAB, False)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"vit"}))
def test_the_products_of_a_shape_count_the_parameters_of_the_matrices(family: str) -> None:
    model = tiny_model(family)
    inner = ("layer", ".h.", "albert_layers")
    stored = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and any(x in n for x in inner))
    products = {m.weights: m.k * m.n for m in matmuls(shape_of(model)) if m.part != "head"}
    assert sum(products.values()) == stored


ids = st.integers(0, 3)
layer_shapes = st.lists(st.builds(LayerShape, ids, ids, ids, ids, ids, ids), min_size=1, max_size=6)


@given(layer_shapes)
def test_numbering_is_canonical_and_keeps_what_is_shared(layers: list[LayerShape]) -> None:
    again = numbered(layers)
    assert numbered(again) == again
    for a, x in zip(layers, again, strict=True):
        for b, y in zip(layers, again, strict=True):
            assert (a.attention == b.attention) == (x.attention == y.attention)
            assert (a.feed_forward == b.feed_forward) == (x.feed_forward == y.feed_forward)


@given(layer_shapes, st.data())
def test_layers_kept_twice_are_layers_kept_at_once(layers: list[LayerShape], data: st.DataObject) -> None:
    shape = ModelShape("bert", (Stack("encoder", 32, numbered(layers)),), 9, 32, 9, 2)
    every = list(range(len(layers)))
    first = sorted(data.draw(st.sets(st.sampled_from(every), min_size=1)))
    second = sorted(data.draw(st.sets(st.sampled_from(range(len(first))), min_size=1)))
    kept = shape.keep_layers(0, first).keep_layers(0, second)
    assert kept == shape.keep_layers(0, [first[i] for i in second])
    assert kept.source_layers == (tuple(first[i] for i in second),)
    assert ModelShape.from_json(json.loads(json.dumps(kept.to_json()))) == kept


def test_formats_are_kept_with_their_layers_and_can_be_left_out() -> None:
    shape = shape_of(tiny_model("bert", layers=2))
    layers = tuple(replace(x, ffn_format="int8") for x in shape.stacks[0].layers)
    coded = shape.with_layers(0, layers, head_format="int4")
    assert coded.keep_layers(0, [1]).stacks[0].layers[0].ffn_format == "int8"
    assert coded.without_formats() == shape
