"""A profile corrected by whole models that were timed on its device."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autolite.architecture import ModelShape
from autolite.hardware.factors import Array, fit_factors, held_out
from autolite.hardware.predict import time_parts
from autolite.hardware.profile import Profile
from autolite.hardware.roofline import speeds_of
from autolite.measure import Workload

ROUNDS = 4  # another kernel may be the fastest by other factors: parts are computed again with them
PRIOR = 0.3  # the least that a part may be off, whatever its numbers' own uncertainty: the formula is an idealization
LEVEL = 0.95  # of new models whose times are to be within the intervals
NORMAL = 1.96  # that many standard deviations are that level
FEWEST = 12  # models, of at least two groups


@dataclass(frozen=True)
class Sample:
    """A model that was timed.

    Attributes:
        shape: of the model.
        workload: of a call.
        milliseconds: that it takes where nothing else runs.
        group: what is held out together with it, to see how well models of other kinds are predicted: its family.
    """

    shape: ModelShape
    workload: Workload
    milliseconds: float
    group: str

    def to_json(self) -> dict[str, Any]:
        """Return the sample as plain JSON types."""
        return {
            "shape": self.shape.to_json(),
            "workload": str(self.workload),
            "milliseconds": self.milliseconds,
            "group": self.group,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Sample:
        """Rebuild a sample from `to_json`'s form."""
        shape, workload = ModelShape.from_json(data["shape"]), Workload.parse(data["workload"])
        return cls(shape, workload, data["milliseconds"], data["group"])


@dataclass(frozen=True, eq=False)
class Calibrated:
    """A profile, and how far its predictions were off.

    Attributes:
        profile: with the numbers that the samples say.
        before: relative errors of the times that the profile predicted as it was [samples].
        errors: the same of what was fitted to the samples of all other groups [samples].
        factors: what the times that each number of the profile governs were multiplied with.
    """

    profile: Profile
    before: Array
    errors: Array
    factors: Mapping[str, float]


def calibrated(profile: Profile, samples: Sequence[Sample], source: str) -> Calibrated:
    """Correct a profile by models that were timed.

    The factors of the parts of a time are those of `autolite.hardware.factors.fit_factors`, a priori 1 give or take the
    uncertainty of their numbers. Intervals are wide enough for 95 % of the models that were held out, group by group:
    the uncertainty of `correction` is set so.

    Args:
        profile: of the device.
        samples: on numbers of threads and in number formats that it has; a dozen at least.
        source: what timed them, for the numbers that change.

    Raises:
        TargetError: if the profile lacks a thread or a number format of a sample.
    """
    speeds = speeds_of(profile, samples[0].workload.threads)
    sigmas = np.sqrt(speeds.groups @ speeds.variances)
    spreads, times = np.maximum(sigmas, PRIOR), np.array([each.milliseconds for each in samples])
    first = parts = _parts(profile, samples) * profile.correction.value
    for _ in range(ROUNDS):
        found = fit_factors(parts, times, spreads)
        named = dict(zip(speeds.keys, np.exp(found.logs).tolist(), strict=True))
        parts = _parts(scaled(profile, named), samples) * profile.correction.value / np.exp(found.logs)
    found = fit_factors(parts, times, spreads)
    factors = np.exp(found.logs)
    named = dict(zip(speeds.keys, factors.tolist(), strict=True))
    errors = held_out(parts, times, spreads, [each.group for each in samples])
    seen = parts.sum(0) > 0
    left = {
        key: min(float(sigma), 3.0)
        for key, sigma, used in zip(speeds.keys, np.sqrt(np.diag(found.covariance)), seen, strict=True)
        if used
    }
    shares = parts * factors / (parts @ factors)[:, None]
    changed = scaled(profile, named, source, left, 0.0)
    own = speeds_of(changed, samples[0].workload.threads).spread(shares, 0, np.array(False))
    width = min(_width(errors, own), 3.0)
    return Calibrated(scaled(profile, named, source, left, width), first.sum(1) / times - 1, np.expm1(-errors), named)


def _parts(profile: Profile, samples: Sequence[Sample]) -> Array:
    """The parts of the samples' times in milliseconds [samples, keys]."""
    return np.array([list(time_parts(each.shape, profile, each.workload).values()) for each in samples])


def _width(errors: Array, own: Array) -> float:
    """The relative uncertainty of all times, beside that of their parts, with which the wanted part of the held-out
    errors is within the intervals; of rank ceil((n + 1) level), as in split-conformal prediction (Papadopoulos et al.
    2002, "Inductive Confidence Machines for Regression")."""
    rank = min(math.ceil((len(errors) + 1) * LEVEL), len(errors)) - 1
    # |error| <= NORMAL * sqrt(log(1 + own^2 + width^2)), as intervals are drawn (`autolite.hardware.profile.growth`)
    needed = np.sort(np.maximum(np.expm1((errors / NORMAL) ** 2) - own**2, 0))
    return float(np.sqrt(needed[rank]))


def scaled(
    profile: Profile,
    factors: Mapping[str, float],
    source: str = "",
    sigmas: Mapping[str, float] | None = None,
    width: float | None = None,
) -> Profile:
    """Return a profile by which each part of a time is multiplied with its factor; parts without one stay.

    Args:
        profile: to change.
        factors: by the keys of `autolite.hardware.roofline.Speeds`.
        source: of the numbers that change, which are calibrated then, today; if empty, they stay what they are.
        sigmas: relative uncertainty of each of these parts, if that changes.
        width: relative uncertainty of all times, if that changes.
    """
    data = profile.model_dump()
    today = datetime.date.today()

    def of(key: str) -> float:
        return factors.get(key, 1.0)

    def change(number: dict[str, Any], factor: float) -> None:
        if factor != 1.0:
            number["value"] *= factor
            if source:
                number.update(kind="calibrated", source=source, date=today)

    unit = next(each for each in data["units"] if each["name"] == profile.default_unit)
    for kernel, halves in data["efficiency"].items():
        peak = of(f"{kernel}.peak")
        if kernel in unit["peak"]:
            change(unit["peak"][kernel], 1 / peak)
            if source and peak != 1.0:  # it is the product of the two that was found
                halves["fraction"].update(kind="calibrated", source=source, date=today)
        for part in ("rows", "columns", "depth"):
            change(halves[part], of(f"{kernel}.{part}") / peak)
    unit["elementwise"].setdefault("approximation", dict(unit["elementwise"]["activation"]))
    for name, number in unit["elementwise"].items():
        change(number, 1 / of(name))
    change(unit["softmax"], 1 / of("softmax"))
    change(data["memory"]["bandwidth"], 1 / of("memory"))
    change(data["memory"]["stall"], of("stall") / of("memory"))
    change(data["cache"]["bandwidth"], 1 / of("cache"))
    data["around"] = data["around"] or dict(data["dispatch"])
    change(data["around"], of("around"))
    change(data["dispatch"], of("dispatch"))
    change(data["fixed"], of("fixed"))
    if sigmas is not None:
        _set_sigmas(data, unit, sigmas)
    if width is not None:
        data["correction"].update(sigma=round(width, 4), kind="calibrated", source=source, date=today)
    return Profile.model_validate(data)


def _set_sigmas(data: dict[str, Any], unit: dict[str, Any], sigmas: Mapping[str, float]) -> None:
    """Give the numbers the uncertainties that these parts of a time have; others stay. Where two numbers govern a part,
    the second one has what the first does not explain."""

    def beside(number: dict[str, Any], part: str, first: str) -> None:
        if part in sigmas:
            number["sigma"] = round(math.sqrt(max(sigmas[part] ** 2 - sigmas.get(first, 0.0) ** 2, 0)), 4)

    def alone(number: dict[str, Any], part: str) -> None:
        if part in sigmas:
            number["sigma"] = round(sigmas[part], 4)

    for kernel, efficiency in data["efficiency"].items():
        peak = f"{kernel}.peak"
        if kernel in unit["peak"] and peak in sigmas:
            alone(unit["peak"][kernel], peak)
            efficiency["fraction"]["sigma"] = 0.0
            for part in ("rows", "columns", "depth"):
                beside(efficiency[part], f"{kernel}.{part}", peak)
    for name, number in unit["elementwise"].items():
        alone(number, name)
    alone(unit["softmax"], "softmax")
    alone(data["memory"]["bandwidth"], "memory")
    beside(data["memory"]["stall"], "stall", "memory")
    alone(data["cache"]["bandwidth"], "cache")
    for name in ("dispatch", "around", "fixed"):
        alone(data[name], name)
