"""What plans cost on a target, without their weights, and what a front is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from autolite.architecture import ModelShape
from autolite.compress import shape_after
from autolite.errors import TargetError
from autolite.front import Candidate, Constraints, Front
from autolite.hardware.predict import predict, predict_faster
from autolite.hardware.profile import Profile
from autolite.measure import Workload
from autolite.plan import Plan
from autolite.search.choose import blocked, choose


@dataclass(frozen=True)
class Prices:
    """What shapes cost on a target, beside the teacher they come from."""

    teacher: ModelShape
    profile: Profile
    workload: Workload

    def of(self, plan: Plan, size: float) -> dict[str, Any]:
        """Return a candidate's Measurements by the name of their field; `size` is the bytes of its artifact.

        Raises:
            TargetError: if the target lacks one of its number formats, or the memory.
        """
        profile, shape = self.profile, shape_after(plan, self.teacher)
        if missing := sorted(shape.formats - set(profile.formats)):
            raise TargetError(
                f"{profile.name} cannot run {', '.join(missing)}; it runs {', '.join(sorted(profile.formats))}"
            )
        found = predict(shape, profile, self.workload)
        need, there = found["memory_bytes"].low, profile.memory.size.value * 1e9
        if need > there:
            raise TargetError(f"it needs at least {need / 1e9:.3g} GB of the {there / 1e9:g} GB of {profile.name}")
        found["size_bytes"] = replace(found["size_bytes"], value=size, low=size, high=size, source="measured")
        return found | {"faster": predict_faster(self.teacher, shape, profile, self.workload)}


def front_on(
    front: Front, candidates: Sequence[Candidate], prices: Prices, limits: Constraints
) -> tuple[Front, dict[str, str]]:
    """Return a run's front as it is on another target, among `candidates`; and by id why some cannot run there."""
    priced: list[Candidate] = []
    refused: dict[str, str] = {}
    for candidate in candidates:
        try:
            priced.append(replace(candidate, p90_ms=None, **prices.of(candidate.plan, candidate.size_bytes.value)))
        except TargetError as error:
            refused[candidate.id] = str(error)
    chosen, misses = choose(priced, limits, front.objectives)
    profile = prices.profile
    found = replace(
        front,
        target={"name": profile.name, "runtime": profile.runtime, "unit": profile.default_unit},
        workload=asdict(prices.workload),
        baseline={
            **front.baseline,
            "latency_ms": predict(prices.teacher, profile, prices.workload)["latency_ms"].to_json(),
        },
        constraints=limits,
        candidates=tuple(chosen),
        nearest_misses=blocked(misses, limits),
    )
    return found, refused
