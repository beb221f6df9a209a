"""The same hour without a search of our own: every plan is trained for as long, confirmed, and told to a sampler.

    python benchmarks/unstaged.py --teacher teacher-sst2/ --data sst2/ --budget 1h --sampler random --processes 2
    python benchmarks/unstaged.py --teacher teacher-sst2/ --data sst2/ --budget 1h --sampler tpe --processes 2

What `benchmarks/search.py` is compared with: one level for all layers (`uniform`), its start plans first, no estimates,
and no stages. Training, emission, scoring and timing are those of the search's own finalists; the processes share one
study, and a thread each.
"""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import optuna
from search import TASK, judge_of, lines

from autolite.errors import PlanError
from autolite.front import Candidate
from autolite.host_lock import give_way, working
from autolite.limits import Constraints
from autolite.search.confirm import confirm
from autolite.search.problem import Problem, load_problem
from autolite.search.samplers import SAMPLERS
from autolite.search.settings import Settings, parse_budget
from autolite.search.worker import torch_threads
from autolite.space import load_space
from autolite.store import Store, storage_url
from autolite.tasks.base import DataSpec

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

STUDY = "unstaged"


def problem_of(settings: Settings, baseline: list[Path] | None = None) -> Problem:
    """Load what a search would; the `baseline` is emitted once."""
    settings.out.mkdir(parents=True, exist_ok=True)
    store = Store(storage_url(settings.out, None), settings.out.name)
    try:
        return load_problem(settings, load_space(settings.space), store, click.echo, baseline)
    finally:
        store.close()


def storage_of(out: Path) -> str:
    return f"sqlite:///{out / 'unstaged.db'}"


def work(settings: Settings, baseline: list[Path], sampler: str, steps: int, ends: float, process: int) -> None:
    """Confirm the plans that a sampler asks for, until there is no time for another as long."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    problem = problem_of(settings, baseline)
    made = SAMPLERS[sampler](settings.seed + 1000 * process)
    study = optuna.load_study(study_name=STUDY, storage=storage_of(settings.out), sampler=made)

    def progress(done: int, of: int) -> None:
        give_way()

    longest = 0.0
    while (begun := time.time()) + longest < ends:
        trial = study.ask()
        try:
            plan = problem.plan(problem.space.suggest(trial, "confirm"), steps)
            problem.shape(plan)
            with working():
                candidate = confirm(problem, plan, progress, mark=f"-{process}").candidate
        except PlanError:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            continue
        trial.set_user_attr("candidate", candidate.to_json())
        study.tell(trial, [1 - candidate.kept.value, candidate.latency_ms.value, candidate.size_bytes.value])
        longest = max(longest, time.time() - begun)
        click.echo(f"{trial.number}: {candidate.kept.value:.1%} at {candidate.faster.value:.1f}x: {plan.describe()}")


def candidates_of(out: Path) -> list[Candidate]:
    """Return all that was confirmed, each plan once."""
    trials: list[FrozenTrial] = optuna.load_study(study_name=STUDY, storage=storage_of(out)).trials
    found: list[dict[str, Any]] = [t.user_attrs["candidate"] for t in trials if "candidate" in t.user_attrs]
    return list({each.id: each for each in map(Candidate.from_json, found)}.values())


@click.command()
@click.option("--teacher", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--budget", default="1h", show_default=True)
@click.option("--target", default="local", show_default=True)
@click.option("--sampler", default="random", show_default=True, type=click.Choice(sorted(SAMPLERS)))
@click.option("--steps", default=1000, show_default=True, help="Of distillation, for each plan.")
@click.option("--processes", default=1, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--out", default="runs/unstaged", show_default=True, type=click.Path(path_type=Path))
def main(
    teacher: Path,
    data: Path,
    budget: str,
    target: str,
    sampler: str,
    steps: int,
    processes: int,
    seed: int,
    out: Path,
) -> None:
    seconds = parse_budget(budget).seconds
    if seconds is None:
        raise click.BadParameter("a time is needed", param_hint="--budget")
    if (out / f"{sampler}-{seed}").exists():
        raise click.BadParameter("has students of an earlier run: choose another folder", param_hint="--out")
    judge = judge_of(teacher, data, out / "teacher")
    ends = time.time() + seconds
    settings = Settings(
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
    with torch_threads(1):
        problem = problem_of(settings)  # what the processes share is on the disk before they begin
        problem.teacher_quality("selection")
    study = optuna.create_study(study_name=STUDY, storage=storage_of(settings.out), directions=["minimize"] * 3)
    for start in problem.space.start:
        study.enqueue_trial(dict(problem.space.complete(start)))
    context = multiprocessing.get_context("spawn")
    given = (settings, problem.baseline, sampler, steps, ends)
    others = [context.Process(target=alone, args=(*given, number)) for number in range(processes)]
    for each in others:
        each.start()
    for each in others:
        each.join()
        if each.exitcode:
            raise click.ClickException(
                f"a process ended with {each.exitcode}: what follows would be of the others alone"
            )
    found, whole = candidates_of(settings.out), float(sum(file.stat().st_size for file in problem.baseline))
    click.echo(f"\n{len(found)} plans, {sampler}, seed {seed}\n")
    for line in lines(found, whole, settings.out, judge):
        click.echo(line)


def alone(settings: Settings, baseline: list[Path], sampler: str, steps: int, ends: float, process: int) -> None:
    with torch_threads(1):
        work(settings, baseline, sampler, steps, ends, process)


if __name__ == "__main__":
    main()
