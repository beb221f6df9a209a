"""Measured latency, beside the fp32 baseline: of each candidate when confirmed, and of all together in the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from autolite import export
from autolite.devices import connected
from autolite.devices.base import Device, check_runtime, health_of
from autolite.devices.timing import Artifact, time_on
from autolite.errors import InputError
from autolite.front import Candidate
from autolite.hardware import LOCAL
from autolite.inference import MANIFEST
from autolite.measure import (
    Decoder,
    Inputs,
    Measurement,
    Runner,
    Timing,
    Workload,
    faster,
    random_texts,
    time_interleaved,
    timing_to_measurements,
    tokens_per_second,
)
from autolite.search.problem import Problem, provenance
from autolite.store import Store

SECONDS = 2.0  # for each model
_FURTHER = 8.0  # seconds beside that for each on a device: to send it, and to load it twice
_TOGETHER = 2e9  # bytes of artifacts that are loaded at once; on a device at most a quarter of its memory
BASELINE = "baseline"
_TIMED = "timed together"  # the fact with the numbers of candidates by id


def check_device(problem: Problem, say: Callable[[str], None]) -> None:
    """Refuse a device that the finalists could not be timed on in the end, if there is one; `say` is told that it is
    asked.

    Raises:
        InputError: if the workload wants more threads than it has cores.
        DeviceError: if it cannot be reached, or has another runtime than is here.
    """
    address = problem.settings.measure_on
    if address is None:
        return
    say(f"asking {address} how it does")
    with connected(address) as there:
        health = health_of(there)
        check_runtime(health, address)
    if problem.workload.threads > health.cores:
        raise InputError(
            f"the workload has threads={problem.workload.threads}, but {address} has {health.cores} cores: give fewer "
            "with --workload threads=..."
        )


def seconds_together(problem: Problem, candidates: int) -> float:
    """Return how long `measured_together` is expected to take; 0 where nothing is timed."""
    if not problem.times_finalists:
        return 0.0
    if problem.settings.measure_on is not None:
        return (1 + candidates) * (SECONDS + _FURTHER)
    return (1 + candidates) * SECONDS * (2 if problem.workload.generated else 1)  # prompts beside whole calls


def measured(
    problem: Problem,
    files: Mapping[str, Sequence[Path]],
    vocab: int,
    device: Device | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> dict[str, dict[str, Measurement]]:
    """Time artifacts and the baseline in one interleaved run, on inputs of the workload's size.

    Args:
        problem: whose target is this machine, or the device.
        files: of the artifacts, by name, the model's own first.
        vocab: the least of all vocabularies, since all have the same inputs.
        device: to time on, connected; this machine if None.
        say: told in words what a device has to wait for.

    Returns:
        For each name, and for `BASELINE`, latency_ms, p90_ms and faster, and of language models ttft_ms. Where tokens
        are generated, tokens_per_second too; but if that cannot be timed (on another machine, or by a runtime without a
        cache) ttft_ms alone. On a device memory_bytes too, if it tells and nothing is generated.

    Raises:
        DeviceError: if one cannot run there, or the device goes away and stays away.
    """
    workload = problem.workload
    paths = {BASELINE: problem.baseline, **files}
    memory: Mapping[str, int | None] = {}
    prompts: Mapping[str, Timing] = {}
    # A device's runner makes single calls: where tokens are generated, this machine is timed by this process.
    there = None if device is None or (device.address == LOCAL and workload.generated) else device
    if there is None:
        loaded = {name: problem.runtime.load(each[0], threads=workload.threads) for name, each in paths.items()}
        inputs = random_texts(vocab, workload, problem.settings.seed)
        timings, prompts = _timed(loaded, inputs, workload)
    else:
        (text,) = random_texts(vocab, workload, problem.settings.seed, count=1)
        artifacts = {name: Artifact(each, text) for name, each in paths.items()}
        session = time_on(there, artifacts, workload.threads, SECONDS * len(paths), say=say)
        timings, memory = session.timings, session.peak_bytes
    generates = "ttft_ms" in problem.prices[0].of_shape(problem.teacher.shape)
    found: dict[str, dict[str, Measurement]] = {}
    for name, each in paths.items():
        used = problem.runtime_of(each[0])
        title = f"{used.name} {used.version}" if there is None else session.runtime
        title += "" if device is None else f" on {device.address}"
        numbers = timing_to_measurements(timings[name], workload, title)
        tokens = workload.batch * workload.generated
        if name in prompts and (rate := tokens_per_second(timings[name], prompts[name], tokens)):
            numbers["tokens_per_second"] = Measurement("tokens_per_second", *rate, "measured", title, str(workload))
        if (peak := memory.get(name)) is not None:
            numbers["memory_bytes"] = Measurement("memory_bytes", peak, peak, peak, "measured", title, str(workload))
        ratio = faster(timings[BASELINE], timings[name])
        numbers["faster"] = Measurement("faster", *ratio, "measured", title, str(workload))
        if generates:  # a call with the whole prompt is the time to the first token
            prompt = timing_to_measurements(prompts.get(name, timings[name]), workload, title)["latency_ms"]
            first = {"ttft_ms": replace(prompt, metric="ttft_ms")}
            numbers = first if workload.generated and not prompts else numbers | first
        found[name] = numbers
    return found


def _timed(
    loaded: Mapping[str, Runner], inputs: Sequence[Inputs], workload: Workload
) -> tuple[Mapping[str, Timing], Mapping[str, Timing]]:
    """Time the workload's calls, and beside them, where tokens are generated and all can do so, their prompts."""
    decoders = {name: each for name, each in loaded.items() if isinstance(each, Decoder)}
    if not workload.generated or len(decoders) < len(loaded):
        return time_interleaved(loaded, inputs, SECONDS * len(loaded)), {}
    calls = {(name, n): each.generating(n) for name, each in decoders.items() for n in (0, workload.generated)}
    found = time_interleaved({f"{name} {n}": call for (name, n), call in calls.items()}, inputs, SECONDS * len(calls))
    whole, prompts = ({name: found[f"{name} {n}"] for name in loaded} for n in (workload.generated, 0))
    return whole, prompts


def measured_together(
    problem: Problem, candidates: Sequence[Candidate], store: Store, say: Callable[[str], None] = lambda message: None
) -> list[Candidate]:
    """Return confirmed candidates with the numbers of one interleaved run of all whose folders are there: what disturbs
    it meets all of them alike, while each was confirmed at another time. Made again only for new candidates.

    Raises:
        DeviceError: if they are to be timed on a device, and cannot be; `say` is told what it waits for.
    """
    out, address = problem.settings.out, problem.settings.measure_on
    known: dict[str, dict[str, dict[str, Any]]] = store.get(_fact(problem), {})
    there = [each for each in candidates if (out / each.path / MANIFEST).is_file()]
    if any(each.id not in known for each in there):
        with nullcontext() if address is None else connected(address) as device:
            most = _TOGETHER if device is None else min(_TOGETHER, health_of(device).memory_bytes / 4)
            for group in _groups(there, most):
                vocab = min(problem.shape(each.plan).vocab for each in group)
                files = {each.id: [out / each.path / file for file in each.artifacts[0]["files"]] for each in group}
                vocab = min(vocab, problem.teacher.shape.vocab)
                for name, numbers in measured(problem, files, vocab, device, say).items():
                    known[name] = {metric: asdict(number) for metric, number in numbers.items()}
        store.put(_fact(problem), known)
    found = []
    for each in candidates:
        changed = Candidate.from_json({**each.to_json(), **known.get(each.id, {})})
        if each in there and changed != each:
            export.rewrite_card(out / each.path, changed, provenance(problem))
        found.append(changed)
    return found


def baseline_together(problem: Problem, store: Store) -> Measurement | None:
    """Return the baseline's latency in the run of `measured_together`; None if there was none."""
    known = store.get(_fact(problem), {}).get(BASELINE, {}).get("latency_ms")
    return None if known is None else Measurement(**known)


def _fact(problem: Problem) -> str:
    address = problem.settings.measure_on
    return _TIMED if address is None else f"{_TIMED} on {address}"


def _groups(candidates: Sequence[Candidate], most: float) -> Iterator[list[Candidate]]:
    """Yield the candidates in groups of so many bytes at most, those of like size together."""
    group: list[Candidate] = []
    for each in sorted(candidates, key=lambda c: c.size_bytes.value):
        if group and sum(c.size_bytes.value for c in (*group, each)) > most:
            yield group
            group = []
        group.append(each)
    if group:
        yield group
