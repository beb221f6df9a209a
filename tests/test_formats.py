"""Number formats: round trips, exact bytes, and errors against closed forms."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from autolite.codebooks import NF4, powers_of_two
from autolite.errors import PlanError
from autolite.formats import FORMATS, GROUP, Encoded, decode, encode, nbytes
from autolite.linear_grids import Linear, LinearGrid
from autolite.packing import PLANES, pack, packed_width, unpack

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
@settings(max_examples=12, deadline=None)
@given(weight=matrices)
def test_a_decoded_matrix_has_the_shape_and_scale_of_the_original(name: str, weight: torch.Tensor) -> None:
    encoded = encode(weight, name)
    back = decode(encoded)
    assert encoded.shape == tuple(back.shape) == tuple(weight.shape)
    assert back.dtype == torch.float32
    bound = weight.abs().amax(dim=1, keepdim=True)
    assert ((back - weight).abs() <= bound * 1.1 + 1e-30).all()


@names
@settings(max_examples=12, deadline=None)
@given(weight=matrices)
def test_nbytes_is_the_sum_of_the_stored_tensors(name: str, weight: torch.Tensor) -> None:
    encoded = encode(weight, name)
    stored = sum(len(bytes(t.contiguous().untyped_storage())) for t in encoded.tensors.values())
    assert nbytes(name, *weight.shape) == encoded.nbytes == stored


@names
@settings(max_examples=12, deadline=None)
@given(weight=matrices)
def test_encoding_a_decoded_matrix_changes_nothing(name: str, weight: torch.Tensor) -> None:
    once = decode(encode(weight, name))
    twice = decode(encode(once, name))
    # k-means may merge levels that float16 cannot tell apart; the others only round the scale
    tolerance = once.abs().amax(dim=1, keepdim=True) * (3e-7 if FORMATS[name].linear else 1e-3)
    assert ((twice - once).abs() <= tolerance).all()


@names
@settings(max_examples=12, deadline=None)
@given(weight=matrices, data=st.data())
def test_some_rows_are_rounded_as_they_are_among_all(name: str, weight: torch.Tensor, data: st.DataObject) -> None:
    chosen = torch.tensor(data.draw(st.lists(st.integers(0, len(weight) - 1), max_size=6)), dtype=torch.int64)
    grid = FORMATS[name].fit(weight)
    some = grid.rows(chosen)
    codes = some.quantize(weight[chosen])
    assert torch.equal(codes, grid.quantize(weight)[chosen])
    assert torch.equal(some.dequantize(codes), grid.dequantize(grid.quantize(weight))[chosen])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_groups_of_zeros_take_no_level_from_the_others(bits: int) -> None:
    """As many values as there are levels, 2^-i in each row, are exact beside rows that were pruned."""
    values = 2.0 ** -torch.arange(2**bits)
    weight = torch.cat((values.expand(3, -1), torch.zeros(5, len(values))))
    assert torch.equal(decode(encode(weight, f"kmeans{bits}-g64")), weight)


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if isinstance(form.layout, Linear)])
@settings(max_examples=12, deadline=None)
@given(weight=matrices)
def test_linear_formats_are_off_by_half_a_step_where_they_do_not_clip(name: str, weight: torch.Tensor) -> None:
    grid = FORMATS[name].fit(weight)
    assert isinstance(grid, LinearGrid)
    columns, group = weight.shape[1], grid.format.group
    scales, zeros = grid.scales.expand(len(weight), -1), grid.zeros.expand(len(weight), -1)
    if group:
        scales, zeros = (each.repeat_interleave(group, dim=1)[:, :columns] for each in (scales, zeros))
    low, high = (-grid.format.largest, grid.format.largest) if grid.format.signed else (0, 2**grid.format.bits - 1)
    steps = weight / scales + zeros
    inner = (steps >= low - 0.5) & (steps <= high + 0.5)
    error = (decode(encode(weight, name)) - weight).abs()
    assert (error <= scales.abs() / 2 * (1 + 1e-4))[inner].all()
    if name.startswith("int8") or name == "int7":
        assert inner.all(), "nothing is clipped at 8 bits"


LINEAR_8 = {"int8": 127, "int8-static": 127, "int8-weight": 127, "int7": 63}


@pytest.mark.parametrize("name", LINEAR_8)
@settings(max_examples=12, deadline=None)
@given(weight=matrices)
def test_a_step_of_eight_bits_is_the_largest_value_over_the_largest_code(name: str, weight: torch.Tensor) -> None:
    step = weight.abs().amax(dim=1, keepdim=True) / LINEAR_8[name]
    error = (decode(encode(weight, name)) - weight).abs()
    assert (error <= step / 2 * (1 + 1e-4)).all()


@settings(max_examples=30, deadline=None)
@given(weight=matrices)
def test_int4_is_never_worse_than_one_scale_that_clips_nothing(weight: torch.Tensor) -> None:
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % GROUP)).reshape(len(weight), -1, GROUP)
    scale = padded.abs().amax(dim=2, keepdim=True) / 7
    plain = torch.where(scale > 0, (padded / scale).round() * scale, padded).flatten(1)[:, : weight.shape[1]]
    assert squared_error(weight, encode(weight, "int4")) <= float((plain - weight).square().mean()) * (1 + 1e-4) + 1e-12


@settings(max_examples=30, deadline=None)
@given(weight=matrices)
def test_kmeans4_is_never_worse_than_sixteen_even_levels_per_row(weight: torch.Tensor) -> None:
    low, high = weight.amin(dim=1, keepdim=True), weight.amax(dim=1, keepdim=True)
    step = (high - low) / 15
    even = torch.where(step > 0, low + ((weight - low) / step).round() * step, weight)
    size = float(weight.abs().max())  # levels are float16 fractions of the largest value
    limit = float((even - weight).double().square().mean()) * (1 + 1e-2) + (size * 2**-11) ** 2
    assert squared_error(weight, encode(weight, "kmeans4")) <= limit


importances = st.one_of(st.none(), st.integers(0, 3))


def importance_of(weight: torch.Tensor, seed: int | None) -> torch.Tensor | None:
    """None, or weights of squared errors of one of the shapes that broadcast, some of them zero."""
    if seed is None:
        return None
    n, k = weight.shape
    whole = normal(n, k, seed=seed).clamp(min=0)
    return (whole, whole[:1], whole[:, :1], whole[0])[seed]


def weighted_error(weight: torch.Tensor, found: torch.Tensor, importance: torch.Tensor | None) -> float:
    squares = (found.double() - weight.double()).square()
    return float((squares if importance is None else squares * importance).sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@settings(max_examples=12, deadline=None)
@given(weight=matrices, seed=importances)
def test_codebooks_are_never_worse_than_linear_formats_of_their_bits(
    bits: int, weight: torch.Tensor, seed: int | None
) -> None:
    importance = importance_of(weight, seed)
    found = decode(encode(weight, f"kmeans{bits}", importance))
    # One scale a row. Up to 4 bits, where each row has a codebook, also against the best of several scales.
    scale = weight.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    plain = torch.where(scale > 0, (weight / scale).round() * scale, weight)
    others = [plain]
    if bits <= 4:
        grid = Linear(bits).fit(weight, importance)
        others.append(grid.dequantize(grid.quantize(weight)))
    weights = torch.ones(()) if importance is None else importance
    # Levels are float16 fractions of the largest value.
    slack = float((weights * (weight.abs().amax(dim=1, keepdim=True) * 2**-11).square()).expand(weight.shape).sum())
    limit = min(weighted_error(weight, other, importance) for other in others)
    assert weighted_error(weight, found, importance) <= 1.01 * limit + slack + 1e-12


@pytest.mark.parametrize("bits", [2, 3, 4])
@settings(max_examples=12, deadline=None)
@given(weight=matrices, seed=importances)
def test_codebooks_with_groups_are_never_worse_than_linear_ones_of_the_same_groups(
    bits: int, weight: torch.Tensor, seed: int | None
) -> None:
    importance = importance_of(weight, seed)
    linear = Linear(bits, 64, scale=torch.bfloat16).fit(weight, importance)
    plain = weighted_error(weight, linear.dequantize(linear.quantize(weight)), importance)
    found = weighted_error(weight, decode(encode(weight, f"kmeans{bits}-g64", importance)), importance)
    assert found <= plain * (1 + 1e-4) + 1e-12


def test_codebooks_with_groups_beat_the_best_fixed_ones_where_some_columns_are_large() -> None:
    weight = normal(64, 512)
    weight[:, 7] *= 20
    errors = {name: squared_error(weight, encode(weight, name)) for name in ("int4-g64", "nf4", "pot4", "kmeans4-g64")}
    assert errors.pop("kmeans4-g64") < min(errors.values())
    assert nbytes("kmeans4-g64", 64, 512) == nbytes("int4-g64", 64, 512) + 16 * 2 == nbytes("nf4", 64, 512) + 16 * 2


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.activations == "any"])
@settings(max_examples=12, deadline=None)
@given(weight=matrices, seed=st.integers(0, 3))
def test_importance_moves_scales_to_where_errors_count(name: str, weight: torch.Tensor, seed: int) -> None:
    importance = importance_of(weight, seed)
    aware, blind = (decode(encode(weight, name, each)) for each in (importance, None))
    slack = 1e-12 * float(weight.square().sum())
    if name.startswith("kmeans"):  # a local optimum that is found from other starts
        slack = 0.3 * weighted_error(weight, blind, importance) + 1e-5 * float(weight.square().sum())
    assert weighted_error(weight, aware, importance) <= weighted_error(weight, blind, importance) * (1 + 1e-4) + slack


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.activations == "any"])
def test_values_that_nothing_weighs_are_still_rounded(name: str) -> None:
    weight, importance = normal(8, 96), torch.zeros(8, 96)
    plain = squared_error(weight, encode(weight, name))
    assert squared_error(weight, encode(weight, name, importance)) <= 3 * plain
    importance[0] = 1
    assert squared_error(weight[1:], encode(weight[1:], name, importance[1:])) <= 3 * plain


def test_sensitive_columns_draw_the_levels_to_their_values() -> None:
    weight = normal(8, 256)
    importance = torch.where(torch.arange(256) < 16, 100.0, 1.0)
    aware, blind = (decode(encode(weight, "kmeans3", each)) for each in (importance, None))
    errors = [(each - weight)[:, :16].square().sum() for each in (aware, blind)]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize(("bits", "error"), [(2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_kmeans_reaches_the_error_of_the_optimal_quantizer_of_a_normal_distribution(bits: int, error: float) -> None:
    weight = normal(64, 4096)
    # Max (1960), table I: mean squared errors of 4, 8 and 16 levels on a unit normal.
    assert squared_error(weight, encode(weight, f"kmeans{bits}")) == pytest.approx(error, rel=0.02)


def test_nf4_has_the_quantiles_that_its_definition_says() -> None:
    """Dettmers et al. (2023): 8 quantiles of the positive half and 7 of the negative, with an exact zero."""
    inverse, offset = torch.distributions.Normal(0.0, 1.0).icdf, 0.9677083
    positive = inverse(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -inverse(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat((negative, torch.zeros(1), positive)).sort().values
    torch.testing.assert_close(torch.tensor(NF4, dtype=torch.float64), levels / levels.max(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("bits", [3, 4])
def test_powers_of_two_have_all_their_codes_and_only_powers(bits: int) -> None:
    levels = powers_of_two(bits)
    assert len(set(levels)) == 2**bits
    assert levels == tuple(sorted(levels))
    exponents = [np.log2(abs(level)) for level in levels if level]
    assert 0.0 in levels
    assert all(float(e).is_integer() for e in exponents)


@names
@settings(max_examples=12, deadline=None)
@given(weight=matrices, cut=st.integers(1, 69))
def test_columns_can_be_rounded_in_parts(name: str, weight: torch.Tensor, cut: int) -> None:
    grid, k = FORMATS[name].fit(weight), weight.shape[1]
    cut = min(cut, k)
    whole = grid.quantize(weight)
    parts = [grid.quantize(weight[:, :cut], 0), grid.quantize(weight[:, cut:], cut)]
    assert torch.equal(torch.cat(parts, dim=1), whole)
    values = torch.cat((grid.dequantize(parts[0], 0), grid.dequantize(parts[1], cut)), dim=1)
    assert torch.equal(values, decode(encode(weight, name)))
    read, codes = FORMATS[name].layout.read(grid.tensors(whole), k)
    assert torch.equal(codes, whole)
    assert torch.equal(read.dequantize(codes), values)


@names
def test_sizes_and_magnitudes_at_the_edge(name: str) -> None:
    for size, shape in itertools.product((1e-30, 1e-5, 1e30), ((1, 1), (1, 40), (40, 1), (5, 33))):
        weight = -normal(*shape).abs() * size
        weight[0, 0] = 0.0
        back = decode(encode(weight, name))
        assert back.shape == weight.shape
        assert back.isfinite().all()
        assert ((back - weight).abs() <= 0.6 * weight.abs().max()).all(), size  # of 2 bits half is clipped


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
    for name in FORMATS.keys() - {
        "int8-tensor",
        "kmeans6",
        "kmeans8",
        "kmeans4-g64",
        "kmeans3-g64",
        "kmeans2-g64",
    }:  # one scale or codebook for all rows
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
    assert errors["fp32"] == 0 < errors["kmeans8"] < errors["int8"] < errors["kmeans4"]
    for family in ("int{}", "kmeans{}", "int{}-asym", "pot{}", "int{}-g64", "int{}-g128"):
        found = [errors[name] for bits in (8, 6, 4, 3, 2) if (name := family.format(bits)) in errors]
        assert len(found) > 1
        assert found == sorted(found)
    assert errors["nf4"] < errors["int4-g64"], "its levels are those of a normal distribution"


@pytest.mark.parametrize("bits", PLANES)
@settings(max_examples=12, deadline=None)
@given(shape=st.tuples(st.integers(1, 4), st.integers(0, 40)), seed=st.integers(0, 99))
def test_packing_is_undone_by_unpacking(bits: int, shape: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = torch.from_numpy(rng.integers(0, 2**bits, shape, dtype=np.uint8))
    packed = pack(codes, bits)
    assert packed.shape == (shape[0], packed_width(shape[1], bits))
    assert torch.equal(unpack(packed, bits, shape[1]), codes)


def test_the_first_of_two_codes_is_in_the_low_half_as_onnx_says() -> None:
    codes = torch.tensor([[1, 2, 3, 15]], dtype=torch.uint8)
    assert pack(codes, 4).tolist() == [[0x21, 0xF3]]
    assert pack(codes & 3, 2).tolist() == [[0b11_11_10_01]]
    assert pack(codes & 7, 3).tolist() == [[0b11_11_10_01, 0b1000]]  # two low bits each, then the high ones


def test_an_unknown_format_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(PlanError, match="'int5': did you mean 'int"):
        encode(normal(2, 2), "int5")
