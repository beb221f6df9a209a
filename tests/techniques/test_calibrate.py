"""Ranges of activations, against numpy, ONNX Runtime's calibrator and a search written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnxruntime.quantization.calibrate import HistogramCollector

from autolite.techniques.calibrate import BINS, LEVELS, METHODS, Method, entropy, fitted, mse, percentile

DRAWS = {
    "normal": lambda rng: rng.standard_normal(40_000),
    "heavy tails": lambda rng: rng.laplace(size=40_000),
    "after GELU": lambda rng: np.maximum(rng.standard_normal(40_000), -0.1),
    "outliers": lambda rng: np.concatenate((rng.standard_normal(80_000), [30.0, -25.0])),
}


def draw(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.from_numpy(DRAWS[name](np.random.default_rng(0)).astype(np.float32))
    return values, torch.stack((values.min(), values.max()))


# With outliers the divergence is flat to the seventh digit, and which of its minima is taken a matter of rounding.
@pytest.mark.parametrize("name", ["normal", "heavy tails", "after GELU"])
def test_entropy_is_that_of_onnx_runtime(name: str) -> None:
    values, extremes = draw(name)
    every = torch.cat((values, extremes)).numpy()
    widest = float(np.abs(every).max())
    counts, edges = np.histogram(every, BINS, (-widest, widest))
    theirs = HistogramCollector("entropy", False, BINS, LEVELS, 99.99, "same")
    expected = theirs.get_entropy_threshold((counts, edges, extremes[0], extremes[1], widest), LEVELS)
    assert entropy(values, extremes) == pytest.approx([float(x) for x in expected], rel=1e-5)


@pytest.mark.parametrize("name", DRAWS)
def test_percentile_leaves_one_of_ten_thousand_outside(name: str) -> None:
    values, extremes = draw(name)
    low, high = percentile(values, extremes)
    outside = int(((values < low) | (values > high)).sum())
    assert outside <= len(values) * 1e-4 + 2
    ordered = np.sort(values.numpy().astype(np.float64))
    place = (len(ordered) - 1) * 0.99995
    expected = ordered[int(place)] + (place % 1) * (ordered[int(place) + 1] - ordered[int(place)])
    assert high == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", DRAWS)
def test_mse_loses_no_more_than_any_part_of_the_full_range(name: str) -> None:
    values, extremes = draw(name)
    every = torch.cat((values, extremes)).numpy().astype(np.float64)

    def lost(low: float, high: float) -> float:
        scale = (high - low) / 255
        zero = round(-low / scale)
        codes = np.clip(np.round(every / scale + zero), 0, 255)
        return float(np.square((codes - zero) * scale - every).sum())

    low, high = (float(x) for x in extremes)
    least = min(lost(low * (1 - i / 20), high * (1 - i / 20)) for i in range(13))
    assert lost(*mse(values, extremes)) == pytest.approx(least, rel=1e-3)


@given(st.sampled_from(METHODS), st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=20))
def test_every_range_holds_zero_and_is_no_wider_than_the_values(method: Method, values: list[float]) -> None:
    sample = torch.tensor(values)
    low, high = fitted(sample, torch.stack((sample.min(), sample.max())), method)
    assert low <= 0 <= high
    assert low < high
    if any(values):
        assert min(*values, 0) <= low
        assert high <= max(*values, 0)


def test_what_is_clipped_is_rare() -> None:
    values, extremes = draw("outliers")
    widths = {method: np.ptp(fitted(values, extremes, method)) for method in METHODS}
    assert widths["minmax"] == pytest.approx(55)
    assert all(widths[method] < 40 for method in ("percentile", "entropy"))
    assert widths["mse"] < 55, "80,000 values gain more by it than two lose"
    assert all(width > 6 for width in widths.values()), "three standard deviations on each side are not rare"
