"""How good a search is, without training: methods on a table of every plan of a small space (`tabular_data.py`).

    python benchmarks/tabular.py --seeds 10

A method is a function that returns the plans that it evaluates, in order. Repeats cost it nothing. What it found is
judged by the hypervolume of (rise of the loss over the teacher's, log latency, log bytes), as a part of the hypervolume
of the true front, which is known. The reference point is `REFERENCE` nats, and a tenth above the dearest plan's latency
and bytes.
"""

from __future__ import annotations

import itertools
import json
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import click
import numpy as np
import optuna

from autolite.pareto import gains, hypervolume, nondominated, spread_subset
from autolite.search.additive import LEAST, SWITCHES, corrected, draws

FILE = Path(__file__).parent / "data" / "tabular.npz"
REFERENCE = 0.5  # nats above the teacher's loss
BUDGETS = (10, 20, 50, 100, 200, 500, 1000)
LAMBDAS, GRID = (-5.0, 2.0), 36  # logarithms to base 10, and values of each of the two of a sweep
START, PRECISE = 2, 0.01  # of the corrected sweep: plans of the estimates' sweep; nats that a rise is known to


@dataclass(frozen=True, eq=False)
class Table:
    """Every plan of the space. `loss` and `correct` are [levels] * blocks; `latency`, `bytes` and the estimates of the
    loss's rise by `pruning` and by `rounding` are [blocks, levels], prices above those of level 0 throughout."""

    loss: np.ndarray
    correct: np.ndarray
    latency: np.ndarray
    bytes: np.ndarray
    pruning: np.ndarray
    rounding: np.ndarray
    note: dict[str, Any]

    @classmethod
    def load(cls, file: Path = FILE) -> Table:
        """Read what `tabular_data.py` wrote."""
        with np.load(file) as data:
            shape = (data["latency_ms"].shape[1],) * data["latency_ms"].shape[0]
            return cls(
                data["loss"].reshape(shape) * 1e-4,
                data["correct"].reshape(shape),
                data["latency_ms"],
                data["bytes"],
                data["pruning"],
                data["rounding"],
                json.loads(str(data["note"])),
            )

    @property
    def blocks(self) -> int:
        """Return how many blocks a plan has a level for."""
        return self.loss.ndim

    @property
    def levels(self) -> int:
        """Return how many levels a block has."""
        return self.loss.shape[0]

    @cached_property
    def choices(self) -> np.ndarray:
        """Return the level of each block, [plans, blocks]."""
        return np.indices(self.loss.shape).reshape(self.blocks, -1).T

    def index(self, choice: Iterable[int]) -> int:
        """Return a plan's index."""
        return int(np.ravel_multi_index(tuple(choice), self.loss.shape))

    def priced(self, choices: np.ndarray) -> np.ndarray:
        """Return what is known of plans before they are evaluated: log latency and log bytes, [plans, 2]."""
        blocks = np.arange(self.blocks)
        latency = self.note["latency_base"] + self.latency[blocks, choices].sum(-1)
        size = self.note["bytes_base"] + self.bytes[blocks, choices].sum(-1)
        return np.log(np.stack([latency, size], -1))

    @cached_property
    def objectives(self) -> np.ndarray:
        """Return what is minimised, [plans, 3]: the rise in nats, not below 0, log latency and log bytes."""
        rise = np.maximum(self.loss.ravel() - self.note["teacher"]["loss"], 0)
        return np.column_stack([rise, self.priced(self.choices)])

    @cached_property
    def reference(self) -> np.ndarray:
        """Return the point that bounds the hypervolume."""
        return np.array([REFERENCE, *self.objectives[:, 1:].max(0) + np.log(1.1)])

    @cached_property
    def best(self) -> float:
        """Return the hypervolume of the true front."""
        return self.volume(np.flatnonzero(front(self.objectives)))

    def volume(self, plans: np.ndarray | list[int]) -> float:
        """Return the hypervolume of plans."""
        points = self.objectives[np.asarray(plans, int)]
        return hypervolume(points[front(points)], list(self.reference))


def front(points: np.ndarray) -> np.ndarray:
    """Return where points are not dominated; in parts, for all at once would take too much memory."""
    stays = np.ones(len(points), bool)
    for size in (500, 5000, len(points)):
        for start in range(0, len(points), size):
            part = np.flatnonzero(stays[start : start + size]) + start
            stays[part] = nondominated(points[part])
    return stays


Method = Callable[[Table, np.random.Generator, int], list[int]]


def random(table: Table, rng: np.random.Generator, budget: int) -> list[int]:
    """Evaluate plans drawn evenly."""
    return rng.permutation(table.loss.size)[:budget].tolist()


def uniform(table: Table, rng: np.random.Generator, budget: int) -> list[int]:
    """Evaluate the plans with all blocks at one level."""
    return [table.index([level] * table.blocks) for level in range(table.levels)][:budget]


def asked(study: optuna.Study, table: Table, plan: Callable[[optuna.Trial], int], budget: int) -> list[int]:
    """Return the distinct plans of a study; one that asks for nothing new fifty times in a row is at its end."""
    found: dict[int, None] = {}
    idle = 0
    while len(found) < budget and idle < 50:
        trial = study.ask()
        index = plan(trial)
        study.tell(trial, table.objectives[index].tolist())
        idle = idle + 1 if index in found else 0
        found[index] = None
    return list(found)


def raw(sampler: Callable[[int], optuna.samplers.BaseSampler]) -> Method:
    """Return the method that gives each block's level as a category to one of Optuna's samplers."""

    def method(table: Table, rng: np.random.Generator, budget: int) -> list[int]:
        study = optuna.create_study(directions=["minimize"] * 3, sampler=sampler(int(rng.integers(2**31))))

        def plan(trial: optuna.Trial) -> int:
            levels = list(range(table.levels))
            return table.index(trial.suggest_categorical(str(block), levels) for block in range(table.blocks))

        return asked(study, table, plan, budget)

    return method


def decode(errors: np.ndarray, table: Table, lambdas: np.ndarray) -> np.ndarray:
    """Return the level of each block that makes error + lambda_t * latency + lambda_s * bytes least, [n, blocks].

    Lambdas [n, 2] are logarithms to base 10, in units of the sums of the blocks' ranges of errors, latencies and bytes.
    """
    error, latency, size = (t / np.ptp(t, 1).sum() for t in (errors, table.latency, table.bytes))
    weights = 10.0**lambdas
    return np.asarray((error + weights[:, :1, None] * latency + weights[:, 1:, None] * size).argmin(-1))


def swept(errors: np.ndarray, table: Table) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct plans of a grid of lambdas, [n, blocks], and lambdas of each, [n, 2]."""
    values = np.linspace(*LAMBDAS, GRID)
    lambdas = np.array(list(itertools.product(values, values)))
    choices, first = np.unique(decode(errors, table, lambdas), axis=0, return_index=True)
    return choices, lambdas[first]


@cache
def spread_sweep(table: Table) -> tuple[np.ndarray, np.ndarray]:
    """Return the sweep of the additive estimates, those plans first that are predicted to dominate most together."""
    errors = table.pruning + table.rounding
    choices, lambdas = swept(errors, table)
    error = errors[np.arange(table.blocks), choices].sum(1)
    predicted = np.column_stack([error / error.max(), table.priced(choices)])
    order = spread_subset(predicted, [1.0, *table.reference[1:]], 64)
    order += np.setdiff1d(np.arange(len(choices)), order).tolist()
    return choices[order], lambdas[order]


def sweep(table: Table, rng: np.random.Generator, budget: int) -> list[int]:
    """Evaluate the sweep's plans alone."""
    return [table.index(choice) for choice in spread_sweep(table)[0][:budget]]


def measured_sweep(table: Table, rng: np.random.Generator, budget: int) -> list[int]:
    """Measure each level of each block by itself, and then evaluate the sweep of these rises."""
    alone = np.zeros((table.blocks, table.levels, table.blocks), int)
    for block in range(table.blocks):
        alone[block, :, block] = range(table.levels)
    plans = np.ravel_multi_index(tuple(np.moveaxis(alone, 2, 0)), table.loss.shape)
    first = dict.fromkeys(plans.ravel().tolist())
    if budget <= len(first):
        return list(first)[:budget]
    choices = swept(table.objectives[plans, 0], table)[0]
    found = first | dict.fromkeys(table.index(choice) for choice in rng.permutation(choices))
    return list(found)[:budget]


def lambda_tpe(table: Table, rng: np.random.Generator, budget: int) -> list[int]:
    """Search two lambdas and a factor of each block's error by TPE, from the sweep on; a last third by mutation."""
    errors = table.pruning + table.rounding
    study = optuna.create_study(directions=["minimize"] * 3, sampler=tpe(int(rng.integers(2**31))))
    begin = max(1, budget // 3)
    for lambdas in spread_sweep(table)[1][:begin]:
        study.enqueue_trial({"t": lambdas[0], "s": lambdas[1], **{str(b): 0.0 for b in range(table.blocks)}})

    def plan(trial: optuna.Trial) -> int:
        lambdas = np.array([[trial.suggest_float(name, *LAMBDAS) for name in "ts"]])
        factors = [10 ** trial.suggest_float(str(block), -1, 1) for block in range(table.blocks)]
        return table.index(decode(errors * np.array(factors)[:, None], table, lambdas)[0])

    found = dict.fromkeys(asked(study, table, plan, budget - budget // 3))
    while len(found) < budget:
        plans = np.array(list(found))
        parent = table.choices[rng.choice(plans[front(table.objectives[plans])])].copy()
        for block in rng.choice(table.blocks, int(rng.integers(1, 3)), replace=False):
            parent[block] = rng.integers(table.levels)
        found[table.index(parent)] = None
    return list(found)


def switched(table: Table, parents: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return `SWITCHES` plans like some of `parents` [n, blocks], with one or two blocks at other levels."""
    plans = parents[rng.integers(len(parents), size=SWITCHES)]
    others = rng.integers(table.levels, size=plans.shape)
    places = rng.random(plans.shape).argsort(1) < rng.integers(1, 3, size=(SWITCHES, 1))
    return np.where(places, others, plans)


def corrected_sweep(table: Table, rng: np.random.Generator, budget: int) -> list[int]:
    """Evaluate what an additive model of the loss predicts to add most hypervolume, by `autolite.search.additive`:
    estimates at first, corrected by every evaluation. Candidates are the sweep of the corrected rises, and the front
    with one or two levels switched."""
    prior = (table.pruning + table.rounding).ravel()
    found = dict.fromkeys(sweep(table, rng, min(START, budget)))
    while len(found) < budget:
        plans = np.array(list(found))
        used = np.eye(table.levels)[table.choices[plans]].reshape(len(plans), -1)
        rises = table.objectives[plans, 0]
        drawn = rng if draws(len(found)) else None
        costs = corrected(prior, np.full_like(prior, LEAST), used, rises, np.full(len(plans), PRECISE), drawn)
        costs = costs.reshape(table.blocks, table.levels)
        best = plans[front(table.objectives[plans])]
        candidates = np.concatenate([swept(costs, table)[0], switched(table, table.choices[best], rng)])
        index = np.setdiff1d(np.ravel_multi_index(tuple(candidates.T), table.loss.shape), plans)
        if not len(index):
            index = np.setdiff1d(np.arange(table.loss.size), plans)[:1]
        choices = table.choices[index]
        points = np.column_stack([costs[np.arange(table.blocks), choices].sum(1), table.priced(choices)])
        gain = gains(points, table.objectives[best], table.reference.tolist())
        found[int(index[gain.argmax()])] = None
    return list(found)


def tpe(seed: int) -> optuna.samplers.BaseSampler:
    """Return multivariate TPE."""
    return optuna.samplers.TPESampler(seed=seed, multivariate=True)


@dataclass(frozen=True)
class Entry:
    """A method, the most evaluations that it is given, and whether what it does first depends on how many those are."""

    method: Method
    most: int = 1000
    planned: bool = False


METHODS = {
    "random": Entry(random),
    "uniform level": Entry(uniform, 10),
    "NSGA-II, levels": Entry(raw(lambda seed: optuna.samplers.NSGAIISampler(population_size=20, seed=seed))),
    "TPE, levels": Entry(raw(tpe), 200),
    "lambda sweep": Entry(sweep),
    "lambda sweep, measured": Entry(measured_sweep),
    "TPE, lambdas": Entry(lambda_tpe, 100, planned=True),
    "corrected sweep": Entry(corrected_sweep),
}


def curve(entry: Entry, table: Table, seed: int) -> list[float]:
    """Return the part of the true front's hypervolume that one run reaches with each of `BUDGETS`."""
    budgets = [budget for budget in BUDGETS if budget <= entry.most]
    runs = {
        b: entry.method(table, np.random.default_rng(seed), b) for b in (budgets if entry.planned else budgets[-1:])
    }
    return [table.volume(runs[b] if entry.planned else runs[budgets[-1]][:b]) / table.best for b in budgets]


@click.command()
@click.option("--seeds", default=10, show_default=True)
@click.option("--only", default=";".join(METHODS), help="Methods, by ';'.")
def main(seeds: int, only: str) -> None:
    """Print the mean part of the true front's hypervolume, and its standard deviation over seeds, as Markdown."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    table = Table.load()
    size = front(table.objectives).sum()
    click.echo(f"{table.loss.size} plans; {size} are the true front, whose hypervolume is {table.best:.4f}\n")
    click.echo("| method | " + " | ".join(map(str, BUDGETS)) + " | seconds |\n|---|" + "---|" * (len(BUDGETS) + 1))
    for name in only.split(";"):
        begun = time.perf_counter()
        curves = np.array([curve(METHODS[name], table, seed) for seed in range(seeds)])
        seconds = (time.perf_counter() - begun) / seeds
        cells = [f"{mean:.3f} ±{spread:.3f}" for mean, spread in zip(curves.mean(0), curves.std(0), strict=True)]
        cells += [""] * (len(BUDGETS) - len(cells))
        click.echo(f"| {name} | " + " | ".join(cells) + f" | {seconds:.1f} |")


if __name__ == "__main__":
    main()
