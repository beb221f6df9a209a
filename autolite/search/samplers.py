"""What proposes the next plan: Optuna samplers, made anew for each trial and seeded by its number."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from autolite.errors import InputError, unknown

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

# Makes a sampler from a seed. A study that is resumed, or has several workers, then asks what an undisturbed one would.
MakeSampler = Callable[[int], "BaseSampler"]

# Optuna is imported when a sampler is made: the command line reads the names for its help.


def _tpe(seed: int) -> BaseSampler:
    from optuna.samplers import TPESampler

    return TPESampler(seed=seed, multivariate=True, group=True)


def _gp(seed: int) -> BaseSampler:
    from optuna.samplers import GPSampler

    return GPSampler(seed=seed, deterministic_objective=True)


def _nsga2(seed: int) -> BaseSampler:
    from optuna.samplers import NSGAIISampler

    return NSGAIISampler(seed=seed, population_size=16)  # of the few dozen trials of a screen


def _random(seed: int) -> BaseSampler:
    from optuna.samplers import RandomSampler

    return RandomSampler(seed=seed)


ADDITIVE = "additive"  # levels by layer are then proposed by `autolite.search.additive`; what is left is for TPE
SAMPLERS: dict[str, MakeSampler] = {ADDITIVE: _tpe, "tpe": _tpe, "gp": _gp, "nsga2": _nsga2, "random": _random}


def sampler_of(choice: str | MakeSampler) -> MakeSampler:
    """Return what makes the samplers of a search: one of `SAMPLERS` by name, or the user's own function of a seed.

    Raises:
        InputError: if there is no such name.
    """
    if callable(choice):
        return choice
    if choice not in SAMPLERS:
        raise InputError(unknown("sampler", choice, SAMPLERS))
    return SAMPLERS[choice]
