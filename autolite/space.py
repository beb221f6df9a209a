"""A search space: YAML -> Optuna distributions -> Plan.

A space lists the techniques in the order they are applied; each setting is a value (fixed; `value: [...]` for one that
is a list itself), a list (one of these) or a range (`low`, `high`, and `step` or `log`). `stage` names the fidelity
from which a setting is searched; before it, `default` holds. Parameters are called "technique.setting" in the study.

A list that has `by-layer` among its choices is also searched with a level for each layer. What is drawn then are a few
numbers for the whole model ("frontier.…"), of which `autolite.search.frontier` makes the levels.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from autolite import formats, registry
from autolite.errors import PlanError, SpaceError, unknown
from autolite.plan import Plan, make_step

if TYPE_CHECKING:
    from optuna import Trial

Stage = Literal["screen", "recover", "confirm"]
STAGES: tuple[Stage, ...] = ("screen", "recover", "confirm")
Scalar = bool | int | float | str
Fixed = Scalar | tuple[Scalar, ...]
Params = dict[str, Any]

BY_LAYER = "by-layer"
FRONTIER = "frontier"  # before the names of the numbers that levels by layer are made of
PRICES = ("latency", "size")
THIRDS = ("first", "middle", "last")


class Setting(BaseModel):
    """One searched setting: `choices`, or a range from `low` to `high`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    choices: tuple[Scalar, ...] | None = None
    low: float | int | None = None
    high: float | int | None = None
    step: float | int | None = None
    log: bool = False
    stage: Stage = "screen"
    default: Scalar | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Setting:
        if (self.choices is None) == (self.low is None):
            raise ValueError("give either a list of choices, or low and high")
        if self.choices is not None and len(self.choices) < 1:
            raise ValueError("the list of choices is empty")
        if self.low is not None and (self.high is None or self.low > self.high):
            raise ValueError(f"low <= high must hold, but got low={self.low}, high={self.high}")
        if self.log and self.step is not None:
            raise ValueError("log and step exclude each other")
        if self.stage != "screen" and self.default is None:
            raise ValueError(f"a setting searched from stage '{self.stage}' needs a default for the stages before it")
        return self

    @property
    def levels(self) -> tuple[Scalar, ...]:
        """The choices but for "by-layer"."""
        return tuple(choice for choice in self.choices or () if choice != BY_LAYER)

    @property
    def by_layer(self) -> bool:
        """Whether a level for each layer is among the choices."""
        return BY_LAYER in (self.choices or ())

    def suggest(self, trial: Trial, name: str) -> Scalar:
        """Draw this setting in an Optuna trial; a value drawn or enqueued before is kept."""
        if self.choices is not None:
            return trial.suggest_categorical(name, self.choices)  # type: ignore[return-value]
        low, high, step = self.low, self.high, self.step
        assert low is not None
        assert high is not None
        if isinstance(low, int) and isinstance(high, int) and isinstance(step or 1, int):
            return trial.suggest_int(name, low, high, step=int(step or 1), log=self.log)
        return trial.suggest_float(name, low, high, step=step, log=self.log)

    def extremes(self) -> tuple[Scalar, ...]:
        """Return every choice, or both ends of the range."""
        if self.choices is not None:
            return self.choices
        assert self.low is not None
        assert self.high is not None
        return (self.low, self.high)


class StageLimits(BaseModel):
    """How many trials a stage runs at most under a time budget, and how much training each gets by default."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    trials: int = Field(ge=1)
    effort: int = Field(ge=0)
    max_effort: int = Field(default=100_000, ge=0)


class Space(BaseModel):
    """A validated search space."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    description: str
    steps: tuple[dict[str, dict[str, Setting | Fixed]], ...]
    stages: dict[Stage, StageLimits]
    start: tuple[dict[str, Scalar], ...] = ()

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Space:
        """Return a copy, in which what is derived from the fields is derived anew."""
        copied = super().model_copy(update=update, deep=deep)
        for derived in ("techniques", "settings", "layered"):
            copied.__dict__.pop(derived, None)
        return copied

    @cached_property
    def techniques(self) -> list[tuple[str, dict[str, Setting | Fixed]]]:
        """The steps as (technique, settings), in order."""
        return [next(iter(step.items())) for step in self.steps]

    @cached_property
    def settings(self) -> dict[str, Setting]:
        """The searched settings by parameter name ("prune.heads"), and the numbers that levels by layer are made of."""
        found = {
            f"{technique}.{key}": setting
            for technique, settings in self.techniques
            for key, setting in settings.items()
            if isinstance(setting, Setting)
        }
        layered = [name for name, setting in found.items() if setting.by_layer]
        return (
            found
            | {f"{FRONTIER}.{price}": _PRICE for price in PRICES if layered}
            | {f"{FRONTIER}.{name}": _WEIGHT for name in (*layered, *THIRDS) if layered}
        )

    @cached_property
    def layered(self) -> dict[str, Setting]:
        """The settings that can have a level for each layer, by parameter name."""
        return {name: setting for name, setting in self.settings.items() if setting.by_layer}

    def cheapest(self) -> Params:
        """Return the lowest end of every setting, and prices at which every layer has its cheapest level."""
        lowest = {n: min(s.extremes(), key=lambda v: (isinstance(v, str), v)) for n, s in self.settings.items()}
        return {n: _PRICE.high if n in _PRICED else value for n, value in lowest.items()}

    @property
    def trains(self) -> bool:
        """Whether any technique of this space trains."""
        return any(registry.get("technique", name).effort for name, _ in self.techniques)

    def suggest(self, trial: Trial, stage: Stage) -> Params:
        """Draw everything that is searched at `stage`."""
        reached = STAGES[: STAGES.index(stage) + 1]
        return {name: s.suggest(trial, name) for name, s in self.settings.items() if s.stage in reached}

    def complete(self, params: Mapping[str, Any]) -> Params:
        """Return `params` with defaults for the settings that it lacks (else the first choice, or the low end)."""
        return {n: params.get(n, s.extremes()[0] if s.default is None else s.default) for n, s in self.settings.items()}

    def plan(
        self,
        params: Mapping[str, Any],
        effort: int,
        seed: int,
        by_layer: Mapping[str, tuple[Scalar, ...]] | None = None,
    ) -> Plan:
        """Decode `params` into a plan whose training steps have `effort`. Deterministic.

        `by_layer` are the levels of the settings whose value is "by-layer", one for each layer.
        """
        values = {**self.complete(params), **(by_layer or {})}
        for name in self.layered:  # one plan has one name
            if isinstance(values[name], list | tuple) and len(set(values[name])) == 1:
                values[name] = values[name][0]
        steps = []
        for name, settings in self.techniques:
            technique = registry.get("technique", name)
            config = {key: values.get(f"{name}.{key}", setting) for key, setting in settings.items()}
            if technique.effort:
                config[technique.effort] = effort
            steps.append(make_step(name, config))
        return Plan(tuple(steps), seed)

    @property
    def trains_formats(self) -> bool:
        """Whether a technique trains after one that sets number formats: then each format is a student of its own."""
        kinds = [registry.get("technique", name) for name, _ in self.techniques]
        return any(a.numeric and b.effort for i, a in enumerate(kinds) for b in kinds[i:])

    def variants(self, params: Mapping[str, Any]) -> Iterator[Params]:
        """Yield `params` with every other combination of number formats: one student, many formats."""
        numeric = {name for name, _ in self.techniques if registry.get("technique", name).numeric}
        free: dict[str, tuple[Any, ...]] = {
            name: (params[name], *setting.levels) if isinstance(params.get(name), list | tuple) else setting.choices
            for name, setting in self.settings.items()
            if name.split(".")[0] in numeric and setting.choices and set(setting.levels) <= set(formats.FORMATS)
        }
        for values in product(*free.values()):
            other = {**params, **dict(zip(free, values, strict=True))}
            if other != dict(params):
                yield other

    def only(self, techniques: Collection[str]) -> Space:
        """Return the space with just the steps of these techniques; start plans lose the others' settings."""
        steps = tuple(step for step in self.steps if set(step) <= set(techniques))
        start: list[dict[str, Scalar]] = []
        for plan in self.start:
            kept = {name: value for name, value in plan.items() if name.partition(".")[0] in techniques}
            if kept and kept not in start:
                start.append(kept)
        return self.model_copy(update={"steps": steps, "start": tuple(start)})

    def without(self, instead: Mapping[str, Mapping[Any, Scalar]]) -> Space:
        """Return the space without some choices.

        Args:
            instead: for the parameters concerned, the choices that go, each with the one that takes its place in start
                plans and defaults.
        """

        def other(name: str, value: Scalar | None) -> Any:
            return instead.get(name, {}).get(value, value)

        def fewer(name: str, setting: Setting | Fixed) -> Setting | Fixed:
            gone = instead.get(name, {})
            if not isinstance(setting, Setting) or setting.choices is None or not gone:
                return setting
            choices = tuple(choice for choice in setting.choices if choice not in gone)
            return Setting(choices=choices, stage=setting.stage, default=other(name, setting.default))

        steps = tuple(
            {name: {key: fewer(f"{name}.{key}", setting) for key, setting in settings.items()}}
            for name, settings in self.techniques
        )
        start: list[dict[str, Scalar]] = []
        for plan in self.start:
            changed = {name: other(name, value) for name, value in plan.items()}
            if changed not in start:
                start.append(changed)
        return self.model_copy(update={"steps": steps, "start": tuple(start)})


_PRICE = Setting(low=1e-4, high=1e2, log=True, default=1e-2)  # nats for the whole of the teacher's latency or size
_WEIGHT = Setting(low=1 / 8, high=8.0, log=True, default=1.0)  # of an estimated rise of the loss
_PRICED = tuple(f"{FRONTIER}.{price}" for price in PRICES)


@dataclass(frozen=True)
class _Source:
    """Where a space was read from, for messages."""

    path: Path

    def error(self, where: str, what: str) -> SpaceError:
        return SpaceError(f"search space {self.path.name}: {where}: {what}")


def space_names() -> list[str]:
    """Return the names of the shipped search spaces."""
    return sorted(path.stem for path in registry.data_dir("search_spaces").glob("*.yaml"))


def load_space(name: str) -> Space:
    """Read a search space by name, or by the path of a YAML file, and check it against the techniques' settings.

    Raises:
        SpaceError: naming the file, the setting, the value and what is allowed.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = registry.data_dir("search_spaces") / f"{name}.yaml"
        if not path.is_file():
            raise SpaceError(unknown("search space", name, space_names()))
    source = _Source(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SpaceError(f"no such search space file: {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise source.error("not YAML", str(error).replace("\n", " ")) from None
    if not isinstance(data, dict):
        raise source.error("top level", f"a mapping is needed, but got {type(data).__name__}")
    for step in data.get("steps") or []:
        _expand_lists(step, source)
    try:
        space = Space(**data)
    except ValidationError as error:
        first = error.errors()[0]
        raise source.error(".".join(map(str, first["loc"])), f"{first['msg']}, got {first.get('input')!r}") from None
    _check(space, source)
    return space


def _expand_lists(step: Any, source: _Source) -> None:
    """Turn the short form `setting: [a, b]` into `setting: {choices: [a, b]}`, and `setting: {value: [a, b]}` into the
    fixed value (a, b), in place."""
    if not isinstance(step, dict) or len(step) != 1:
        raise source.error("steps", f"each step is one 'technique: settings', but got {step!r}")
    for name, settings in step.items():
        settings = step[name] = settings or {}
        if not isinstance(settings, dict):
            raise source.error(f"steps.{name}", f"a mapping of settings is needed, but got {settings!r}")
        for key, value in settings.items():
            match value:
                case list():
                    settings[key] = {"choices": value}
                case {"value": list(fixed), **rest} if not rest:
                    settings[key] = tuple(fixed)


def _check(space: Space, source: _Source) -> None:
    """Try every setting of every technique at its extremes: a bad space fails here, not in the middle of a search."""
    for stage in STAGES:
        if stage not in space.stages:
            raise source.error("stages", f"'{stage}' is missing; needed: {', '.join(STAGES)}")
    for name, settings in space.techniques:
        if name not in registry.names("technique"):
            raise source.error("steps", unknown("technique", name, registry.names("technique")))
        effort = registry.get("technique", name).effort
        for key, setting in settings.items():
            if key == effort:
                raise source.error(f"steps.{name}.{key}", "is set by 'stages.<stage>.effort', not searched")
            able = sorted(getattr(registry.get("technique", name), "layered", ()))
            if isinstance(setting, Setting) and setting.by_layer and key not in able:
                known = ", ".join(able) or "none"
                raise source.error(
                    f"steps.{name}.{key}", f"cannot differ between layers; of {name}'s these can: {known}"
                )
            if isinstance(setting, Setting) and setting.by_layer and not setting.levels:
                raise source.error(f"steps.{name}.{key}", "has no level beside 'by-layer'")
            values = (setting.levels or setting.extremes()) if isinstance(setting, Setting) else (setting,)
            if isinstance(setting, Setting) and setting.default is not None:
                values = (*values, setting.default)
            for value in values:
                try:
                    make_step(name, {key: value})
                except PlanError as error:
                    raise source.error("steps", str(error)) from None
    for start in space.start:
        for name, value in start.items():
            if name not in space.settings:
                near = difflib.get_close_matches(name, space.settings, n=1)
                hint = f"; did you mean '{near[0]}'?" if near else ""
                raise source.error("start", f"'{name}' is not a searched setting{hint}")
            setting = space.settings[name]
            low, high = setting.extremes()[0], setting.extremes()[-1]
            inside = value in setting.choices if setting.choices else low <= value <= high  # type: ignore[operator]
            if not inside:
                raise source.error("start", f"{name} = {value!r} is not among {setting.choices or (low, high)}")
