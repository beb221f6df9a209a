"""The search. `autolite.search` is this package's function of that name; what is heavy is imported when called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autolite.front import Result
    from autolite.search.progress import Observer
    from autolite.search.samplers import MakeSampler
    from autolite.tasks.base import Augment
    from autolite.tasks.custom import Loss, Metric

DEFAULT_BUDGET, DEMO_BUDGET = "15m", "150s"


def search(
    model: str | Path | None = None,
    data: str | Path | None = None,
    *,
    target: str | Sequence[str],
    task: str = "text-classification",
    space: str | None = None,
    budget: str | None = None,
    max_drop: str | float | None = None,
    min_quality: float | None = None,
    max_latency: str | float | None = None,
    max_ttft: str | float | None = None,
    min_tokens_per_second: str | float | None = None,
    max_size: str | float | None = None,
    max_memory: str | float | None = None,
    strict: bool = False,
    objectives: str | Sequence[str] = ("quality", "latency", "size"),
    workload: str | None = None,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    max_length: int | None = None,
    stride: int | None = None,
    unlabelled: str | Path | None = None,
    loss: Loss | None = None,
    metric: Metric | None = None,
    augment: Augment | None = None,
    cache_size: str | float | None = None,
    out: str | Path | None = None,
    storage: str | None = None,
    runtime: str = "onnxruntime",
    seed: int = 0,
    seeds: int = 1,
    device: str = "cpu",
    sampler: str | MakeSampler = "additive",
    workers: int = 0,
    measure_on: str | None = None,
    observer: Observer | None = None,
) -> Result:
    """Search for the best compressed versions of a model on a target; the same call again goes on where it stopped.

    Args:
        model: a folder or a hub name; None is the embedded demo model.
        data: a file, a folder or a hub name; None is the embedded demo data.
        target: a name from `autolite targets`, or the path of a profile; or several ("pixel8,raspberry-pi-5", or a
            list), for all of which plans are searched at once. `front.json` is the first one's, on which candidates are
            measured if it is "local"; each other has a `front-NAME.json`, predicted.
        task: "text-classification" or "language-modeling".
        space: a name from `search_spaces/` or the path of a YAML file; by default one that suits the task.
        budget: a time ("15m") or a number of trials ("40trials").
        max_drop: quality that may be lost, as a fraction of the teacher's (for perplexity: nats).
        min_quality: absolute limit of the task's metric.
        max_latency: milliseconds, or text with a unit.
        max_ttft: language models: the time to the first token, milliseconds, or text with a unit.
        min_tokens_per_second: language models, with a `workload` that generates: how fast, of all sequences together.
        max_size: bytes, or text with a unit.
        max_memory: bytes, or text with a unit.
        strict: hold `max_drop` against the lower end of the interval.
        objectives: what the front is of: "quality", and "latency" or "size" or both.
        workload: "batch=1,tokens=64,threads=1"; by default from the data and the target.
        text: column of the text, prompt or chat; found by convention if None (also `text_pair`, `label`).
        text_pair: column of the second text of a pair.
        label: column of the label, or of the response to a prompt.
        max_length: tokens of an example beyond which it is cut.
        stride: of the windows of `max_length` tokens that texts are scored in (language models): each counts those of
            its tokens that none before it did; by default the windows do not overlap.
        unlabelled: a file, a folder or a hub name with more texts to distill on; labels in it are not read.
        loss: `loss(logits, labels)` in the place of the task's hard loss: float32 logits [batch, classes] (language
            models: [batch, tokens, vocab]) and int64 labels [batch] ([batch, tokens], -100 where nothing is asked),
            torch tensors; returns the mean as a scalar tensor.
        metric: `metric(logits, labels)` in the place of the task's: numpy arrays of these shapes; returns a score for
            each example [batch], whose mean is the metric, or [batch, 2], such that the metric is the sum of the first
            column over that of the second (F1: 2 * tp and 2 * tp + fp + fn). The larger, the better.
        augment: `augment(split, rng)` returns the `autolite.tasks.base.Split` that an epoch of distillation trains on,
            made from all training examples; labels may be -100, unknown. `rng`, a numpy Generator, is its only source
            of randomness.
        cache_size: bytes of the teacher's outputs to keep on disk while the search runs, or text with a unit; by
            default a tenth of the free space, but at least 2 and at most 32 GiB.
        out: folder of the run; by default under `runs/`, named by model and target.
        storage: any SQLAlchemy URL; by default a SQLite file in the run's folder.
        runtime: what the candidates run on: "onnxruntime", "openvino", or "auto", the faster of both on this machine.
        seed: of everything random.
        seeds: that each finalist is trained with, this one and the next: the best student by the *search* split becomes
            the candidate, and `kept_of_seeds` says what each of them keeps.
        device: where training runs ("cpu", "cuda").
        sampler: what proposes plans that are not queued: "additive" (a model of what levels by layer cost, corrected by
            each trial; TPE where a space has none), "tpe", "gp", "nsga2", "random", or a function that makes an Optuna
            sampler from a seed; it is called for each trial, so that a resumed search asks the same.
        workers: further processes on this machine that evaluate trials beside this one; all share its cores.
        measure_on: address of a device, such as "ssh://pi@raspberrypi", that the finalists are timed on in the end, all
            together, in the place of what is predicted for the first target; see `autolite measure`.
        observer: called with a Snapshot whenever something changes.

    Raises:
        InputError: for an option, a model, data, a target or a space that cannot be used.
        RunError: if the run's folder belongs to another search.
        DeviceError: if `measure_on` cannot be reached or used: before anything is trained, or in the end, when
            `front.json` is written with predictions, and the same call goes on with the timing.
        NoCandidateError: if no candidate meets the constraints; the nearest misses are in `front.json`.
    """
    from autolite import registry
    from autolite.errors import InputError
    from autolite.search.progress import silent
    from autolite.search.run import run
    from autolite.search.settings import (
        Settings,
        parse_budget,
        parse_bytes,
        parse_limits,
        parse_objectives,
        parse_targets,
    )
    from autolite.tasks.base import DataSpec

    name = "demo" if model is None else Path(str(model)).name
    if (model is None) != (data is None):
        missing = "data" if data is None else "model"
        raise InputError(f"{missing} is missing: give both a model and data, or neither for the embedded demo")
    if seeds < 1:
        raise InputError(f"seeds: each finalist is trained with at least 1, but got {seeds}")
    first, *others = parse_targets(target)
    settings = Settings(
        target=first,
        others=tuple(others),
        out=Path(out) if out else Path("runs") / f"{name}-{'-'.join(Path(each).stem for each in (first, *others))}",
        model=None if model is None else str(model),
        data=DataSpec(
            None if data is None else str(data),
            text,
            text_pair,
            label,
            max_length,
            seed,
            None if unlabelled is None else str(unlabelled),
            stride,
        ),
        task=task,
        space=space or ("quick" if model is None else registry.get("task", task).default_space),
        budget=parse_budget(budget or (DEMO_BUDGET if model is None else DEFAULT_BUDGET)),
        constraints=replace(
            parse_limits(
                max_drop=max_drop,
                max_latency=max_latency,
                max_ttft=max_ttft,
                min_tokens_per_second=min_tokens_per_second,
                max_size=max_size,
                max_memory=max_memory,
            ),
            min_quality=min_quality,
            strict=strict,
        ),
        workload=workload,
        runtime=runtime,
        storage=storage,
        seed=seed,
        seeds=seeds,
        device=device,
        loss=loss,
        metric=metric,
        augment=augment,
        sampler=sampler,
        objectives=parse_objectives(objectives),
        workers=workers,
        measure_on=measure_on,
        cache_bytes=None if cache_size is None else int(parse_bytes(cache_size, "--cache-size")),
    )
    return run(settings, observer or silent)
