"""What plans cost on a target, without their weights, and what a front is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from autolite.architecture import ModelShape
from autolite.compress import shape_after
from autolite.errors import TargetError
from autolite.front import Candidate, Front
from autolite.hardware.calls import generates
from autolite.hardware.predict import basis, predict, predict_all, predict_faster
from autolite.hardware.profile import KINDS, Profile
from autolite.limits import Constraints
from autolite.measure import Measurement, Workload
from autolite.plan import Plan
from autolite.search.choose import blocked, choose

TIMED = "timed"  # the basis of a latency that was measured of the very model
NEVER = 1e30  # milliseconds of a plan on a target that cannot run it


@dataclass(frozen=True)
class Prices:
    """What shapes cost on a target, beside the teacher they come from."""

    teacher: ModelShape
    profile: Profile
    workload: Workload

    def of_shape(self, shape: ModelShape) -> dict[str, Measurement]:
        """Predict latency, size, memory and energy of a shape; the target is taken to have its number formats."""
        return predict(shape, self.profile, self.workload)

    def of_shapes(self, shapes: Sequence[ModelShape]) -> list[dict[str, Measurement]]:
        """Predict the same of many shapes at once."""
        return predict_all(shapes, self.profile, self.workload)

    def missing(self, shape: ModelShape) -> list[str]:
        """Return the number formats of a shape that the target lacks."""
        return sorted(shape.formats - set(self.profile.formats))

    def of(self, plan: Plan, size: float) -> dict[str, Any]:
        """Return a candidate's Measurements by the name of their field; `size` is the bytes of its artifact.

        Raises:
            TargetError: if the target lacks one of its number formats, or the memory.
        """
        profile, shape = self.profile, shape_after(plan, self.teacher)
        if missing := self.missing(shape):
            raise TargetError(
                f"{profile.name} cannot run {', '.join(missing)}; it runs {', '.join(sorted(profile.formats))}"
            )
        found: dict[str, Any] = self.of_shape(shape)
        if lack := self.lack(found):
            raise TargetError(lack)
        found["size_bytes"] = replace(found["size_bytes"], value=size, low=size, high=size, source="measured")
        return found | {"faster": predict_faster(self.teacher, shape, profile, self.workload)}

    def latency(self, plan: Plan) -> float:
        """Predict a plan's latency in milliseconds; `NEVER` if it cannot run here."""
        try:
            return float(self.of(plan, 0.0)["latency_ms"].value)
        except TargetError:
            return NEVER

    def here(self, candidate: Candidate) -> Candidate:
        """Return a candidate with its prices on this target; raises what `of` raises."""
        return replace(candidate, p90_ms=None, **self.of(candidate.plan, candidate.size_bytes.value))

    def basis(self, candidates: Sequence[Candidate]) -> dict[str, float]:
        """Return which part of candidates' latencies, on average, was measured or rests on numbers of each kind."""
        found: dict[str, float] = {}
        for each in candidates:
            own: Mapping[str, float] = {TIMED: 1.0}
            if each.latency_ms.source == "predicted":
                own = basis(shape_after(each.plan, self.teacher), self.profile, self.workload)
            for kind, share in own.items():
                found[kind] = found.get(kind, 0.0) + share / len(candidates)
        return {kind: round(found[kind], 4) for kind in (TIMED, *KINDS) if kind in found}

    def surely_beyond(self, shape: ModelShape, limits: Constraints) -> dict[str, float]:
        """Return what even the nearest ends of a shape's predicted prices are beyond, by the relative excess: limits,
        and the target's memory, "memory". Number formats that the target lacks are "format", with an excess of 1."""
        if self.missing(shape):
            return {"format": 1.0}
        found = self.of_shape(shape)
        excess = found["memory_bytes"].low / self.profile.memory.limit - 1
        return limits.surely_violated(found) | ({"memory": excess} if excess > 0 else {})

    def lack(self, predicted: Mapping[str, Measurement]) -> str:
        """Say how much memory is surely needed by predicted prices, and how much there is here; "" if it may fit."""
        need, most = predicted["memory_bytes"].low, self.profile.memory.limit
        if need <= most:
            return ""
        return (
            f"a call with {self.workload} needs at least {need / 1e9:.3g} GB of memory, but a program has at most "
            f"{most / 1e9:.3g} GB on {self.profile.name}"
        )

    def check(self, limits: Constraints) -> None:
        """Refuse limits on generation where nothing is generated.

        Raises:
            InputError: as `Constraints.check_generation`.
        """
        limits.check_generation(generates(self.teacher), self.workload)


def beyond_on_all(prices: Sequence[Prices], shape: ModelShape, limits: Constraints) -> dict[str, float]:
    """Return what a shape is surely beyond on the first target, by the relative excess, if it is beyond something on
    every target; nothing if one of them may take it."""
    first, *others = (each.surely_beyond(shape, limits) for each in prices)
    return first if all(others) else {}


def least_excesses(candidate: Candidate, others: Sequence[Prices], limits: Constraints) -> dict[str, float]:
    """Return how far a candidate is beyond each limit, on that target where it is nearest to meeting them all: the one
    that it has its numbers from, or one of the `others`."""
    found = [candidate]
    for prices in others:
        with suppress(TargetError):  # it cannot run there
            found.append(prices.here(candidate))
    return limits.excesses(min(found, key=lambda each: sum(limits.violations(each).values())))


def front_on(
    front: Front, candidates: Sequence[Candidate], prices: Prices, limits: Constraints
) -> tuple[Front, dict[str, str]]:
    """Return a run's front as it is on another target, among `candidates`; and by id why some cannot run there."""
    priced: list[Candidate] = []
    refused: dict[str, str] = {}
    for candidate in candidates:
        try:
            priced.append(prices.here(candidate))
        except TargetError as error:
            refused[candidate.id] = str(error)
    chosen, misses = choose(priced, limits, front.objectives)
    profile = prices.profile
    found = replace(
        front,
        target={
            "name": profile.name,
            "runtime": profile.runtime,
            "unit": profile.default_unit,
            "basis": prices.basis(chosen),
            "measured_on": None,
        },
        workload=asdict(prices.workload),
        baseline={
            **front.baseline,
            "latency_ms": prices.of_shape(prices.teacher)["latency_ms"].to_json(),
        },
        constraints=limits,
        candidates=tuple(chosen),
        nearest_misses=blocked(misses, limits),
    )
    return found, refused
