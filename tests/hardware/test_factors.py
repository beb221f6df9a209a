"""Factors of a prediction's parts are found again, with an uncertainty that holds; single models do not bend them."""

from __future__ import annotations

import numpy as np
import pytest

from autolite.hardware.factors import Factors, fit_factors, held_out

TRUE = np.array([1.8, 0.6, 1.0, 1.3])


def models(count: int, seed: int, noise: float = 0.03) -> tuple[np.ndarray, np.ndarray]:
    """Parts of models whose times are `TRUE` times them, give or take some noise."""
    rng = np.random.default_rng(seed)
    parts = rng.lognormal(0, 1.5, (count, len(TRUE)))
    return parts, parts @ TRUE * np.exp(noise * rng.standard_normal(count))


WIDE = np.full(len(TRUE), 0.5)


def test_the_factors_are_found_again() -> None:
    found = fit_factors(*models(200, 0), WIDE)
    np.testing.assert_allclose(np.exp(found.logs), TRUE, rtol=0.03)
    assert found.misfit == pytest.approx(0.03, rel=0.2)
    parts, times = models(50, 1)
    assert np.abs(np.log(times / found.times(parts))).mean() < 0.04


def test_with_no_noise_they_are_the_solution_of_the_equations() -> None:
    parts, times = models(30, 2, noise=0.0)
    expected = np.linalg.lstsq(parts, times, rcond=None)[0]
    np.testing.assert_allclose(np.exp(fit_factors(parts, times, np.full(4, 100.0)).logs), expected, rtol=1e-3)


def test_a_part_that_no_model_has_stays_as_it_was_and_as_uncertain() -> None:
    parts, times = models(30, 3)
    parts = np.column_stack([parts, np.zeros(len(parts))])
    found = fit_factors(parts, times, np.full(5, 0.4))
    assert found.logs[4] == pytest.approx(0)
    assert found.covariance[4, 4] == pytest.approx(0.4**2)


def test_models_that_were_disturbed_bend_nothing() -> None:
    parts, times = models(60, 4)
    times[:5] *= 4
    np.testing.assert_allclose(np.exp(fit_factors(parts, times, WIDE).logs), TRUE, rtol=0.1)


def test_a_few_models_move_what_is_sure_less() -> None:
    parts, times = models(3, 5)
    sure, unsure = fit_factors(parts, times, np.full(4, 0.01)), fit_factors(parts, times, WIDE)
    assert np.abs(sure.logs).max() < np.abs(unsure.logs).max()
    assert np.abs(np.log(times / unsure.times(parts))).max() < np.abs(np.log(times / sure.times(parts))).max()


def test_groups_are_predicted_by_the_others_alone() -> None:
    parts, times = models(40, 6)
    groups = ["a"] * 20 + ["b"] * 20
    errors = held_out(parts, times, WIDE, groups)
    found = fit_factors(parts[20:], times[20:], WIDE)
    np.testing.assert_allclose(errors[:20], np.log(times[:20] / found.times(parts[:20])))


def test_times_are_sums_of_scaled_parts() -> None:
    found = Factors(np.log(np.array([2.0, 3.0])), np.zeros((2, 2)), 0.1)
    np.testing.assert_allclose(found.times(np.array([[1.0, 1.0], [2.0, 0.0]])), [5, 4])
