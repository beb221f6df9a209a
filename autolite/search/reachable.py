"""Limits that no plan of a space comes near are refused before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator

import optuna

from autolite.architecture import ModelShape
from autolite.errors import InputError, PlanError
from autolite.limits import Limit
from autolite.measure import Measurement
from autolite.search.prices import Prices
from autolite.search.problem import Problem

_DRAWN = 300  # plans, beside the ends of the space
_Offers = list[tuple[Prices, dict[str, Measurement]]]  # what a plan costs on a target that can run it


def check_reachable(problem: Problem) -> None:
    """Refuse a limit, or a target's memory, that no plan of the space comes near on any target.

    Raises:
        InputError: naming the limit, and the nearest that the space comes to it.
    """
    _check_quality(problem)
    asked, teacher = problem.settings.constraints.asked, problem.teacher.shape
    crowded = all(prices.lack(prices.of_shape(teacher)) for prices in problem.prices)
    if not asked and not crowded:
        return
    offers: _Offers = [
        (prices, prices.of_shape(shape))
        for shape in _shapes(problem)
        for prices in problem.prices
        if not prices.missing(shape)
    ]
    if crowded and offers:
        _check_memory(problem, offers)
    for limit, bound in asked:
        _check(problem, limit, bound, [limit.nearest(found[limit.metric]) for _, found in offers])


def _check_quality(problem: Problem) -> None:
    least, task = problem.settings.constraints.min_quality, problem.task
    if least is None:
        return
    beyond = least - task.best if task.direction == "maximize" else task.best - least
    if not beyond <= 0:  # also false for nan
        raise InputError(f"--min-quality {least:g} cannot be met: the best possible {task.metric} is {task.best:g}")


def _shapes(problem: Problem) -> Iterator[ModelShape]:
    """Yield the shapes of the smallest plans of the space, of its ends, and of random ones."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    space, smallest = problem.space, problem.space.cheapest()
    drawn = [smallest, *space.variants(smallest)]
    drawn += [{**smallest, name: end} for name, setting in space.settings.items() for end in setting.extremes()]
    drawn += [space.suggest(study.ask(), "confirm") for _ in range(_DRAWN)]
    for params in drawn:
        try:
            yield problem.shape(problem.plan(params, 1))
        except PlanError:
            continue


def _check_memory(problem: Problem, offers: _Offers) -> None:
    prices, found = min(offers, key=lambda each: each[1]["memory_bytes"].low / each[0].profile.memory.limit)
    if lack := prices.lack(found):
        raise InputError(
            f"no plan of space '{problem.space.name}' fits: of the smallest, {lack}; ask for fewer tokens with "
            "--workload, or use another --space, model or target"
        )


def _check(problem: Problem, limit: Limit, bound: float, offered: list[float]) -> None:
    where = " or ".join(prices.profile.name for prices in problem.prices)
    if not offered:
        raise InputError(f"no plan of space '{problem.space.name}' can run on {where}: use another --space or target")
    best = min(offered, key=lambda value: limit.excess(value, bound))
    if limit.excess(best, bound) <= 0:
        return
    most, change = ("most", "lower") if limit.at_least else ("least", "raise")
    raise InputError(
        f"{limit.option} {_plain(bound)} {limit.unit} cannot be met: the {most} that space '{problem.space.name}' "
        f"reaches on {where} is {_plain(best)} {limit.unit}; {change} the limit or use another --space"
    )


def _plain(value: float) -> str:
    """A number without an exponent: 19,380 bytes, 0.05035 ms."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
