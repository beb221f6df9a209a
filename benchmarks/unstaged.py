"""The same hour without a search of our own: every plan is trained for as long, confirmed, and told to a sampler.

    python benchmarks/unstaged.py --teacher teacher-sst2/ --data sst2/ --budget 1h --sampler random
    python benchmarks/unstaged.py --teacher teacher-sst2/ --data sst2/ --budget 1h --sampler tpe

What `benchmarks/search.py` is compared with: one level for all layers (`uniform`), its start plans first, no estimates,
and no stages. Training, emission, scoring and timing are those of the search's own finalists.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
import optuna
from search import TASK, judge_of, lines

from autolite.errors import PlanError
from autolite.front import Constraints
from autolite.search.confirm import confirm
from autolite.search.problem import Problem, load_problem
from autolite.search.samplers import SAMPLERS
from autolite.search.settings import Settings, parse_budget
from autolite.space import load_space
from autolite.store import Store, storage_url
from autolite.tasks.base import DataSpec

if TYPE_CHECKING:
    from autolite.front import Candidate


def problem_of(settings: Settings) -> Problem:
    """Load what a search would."""
    settings.out.mkdir(parents=True, exist_ok=True)
    store = Store(storage_url(settings.out, None), settings.out.name)
    try:
        return load_problem(settings, load_space(settings.space), store, click.echo)
    finally:
        store.close()


def tried(problem: Problem, sampler: str, steps: int, ends: float) -> list[Candidate]:
    """Return the candidates of the plans that a sampler asks for, until there is no time for another as long."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(directions=["minimize"] * 3, sampler=SAMPLERS[sampler](problem.settings.seed))
    for start in problem.space.start:
        study.enqueue_trial(dict(problem.space.complete(start)))
    found: dict[str, Candidate] = {}
    longest = 0.0
    while (begun := time.monotonic()) + longest < ends:
        trial = study.ask()
        try:
            plan = problem.plan(problem.space.suggest(trial, "confirm"), steps)
            problem.shape(plan)
            candidate = confirm(problem, plan, lambda done, of: None).candidate
        except PlanError:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            continue
        study.tell(trial, [1 - candidate.kept.value, candidate.latency_ms.value, candidate.size_bytes.value])
        found[candidate.id] = candidate
        longest = max(longest, time.monotonic() - begun)
        click.echo(f"{trial.number}: {candidate.kept.value:.1%} at {candidate.faster.value:.1f}x: {plan.describe()}")
    return list(found.values())


@click.command()
@click.option("--teacher", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--budget", default="1h", show_default=True)
@click.option("--target", default="local", show_default=True)
@click.option("--sampler", default="random", show_default=True, type=click.Choice(sorted(SAMPLERS)))
@click.option("--steps", default=400, show_default=True, help="Of distillation, for each plan.")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", default="runs/unstaged", show_default=True, type=click.Path(path_type=Path))
def main(teacher: Path, data: Path, budget: str, target: str, sampler: str, steps: int, seed: int, out: Path) -> None:
    seconds = parse_budget(budget).seconds
    if seconds is None:
        raise click.BadParameter("a time is needed", param_hint="--budget")
    if (out / f"{sampler}-{seed}").exists():
        raise click.BadParameter("has students of an earlier run: choose another folder", param_hint="--out")
    judge = judge_of(teacher, data, out / "teacher")
    ends = time.monotonic() + seconds
    problem = problem_of(
        Settings(
            target=target,
            out=out / f"{sampler}-{seed}",
            model=str(teacher),
            data=DataSpec(str(data)),
            task=TASK,
            space="uniform",
            budget=parse_budget(budget),
            constraints=Constraints(),
            workload="batch=1,tokens=64,threads=1",
            runtime="onnxruntime",
            storage=None,
            seed=seed,
            device="cpu",
        )
    )
    candidates = tried(problem, sampler, steps, ends)
    whole = float(sum(file.stat().st_size for file in problem.baseline))
    click.echo(f"\n{len(candidates)} plans, {sampler}, seed {seed}\n")
    for line in lines(candidates, whole, problem.settings.out, judge):
        click.echo(line)


if __name__ == "__main__":
    main()
