"""What a user asks of candidates: limits, each on a number that is measured of candidates and predicted of plans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from autolite.errors import InputError
from autolite.measure import Measurement, Workload

if TYPE_CHECKING:
    from autolite.front import Candidate

_ROUNDING = 1e-9  # the last bits of a float violate nothing


@dataclass(frozen=True, slots=True)
class Limit:
    """A limit on one number of a candidate.

    Attributes:
        name: what it is called where it blocks something.
        field: of `Constraints`.
        metric: of the candidate's Measurement; what is predicted of plans has the same name.
        unit: that people read.
        at_least: whether the number must not be below it, in the place of above.
    """

    name: str
    field: str
    metric: str
    unit: str
    at_least: bool = False

    @property
    def option(self) -> str:
        """The option of the command line."""
        return f"--{self.name.replace('_', '-')}"

    def excess(self, value: float, limit: float) -> float:
        """Return how far a value is beyond a limit, relative to that; <= 0 holds. Of a rate it is the time of one that
        is compared, so that half of what is asked for is as far beyond as twice as long."""
        if self.at_least:
            return limit / value - 1 if value > 0 else float("inf")
        return value / limit - 1

    def nearest(self, found: Measurement) -> float:
        """Return that end of an interval which comes nearest to meeting the limit."""
        return found.high if self.at_least else found.low


LIMITS = (
    Limit("max_latency", "max_latency_ms", "latency_ms", "ms"),
    Limit("max_ttft", "max_ttft_ms", "ttft_ms", "ms"),
    Limit("min_tokens_per_second", "min_tokens_per_second", "tokens_per_second", "tokens/s", at_least=True),
    Limit("max_size", "max_size_bytes", "size_bytes", "bytes"),
    Limit("max_memory", "max_memory_bytes", "memory_bytes", "bytes"),
)
OF_GENERATION = ("max_ttft", "min_tokens_per_second")


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraints:
    """What the user asked for; None means no limit. `max_drop` 0.01 keeps 99 % of the teacher's quality (for
    perplexity: a loss at most 0.01 nats above the teacher's); `strict` asks it of the interval's lower bound. `ttft` is
    the time to the first token; tokens a second are those of all sequences together."""

    max_drop: float | None = None
    min_quality: float | None = None
    max_latency_ms: float | None = None
    max_ttft_ms: float | None = None
    min_tokens_per_second: float | None = None
    max_size_bytes: float | None = None
    max_memory_bytes: float | None = None
    strict: bool = False

    @property
    def asked(self) -> list[tuple[Limit, float]]:
        """The limits on speed, size and memory that are set."""
        found = ((limit, getattr(self, limit.field)) for limit in LIMITS)
        return [(limit, value) for limit, value in found if value is not None]

    def replaced_by(self, others: Constraints) -> Constraints:
        """Return these limits with those of `others` that are set in their places."""
        given = {each.name: (getattr(others, each.name), each.default) for each in fields(others)}
        return replace(self, **{name: value for name, (value, default) in given.items() if value != default})

    def excesses(self, candidate: Candidate) -> dict[str, float]:
        """Return for each limit that is set how far the candidate is beyond it, relative to the limit; <= 0 holds. A
        number that the candidate does not have is beyond its limit by 1."""
        found: dict[str, float] = {}
        if self.max_drop is not None:
            kept = candidate.kept.low if self.strict else candidate.kept.value
            found["max_drop"] = 1 - self.max_drop - kept
        if self.min_quality is not None:
            sign = 1 if candidate.quality.direction == "maximize" else -1
            found["min_quality"] = (
                sign * (self.min_quality - candidate.quality.value) / max(abs(self.min_quality), 1e-9)
            )
        for limit, bound in self.asked:
            number: Measurement | None = getattr(candidate, limit.metric)
            found[limit.name] = 1.0 if number is None else limit.excess(number.value, bound)
        return found

    def violations(self, candidate: Candidate) -> dict[str, float]:
        """Return the excesses of the limits that are violated; empty if all hold."""
        return {name: excess for name, excess in self.excesses(candidate).items() if excess > _ROUNDING}

    def hold(self, predicted: Mapping[str, Measurement]) -> bool:
        """Whether predicted prices are within the limits on them, their intervals aside."""
        return all(limit.excess(predicted[limit.metric].value, bound) <= 0 for limit, bound in self.asked)

    def surely_violated(self, predicted: Mapping[str, Measurement]) -> dict[str, float]:
        """Return by how much even the nearest ends of predicted intervals are beyond limits; empty if all may hold."""
        found = {limit.name: limit.excess(limit.nearest(predicted[limit.metric]), bound) for limit, bound in self.asked}
        return {name: excess for name, excess in found.items() if excess > 0}

    def check_generation(self, generates: bool, workload: Workload) -> None:
        """Refuse limits on generation where nothing is generated.

        Without generated tokens a call of a language model is its prompt, and `max_ttft_ms` is a limit on that.

        Args:
            generates: whether the model is one that does.
            workload: of the calls that are priced.

        Raises:
            InputError: naming the limit and what to give.
        """
        given = [f"{limit.option} {value:g}" for limit, value in self.asked if limit.name in OF_GENERATION]
        if given and not generates:
            raise InputError(
                f"{given[0]} is for language models, and this model generates no text: limit whole calls with "
                "--max-latency"
            )
        if self.min_tokens_per_second is not None and not workload.generated:
            raise InputError(
                f"{given[-1]}: a call with {workload} generates nothing; search or price with how much it shall, as in "
                "--workload tokens=128,generated=64"
            )
