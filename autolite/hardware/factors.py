"""What timing whole models on a device teaches its profile.

A prediction is a sum of parts, each governed by a number of the profile. Here each part gets a factor, so that the sums
are what was measured: the most likely factors a posteriori, if the logarithm of each is normal around 0 with the
uncertainty that its numbers have, and errors of the models' times have heavy tails. So a few dozen models suffice, and
what they say nothing about stays as it was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

FREEDOM = 4.0  # degrees of freedom of the errors' distribution (Student's t): a model that was disturbed counts little
LEAST = 0.01  # the least relative error of a time
ROUNDS = 100


@dataclass(frozen=True, eq=False)
class Factors:
    """What the parts of a prediction are to be multiplied with.

    Attributes:
        logs: logarithms of the factors [parts].
        covariance: of these, a posteriori [parts, parts].
        misfit: the spread of measured times about predicted ones, relative.
    """

    logs: Array
    covariance: Array
    misfit: float

    def times(self, parts: Array) -> Array:
        """Return the times [samples] of models with these parts [samples, parts]."""
        found: Array = parts @ np.exp(self.logs)
        return found


def fit_factors(parts: Array, times: Array, spreads: Array) -> Factors:
    """Return the likeliest factors of parts.

    By Gauss-Newton steps on the logarithms, with iteratively reweighted errors.

    Args:
        parts: of each model's predicted time [samples, parts], none negative.
        times: that were measured [samples], in the same unit.
        spreads: how far each part may be off, relative and a priori [parts].
    """
    logs, scale, prior = np.zeros(parts.shape[1]), 0.1, np.diag(spreads**-2.0)
    for _ in range(ROUNDS):
        scaled = parts * np.exp(logs)
        shares = scaled / scaled.sum(1, keepdims=True)
        errors = np.log(times / scaled.sum(1))
        weights = (FREEDOM + 1) / (FREEDOM + (errors / scale) ** 2)
        seen = shares.T @ (weights[:, None] * shares) / scale**2
        covariance = np.linalg.inv(seen + prior)
        step = covariance @ (shares.T @ (weights * errors) / scale**2 - logs / spreads**2)
        logs = logs + np.clip(step, -1.0, 1.0)
        left = max(len(times) - float(np.trace(covariance @ seen)), 1.0)  # degrees of freedom
        scale = max(math.sqrt(float(weights @ errors**2) / left), LEAST)
        if np.abs(step).max() < 1e-6:
            break
    misfit = scale * math.sqrt(FREEDOM / (FREEDOM - 2))  # the standard deviation of that distribution
    kept = np.minimum(weights, 1.0)[:, None] * shares
    return Factors(logs, np.linalg.inv(shares.T @ kept / misfit**2 + prior), misfit)


def held_out(parts: Array, times: Array, spreads: Array, groups: Sequence[str]) -> Array:
    """Predict each group of models by factors that were fitted to the others.

    Args:
        parts: as in `fit_factors`.
        times: as in `fit_factors`.
        spreads: as in `fit_factors`.
        groups: the group of each model, such as its family [samples].

    Returns:
        The logarithms of measured to predicted times [samples].
    """
    errors = np.empty(len(times))
    for group in sorted(set(groups)):
        out = np.array([each == group for each in groups])
        found = fit_factors(parts[~out], times[~out], spreads)
        errors[out] = np.log(times[out] / found.times(parts[out]))
    return errors
