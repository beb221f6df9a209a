"""Encoder-decoders: the first stack is passed once, the second for every token, and cross-attention's keys are kept."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autolite.architecture import ModelShape
from autolite.hardware.blocks import block_of
from autolite.hardware.calls import course_of, jobs_of
from autolite.hardware.pieces import Pieces, pieces_of
from autolite.hardware.predict import predict, time_parts
from autolite.hardware.profile_files import load_profile
from autolite.hardware.roofline import speeds_of
from autolite.hardware.ways import Ways, ways_of
from autolite.measure import Workload
from autolite.products import matmuls
from tests.shapes import encoder_decoder_shape

PROFILE = load_profile("x86-avx2")
READ, STEP = 0, 1  # the passes of a call


def whole(shape: ModelShape) -> tuple[Pieces, Ways]:
    pieces = pieces_of([shape])
    return pieces, ways_of(pieces, speeds_of(PROFILE, 1))


def multiplied(shape: ModelShape, *passes: int) -> Counter[tuple[int, int]]:
    """The weight matrices [k, n] that passes multiply with."""
    pieces, ways = whole(shape)
    course = course_of(shape, Workload(1, 9, 1, 8))
    jobs = jobs_of(pieces, ways, course)
    blocks = [
        block_of(ways.distinct[ways.computed[use]], course.passes[number], int(role))
        for number, use, role in zip(jobs.passes, jobs.uses, jobs.roles, strict=True)
        if number in passes
    ]
    return Counter(
        (int(k), int(n))
        for block in blocks
        for kernel, (_, k, n, _, _) in zip(block.kernels, block.products, strict=True)
        if kernel == "fp32"
    )


def test_each_matrix_is_multiplied_with_in_one_of_the_two_passes() -> None:
    shape = encoder_decoder_shape()
    assert multiplied(shape, READ, STEP) == Counter((m.k, m.n) for m in matmuls(shape))
    kept = [(m.k, m.n) for m in matmuls(shape) if m.weights.endswith("cross.kv")]
    assert len(kept) == 2
    assert multiplied(shape, READ)[kept[0]] == 2
    assert multiplied(shape, STEP)[kept[0]] == 0, "keys and values of the source are computed once"


def test_the_weights_are_those_of_the_products() -> None:
    shape = encoder_decoder_shape()
    layers = tuple(replace(x, attention=0, feed_forward=0) for x in shape.stacks[0].layers)
    for each in (shape, shape.with_layers(0, layers)):
        pieces, ways = whole(each)
        read = [ways.distinct[place].reads for place in ways.computed]
        nbytes = sum(one.own + first * one.shared for one, first in zip(read, pieces.first, strict=True))
        assert nbytes == sum({m.weights: 4 * m.k * m.n for m in matmuls(each)}.values())


def test_a_call_is_what_is_read_and_the_steps_after_it() -> None:
    found = predict(encoder_decoder_shape(), PROFILE, Workload(1, 30, 1, 20))
    step = 1e3 / found["tokens_per_second"].value
    assert found["latency_ms"].value == pytest.approx(found["ttft_ms"].value + 20 * step)


def test_operators_around_the_layers_are_those_of_each_pass() -> None:
    shape = encoder_decoder_shape()
    none, some = (time_parts(shape, PROFILE, Workload(1, 30, 1, steps)) for steps in (0, 20))
    for key in ("around", "fixed"):
        assert some[key] == pytest.approx(21 * none[key])


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(4, 60), st.integers(1, 40))
def test_more_of_anything_takes_longer(encoder: int, decoder: int, tokens: int, generated: int) -> None:
    def time(more: tuple[int, int] = (0, 0), read: int = 0, written: int = 0) -> float:
        shape = encoder_decoder_shape(encoder + more[0], decoder + more[1])
        return predict(shape, PROFILE, Workload(1, tokens + read, 1, generated + written))["latency_ms"].value

    least = time()
    assert min(time((1, 0)), time((0, 1)), time(read=1), time(written=1)) > least


def test_attending_to_several_layers_takes_longer() -> None:
    shape, workload = encoder_decoder_shape(), Workload(1, 30, 1, 20)
    layers = tuple(replace(x, cross=replace(x.cross, sources=3)) for x in shape.stacks[1].layers if x.cross)
    times = [predict(s, PROFILE, workload)["latency_ms"].value for s in (shape, shape.with_layers(1, layers))]
    assert times[1] > times[0]


def test_they_survive_json() -> None:
    shape = encoder_decoder_shape()
    assert ModelShape.from_json(json.loads(json.dumps(shape.to_json()))) == shape
