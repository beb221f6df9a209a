"""Number formats that gain nothing on this target at this workload are left out before a search begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

import torch

from autolite import formats, registry
from autolite.errors import PlanError, SpaceError
from autolite.search.evaluate import price
from autolite.search.problem import Problem
from autolite.space import BY_LAYER, Setting, Space
from autolite.techniques.calibrate import grid

EQUAL = 1.02  # latencies within this factor are not told apart
_SIZE = 256  # of the matrices that rounding errors are computed on


@dataclass(frozen=True)
class Option:
    """A number format that a space offers for a group of matrices: its rounding error, and what models cost with it,
    one latency in milliseconds and one size in bytes for each of the space's start plans."""

    format: str
    error: float
    latencies: tuple[float, ...]
    sizes: tuple[float, ...]


def narrow(problem: Problem, note: Callable[[str], None]) -> Space:
    """Return the problem's space without the number formats that cannot be run, or that another one beats.

    Formats are compared in the space's start plans, each put in the place of what the plan has for that group. Where a
    start plan has a format that is left out, the one that beats it takes its place.

    Args:
        problem: of which the space, the target, the workload and the runtime are used.
        note: told in one sentence a group what is left out, and what is tried although it is slower.

    Raises:
        SpaceError: if a group is offered no format that can be run.
    """
    instead: dict[str, dict[str, str]] = {}
    for name, setting in _format_settings(problem.space):
        instead[name] = {}
        runnable, remarks = _runnable(problem, name, setting)
        # Prices that describe another runtime say nothing of which formats are fast on this one, and those of one
        # target nothing of which are on another.
        comparable = problem.runtime.name == problem.profile.runtime and not problem.others
        options = _options(problem, name, runnable) if comparable else []
        better = beaten(options)
        remarks += [
            f"{worse} is neither smaller nor faster than {best} here: not tried" for worse, best in better.items()
        ]
        kept = [option for option in options if option.format not in better]
        remarks += [
            f"{slow} is slower than {fast} here: tried for its size only" for slow, fast in slower(kept).items()
        ]
        first = next(form for form in runnable if form not in better)
        for choice in setting.levels:
            if choice not in runnable or choice in better:
                instead[name][str(choice)] = better.get(str(choice), first)
        if remarks:
            note(f"{name.rpartition('.')[2]}: {'; '.join(remarks)}")
    return problem.space.without(instead)


def _format_settings(space: Space) -> Iterator[tuple[str, Setting]]:
    """Yield the searched settings that choose among number formats."""
    for name, setting in space.settings.items():
        named = setting.levels and all(level in formats.FORMATS for level in setting.levels)
        if named and registry.get("technique", name.partition(".")[0]).numeric:
            yield name, setting


def _runnable(problem: Problem, name: str, setting: Setting) -> tuple[list[str], list[str]]:
    """Return the choices that the runtime and the target can run, and what to say of the others."""
    runnable, remarks = [str(level) for level in setting.levels], []
    for what, known in (
        (problem.runtime.name, problem.runtime.formats),
        (problem.profile.name, problem.profile.formats),
    ):
        lacking = [form for form in runnable if form not in known]
        runnable = [form for form in runnable if form in known]
        if lacking:
            remarks.append(f"{what} cannot run {', '.join(lacking)}: not tried")
        if not runnable:
            raise SpaceError(
                f"search space {problem.space.name}: {name} offers only {', '.join(lacking)}, which {what} cannot run; "
                f"it runs {', '.join(sorted(known))}"
            )
    return runnable, remarks


def _options(problem: Problem, name: str, choices: Sequence[str]) -> list[Option]:
    """Price every choice in every start plan; plans in which one of them is not possible are left out."""
    found = []
    alike = {key: setting.levels[0] for key, setting in problem.space.layered.items()}
    for start in problem.space.start or ({},):
        params = {key: alike[key] if value == BY_LAYER else value for key, value in start.items()}
        with suppress(PlanError):  # such as a tied head in another format than its embedding
            plans = [problem.plan({**alike, **params, name: choice}, 1) for choice in choices]
            found.append([price(problem, problem.shape(plan)) for plan in plans])
    return [
        Option(
            choice,
            rounding(choice),
            tuple(prices[i]["latency_ms"].value for prices in found),
            tuple(prices[i]["size_bytes"].value for prices in found),
        )
        for i, choice in enumerate(choices)
    ]


def beaten(options: Sequence[Option]) -> dict[str, str]:
    """Return the formats that another one dominates, each with one that stays and takes its place."""
    by = {}
    for option in options:
        better = [other for other in options if dominates(other, option)]
        if better:
            by[option.format] = min(better, key=lambda other: other.error).format
    ends = {}
    for form in by:
        end = by[form]
        while end in by:  # dominance has no cycles
            end = by[end]
        ends[form] = end
    return ends


def dominates(one: Option, other: Option) -> bool:
    """Whether `one` rounds no more than `other`, is nowhere larger or slower, and is better in one of these.

    Latencies within 2 % are equal, unless they are all that the two differ in: then a difference of more than that
    somewhere and none the other way is needed, so that no formats dominate each other in a circle.
    """
    if not one.latencies or one.error > other.error or any(a > b for a, b in zip(one.sizes, other.sizes, strict=True)):
        return False
    pairs = list(zip(one.latencies, other.latencies, strict=True))
    if (one.error, one.sizes) != (other.error, other.sizes):
        return all(a <= EQUAL * b for a, b in pairs)
    return all(a <= b for a, b in pairs) and any(EQUAL * a < b for a, b in pairs)


def slower(options: Sequence[Option]) -> dict[str, str]:
    """Return the formats that are slower everywhere than one that rounds less, each with the fastest such one."""
    found = {}
    for option in options:
        faster = [
            other
            for other in options
            if other.error < option.error
            and all(EQUAL * a < b for a, b in zip(other.latencies, option.latencies, strict=True))
        ]
        if faster and option.latencies:
            found[option.format] = min(faster, key=lambda other: sum(other.latencies)).format
    return found


@cache
def rounding(form: str) -> float:
    """Return the relative squared error that a product in this format makes on normally distributed numbers: that of
    the weights, and of the activations where the format is one that rounds them to 8 bits."""
    generator = torch.Generator().manual_seed(0)
    weights, inputs = torch.randn(2, _SIZE, _SIZE, generator=generator)
    error = _relative(formats.decode(formats.encode(weights, form)), weights)
    if formats.get(form).activations in ("dynamic", "static"):
        scale, zero = grid(float(inputs.min()), float(inputs.max()))
        error += _relative(((inputs / scale + zero).round() - zero) * scale, inputs)
    return error


def _relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).square().sum() / exact.square().sum())
