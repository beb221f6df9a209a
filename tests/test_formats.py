"""Number formats: round trips, exact bytes, and errors against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from autolite.errors import PlanError
from autolite.formats import FORMATS, GROUP, Encoded, decode, encode, nbytes
from autolite.packing import pack, unpack

matrices = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 70)),
    elements=st.floats(-100, 100, width=32).map(lambda x: 0.0 if abs(x) < 1e-6 else x),
).map(torch.from_numpy)
names = pytest.mark.parametrize("name", FORMATS)


def normal(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def squared_error(weight: torch.Tensor, encoded: Encoded) -> float:
    return float((decode(encoded).double() - weight.double()).square().mean())


@names
@settings(max_examples=40, deadline=None)
@given(weight=matrices)
def test_a_decoded_matrix_has_the_shape_and_scale_of_the_original(name: str, weight: torch.Tensor) -> None:
    encoded = encode(weight, name)
    back = decode(encoded)
    assert encoded.shape == tuple(back.shape) == tuple(weight.shape)
    assert back.dtype == torch.float32
    bound = weight.abs().amax(dim=1, keepdim=True)
    assert ((back - weight).abs() <= bound * 1.1 + 1e-30).all()


@names
@settings(max_examples=40, deadline=None)
@given(weight=matrices)
def test_nbytes_is_the_sum_of_the_stored_tensors(name: str, weight: torch.Tensor) -> None:
    encoded = encode(weight, name)
    stored = sum(len(bytes(t.contiguous().untyped_storage())) for t in encoded.tensors.values())
    assert nbytes(name, *weight.shape) == encoded.nbytes == stored


@names
@settings(max_examples=40, deadline=None)
@given(weight=matrices)
def test_encoding_a_decoded_matrix_changes_nothing(name: str, weight: torch.Tensor) -> None:
    once = decode(encode(weight, name))
    twice = decode(encode(once, name))
    # k-means may merge levels that float16 cannot tell apart; the others only round the scale
    tolerance = once.abs().amax(dim=1, keepdim=True) * (3e-7 if FORMATS[name].linear else 1e-3)
    assert ((twice - once).abs() <= tolerance).all()


@settings(max_examples=60, deadline=None)
@given(weight=matrices)
def test_int8_is_off_by_half_a_step_at_most(weight: torch.Tensor) -> None:
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    error = (decode(encode(weight, "int8")) - weight).abs()
    assert (error <= step / 2 * (1 + 1e-4)).all()


@settings(max_examples=60, deadline=None)
@given(weight=matrices)
def test_int4_is_off_by_half_a_step_where_it_does_not_clip(weight: torch.Tensor) -> None:
    encoded = encode(weight, "int4")
    columns = weight.shape[1]
    step = encoded.tensors["scales"].abs().repeat_interleave(GROUP, dim=1)[:, :columns]
    inner = (weight / encoded.tensors["scales"].repeat_interleave(GROUP, dim=1)[:, :columns]).clamp(-8, 7)
    clipped = inner != weight / encoded.tensors["scales"].repeat_interleave(GROUP, dim=1)[:, :columns]
    error = (decode(encoded) - weight).abs()
    assert (error[~clipped] <= (step / 2 * (1 + 1e-4))[~clipped]).all()


@settings(max_examples=60, deadline=None)
@given(weight=matrices)
def test_int4_is_never_worse_than_one_scale_that_clips_nothing(weight: torch.Tensor) -> None:
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % GROUP)).reshape(len(weight), -1, GROUP)
    scale = padded.abs().amax(dim=2, keepdim=True) / 7
    plain = torch.where(scale > 0, (padded / scale).round() * scale, padded).flatten(1)[:, : weight.shape[1]]
    assert squared_error(weight, encode(weight, "int4")) <= float((plain - weight).square().mean()) * (1 + 1e-4) + 1e-12


@settings(max_examples=60, deadline=None)
@given(weight=matrices)
def test_kmeans4_is_never_worse_than_sixteen_even_levels_per_row(weight: torch.Tensor) -> None:
    low, high = weight.amin(dim=1, keepdim=True), weight.amax(dim=1, keepdim=True)
    step = (high - low) / 15
    even = torch.where(step > 0, low + ((weight - low) / step).round() * step, weight)
    size = float(weight.abs().max())  # levels are float16 fractions of the largest value
    limit = float((even - weight).double().square().mean()) * (1 + 1e-2) + (size * 2**-11) ** 2
    assert squared_error(weight, encode(weight, "kmeans4")) <= limit


def test_kmeans4_reaches_the_error_of_the_optimal_quantizer_of_a_normal_distribution() -> None:
    weight = normal(64, 4096)
    # Max (1960), table I: 16 levels on a unit normal have a mean squared error of 0.009497.
    assert squared_error(weight, encode(weight, "kmeans4")) == pytest.approx(0.009497, rel=0.02)


def test_kmeans4_finds_sixteen_values_exactly() -> None:
    levels = torch.arange(16).float() / 16  # float16 holds them
    weight = torch.cat(
        [levels[torch.randint(16, (8, 200), generator=torch.Generator().manual_seed(0))], levels[None].expand(8, 16)], 1
    )
    weight = weight / weight.amax()  # the largest is 1, so fractions of it are the values
    assert torch.allclose(decode(encode(weight, "kmeans4")), weight, atol=2**-11)


@names
@pytest.mark.parametrize("row", [0.0, 0.37, -5.0])
def test_constant_rows_survive(name: str, row: float) -> None:
    weight = torch.full((3, 37), row)
    assert torch.allclose(decode(encode(weight, name)), weight, rtol=2**-8, atol=0)  # scales are bfloat16


@names
def test_equal_matrices_give_equal_bytes(name: str) -> None:
    first, second = encode(normal(9, 77), name), encode(normal(9, 77), name)
    assert all(torch.equal(first.tensors[k], second.tensors[k]) for k in first.tensors)


def test_rows_are_encoded_independently() -> None:
    weight = normal(6, 64)
    for name in FORMATS.keys() - {"int8-tensor", "kmeans6", "kmeans8"}:  # one scale or codebook for all rows
        whole, part = encode(weight, name), encode(weight[2:4], name)
        assert all(torch.equal(t[2:4], part.tensors[k]) for k, t in whole.tensors.items()), name


@names
def test_a_transposed_view_is_encoded_like_its_copy(name: str) -> None:
    view = normal(48, 33).T
    found, expected = encode(view, name), encode(view.contiguous(), name)
    assert all(torch.equal(t, expected.tensors[k]) for k, t in found.tensors.items())


def test_more_bits_mean_less_error_and_the_codebook_beats_the_plain_grid_on_heavy_tails() -> None:
    weight = normal(64, 512)
    errors = {name: squared_error(weight, encode(weight, name)) for name in FORMATS}
    assert errors["fp32"] == 0 < errors["int8"] < errors["kmeans4"]
    assert errors["int8"] < errors["int4"]


@given(codes=hnp.arrays(np.uint8, (3, 8), elements=st.integers(0, 15)).map(torch.from_numpy))
def test_packing_is_undone_by_unpacking(codes: torch.Tensor) -> None:
    packed = pack(codes, 4)
    assert torch.equal(unpack(packed, 4, 8), codes)
    assert torch.equal(packed & 15, codes[:, 0::2])  # the first of two is in the low half, as ONNX says


def test_an_unknown_format_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(PlanError, match="'int5': did you mean 'int"):
        encode(normal(2, 2), "int5")
