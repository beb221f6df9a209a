"""Plan: what is done to a model, as data. An ordered tuple of (technique name, frozen config), with a seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from autolite import registry
from autolite.errors import PlanError, unknown


class Config(BaseModel):
    """Base of every technique's settings: frozen, hashable, JSON, and strict about unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class Step:
    """One technique and its settings."""

    technique: str
    config: Config


@dataclass(frozen=True)
class Plan:
    """What is done to a model, in order. The empty plan is the teacher itself.

    Equal plans have equal digests; `seed` is the only source of randomness of everything the plan does.
    """

    steps: tuple[Step, ...] = ()
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain JSON types."""
        return {
            "seed": self.seed,
            "steps": [{"technique": s.technique, "config": s.config.model_dump(mode="json")} for s in self.steps],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Rebuild a plan from `to_json`'s form.

        Raises:
            PlanError: if a step or field is unknown or a value is out of its range.
        """
        try:
            steps = tuple(make_step(s["technique"], s["config"]) for s in data["steps"])
            return cls(steps, int(data["seed"]))
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"not a plan: {error!r} in {json.dumps(data, default=str)[:200]}") from error

    @cached_property
    def digest(self) -> str:
        """First 12 hexadecimal digits of the SHA-256 of the canonical JSON."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:12]

    def describe(self) -> str:
        """Return what is done in a few words: the settings that differ from their defaults."""
        words = []
        for step in self.steps:
            given = step.config.model_dump(exclude_defaults=True)
            text = " ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in given.items())
            if text:
                words.append(f"{step.technique}({text})")
        return " + ".join(words) or "unchanged"

    def only(self, keep: Callable[[str], bool]) -> Plan:
        """Return the plan with just the steps whose technique name satisfies `keep`."""
        return replace(self, steps=tuple(s for s in self.steps if keep(s.technique)))


def make_step(technique: str, config: Mapping[str, Any]) -> Step:
    """Validate `config` for the technique of that name and return the step.

    Raises:
        PlanError: naming the field, its value and what is allowed.
    """
    kind = registry.get("technique", technique).Config
    strange = sorted(set(config) - set(kind.model_fields))
    if strange:
        raise PlanError(f"{technique}: {unknown('setting', strange[0], kind.model_fields)}")
    try:
        return Step(technique, kind(**config))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise PlanError(f"{technique}.{where}: {first['msg']}, but got {first.get('input')!r}") from None
