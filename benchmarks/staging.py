"""Whether the cheap stages of finished searches rank plans as the dear ones do.

    python benchmarks/staging.py runs/search/default-0 runs/search/uniform-0

For each pair of stages: Spearman's rank correlation, over the plans that went from one to the other, between the
quality kept in the earlier stage (few training steps, fewer examples) and in the later one, with a 95 % bootstrap
interval. It decides whether staging is valid; the plans that went on were chosen, which lowers it.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
from scipy.stats import bootstrap, spearmanr

from autolite.search.studies import read_trials

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial


def pairs(earlier: list[FrozenTrial], later: list[FrozenTrial]) -> list[tuple[float, float]]:
    """Return what was kept before and after, of each later trial whose plan an earlier one tried."""
    found = []
    for trial in later:
        before = [t for t in earlier if t.params.items() <= trial.params.items()]
        found += [(t.user_attrs["kept"], trial.user_attrs["kept"]) for t in before[:1]]
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


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
def main(runs: tuple[Path, ...]) -> None:
    together: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for run in runs:
        name = (run / ".name").read_text(encoding="utf-8")
        trials = read_trials(f"sqlite:///{(run / 'study.db').resolve()}", name)
        for earlier, later in combinations(trials, 2):
            points = pairs(trials[earlier], trials[later])
            together.setdefault((earlier, later), []).extend(points)
            click.echo(f"{run.name}: {earlier} to {later}: {correlation(points)}")
    if len(runs) > 1:
        for (earlier, later), points in together.items():
            click.echo(f"all: {earlier} to {later}: {correlation(points)}")


if __name__ == "__main__":
    main()
