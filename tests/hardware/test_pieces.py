"""Plans as numbers of pieces: nothing depends on what else is priced, or on how many ways there are to compute it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autolite.architecture import LayerShape, ModelShape
from autolite.hardware.pieces import pieces_of
from autolite.hardware.predict import predict, predict_all
from autolite.hardware.profile_files import load_profile
from autolite.hardware.segments import distinct, segments, starts_of
from autolite.measure import Workload
from tests.shapes import bert_shape, encoder_decoder_shape, llama_shape

FORMS = ("fp32", "int8", "int4", "kmeans4", "nf4")
LAYERS = st.tuples(st.integers(1, 8), st.sampled_from(FORMS), st.sampled_from(FORMS), st.sampled_from([0, 0, 4]))
SHAPES = st.tuples(st.sampled_from([bert_shape, llama_shape]), st.lists(LAYERS, min_size=1, max_size=4), st.booleans())


def mixed(shape: ModelShape, layers: list[tuple[int, str, str, int]], shared: bool) -> ModelShape:
    """A copy with heads, formats and ranks of low-rank differences by layer; `shared` gives all one set of weights."""

    def layer(place: int, heads: int, attention: str, ffn: str, rank: int) -> LayerShape:
        own = replace(
            shape.stacks[0].layers[0], heads=heads, kv_heads=heads, attention_format=attention, ffn_format=ffn
        )
        return replace(own, attention=0 if shared else place, feed_forward=place, attention_rank=rank if shared else 0)

    return shape.with_layers(0, tuple(layer(place, *each) for place, each in enumerate(layers)))


@settings(max_examples=20, deadline=None)
@given(st.lists(SHAPES, min_size=1, max_size=5), st.sampled_from(["pixel8", "x86-avx2", "h100"]), st.integers(0, 4))
def test_plans_cost_what_each_does_alone(
    kinds: list[tuple[Callable[[], ModelShape], list[tuple[int, str, str, int]], bool]], target: str, generated: int
) -> None:
    profile, workload = load_profile(target), Workload(2, 16, 1, generated)
    shapes = [mixed(make(), layers, shared) for make, layers, shared in kinds]
    shapes += [encoder_decoder_shape(), bert_shape(1)]
    for shape, prices in zip(shapes, predict_all(shapes, profile, workload), strict=True):
        alone = predict(shape, profile, workload)
        assert list(prices) == list(alone)
        for metric, one in alone.items():
            together = prices[metric]
            assert (together.low, together.value, together.high) == pytest.approx((one.low, one.value, one.high))


@pytest.mark.parametrize("tokens", [1, 64])
def test_the_kernels_of_several_formats_are_chosen_together(tokens: int) -> None:
    """They compete for the cache: every choice is tried, and the fastest taken."""
    profile, workload = load_profile("raspberry-pi-5"), Workload(1, tokens, 1)
    shape = mixed(bert_shape(), [(12, "int4", "kmeans4", 0), (6, "kmeans4", "nf4", 0), (3, "fp32", "int4", 0)], False)
    mine = ("int4", "kmeans4", "nf4")
    times = []
    for kernels in itertools.product(*(profile.formats[form] for form in mine)):
        only = {form: (kernel,) for form, kernel in zip(mine, kernels, strict=True)}
        one = profile.model_copy(update={"formats": {**profile.formats, **only}})
        times.append(predict(shape, one, workload)["latency_ms"].value)
    assert len(times) > 4
    assert predict(shape, profile, workload)["latency_ms"].value == pytest.approx(min(times), rel=1e-12)


def test_equal_pieces_are_one() -> None:
    shapes = [bert_shape(2), bert_shape(3), llama_shape(2)]
    pieces = pieces_of(shapes)
    assert pieces.counts.tolist() == [5, 7, 5]
    assert pieces.starts.tolist() == [0, 5, 12]
    assert len(pieces.distinct) == 6, "of each of two families what is around, and the two halves of a layer"
    assert pieces_of(shapes[:1]).distinct[1] is pieces.distinct[1]


def test_only_the_first_use_of_weights_stores_them() -> None:
    shape = bert_shape(3)
    layers = tuple(replace(layer, attention=0) for layer in shape.stacks[0].layers)
    pieces = pieces_of([shape.with_layers(0, layers)])
    assert pieces.first.tolist() == [True, True, True, False, True, False, True]


def test_lists_one_after_the_other() -> None:
    counts = np.array([2, 0, 3])
    assert starts_of(counts).tolist() == [0, 2, 2]
    owners, places = segments(np.array([10, 20, 30]), counts)
    assert owners.tolist() == [0, 0, 2, 2, 2]
    assert places.tolist() == [10, 11, 30, 31, 32]
    numbers = np.array([7, 3, 7, 9])
    some, kinds = distinct(numbers)
    assert kinds.tolist() == [0, 1, 0, 2]
    assert numbers[some].tolist() == [7, 3, 9]
