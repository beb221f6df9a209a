"""Whether the cheap stages of finished searches rank plans as the dear ones do.

    pip install scipy
    python benchmarks/staging.py runs/search/default-0 runs/search/uniform-0

For each pair of stages and rungs: Spearman's rank correlation, over the plans that went from one to the other, between
the quality kept in the earlier stage (few training steps, fewer examples) and in the later one, with a 95 % bootstrap
interval. It decides whether staging is valid; the plans that went on were chosen, which lowers it.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

import click
import numpy as np
from scipy.stats import bootstrap, spearmanr
from search import rung

from autolite import registry
from autolite.plan import Plan
from autolite.search.additive import log_lost
from autolite.search.outlook import PAIRS, columns_of, ridge
from autolite.search.promotion import lost
from autolite.search.studies import read_trials
from autolite.space import Space, Stage, load_space
from autolite.store import database_of

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial


def pairs(earlier: list[FrozenTrial], later: list[FrozenTrial]) -> list[tuple[float, float]]:
    """Return what was kept before and after, of each plan that both tried, with any training; the mean of several."""
    before, after = kept(earlier), kept(later)
    return [(mean(before[plan]), mean(after[plan])) for plan in after if plan in before]


def kept(trials: list[FrozenTrial]) -> dict[str, list[float]]:
    """Return what was kept in each trial of each plan."""
    found: dict[str, list[float]] = {}
    for trial in trials:
        found.setdefault(untrained(trial), []).append(trial.user_attrs["kept"])
    return found


def untrained(trial: FrozenTrial) -> str:
    """Name a trial's plan by its steps that do not train."""
    plan = Plan.from_json(trial.user_attrs["plan"])
    return plan.only(lambda name: not registry.get("technique", name).effort).digest


def rungs(trials: dict[Stage, list[FrozenTrial]]) -> dict[str, list[FrozenTrial]]:
    """Return the trials of each stage, and of recovery those of each rung, in order."""
    found: dict[str, list[FrozenTrial]] = {}
    for stage, each in trials.items():
        queues = list(dict.fromkeys(rung(t) for t in each)) if stage == "recover" else [""]
        for number, queue in enumerate(queues, 1):
            name = stage if stage != "recover" else f"{stage} {number}"
            found[name] = [t for t in each if stage != "recover" or rung(t) == queue]
    return found


def correlation(points: list[tuple[float, float]]) -> str:
    """Return Spearman's correlation with its interval, in words."""
    if len(points) < 4:
        return f"{len(points)} plans: too few"
    x, y = np.array(points).T
    value = spearmanr(x, y).statistic
    if len(points) < 8:
        return f"{value:.2f} ({len(points)} plans)"
    with np.errstate(all="ignore"):
        spread = bootstrap(
            (x, y), lambda a, b: spearmanr(a, b).statistic, paired=True, vectorized=False, method="percentile", rng=0
        ).confidence_interval
    return f"{value:.2f} ({spread.low:.2f} to {spread.high:.2f}; {len(points)} plans)"


def outlook(space: Space, trials: dict[str, list[FrozenTrial]]) -> str:
    """Return by how much what is lost after the first rung of recovery is expected wrongly, each plan left out in turn:
    from the screen's scores alone, and from all that `autolite.search.outlook` goes by."""
    after = {t.user_attrs["recipe"]: t for t in trials.get("recover 1", [])}
    both = [t for t in trials["screen"] if t.user_attrs["recipe"] in after]
    if len(both) < PAIRS:
        return f"{len(both)} plans: too few"
    found = log_lost(lost([after[t.user_attrs["recipe"]] for t in both]))
    columns, others = columns_of(space, both), ~np.eye(len(both), dtype=bool)
    errors = []
    for known in (columns[:, :1], columns):
        left_out = [ridge(known[rest], found[rest], known[~rest])[0] for rest in others]
        errors.append(np.exp(np.sqrt(np.mean((np.array(left_out) - found) ** 2))))
    return f"by a factor of {errors[0]:.2f} from the screen alone, {errors[1]:.2f} from all ({len(both)} plans)"


@click.command()
@click.option("--space", default="default", show_default=True, help="The space of the runs.")
@click.argument("runs", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
def main(space: str, runs: tuple[Path, ...]) -> None:
    together: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for run in runs:
        trials = rungs(read_trials(*database_of(run, None)))
        for earlier, later in combinations(trials, 2):
            points = pairs(trials[earlier], trials[later])
            together.setdefault((earlier, later), []).extend(points)
            click.echo(f"{run.name}: {earlier} to {later}: {correlation(points)}")
        click.echo(f"{run.name}: what recovery leaves lost is expected wrongly {outlook(load_space(space), trials)}")
    if len(runs) > 1:
        for (earlier, later), points in together.items():
            click.echo(f"all: {earlier} to {later}: {correlation(points)}")


if __name__ == "__main__":
    main()
