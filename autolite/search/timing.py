"""Measured latency on this machine: candidates beside the fp32 baseline, each when confirmed, and all in the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from autolite import export
from autolite.front import Candidate
from autolite.inference import MANIFEST
from autolite.measure import Measurement, faster, random_texts, time_interleaved, timing_to_measurements
from autolite.search.problem import Problem, provenance
from autolite.store import Store

SECONDS = 2.0  # for each model
_TOGETHER = 2e9  # bytes of artifacts that are loaded at once
BASELINE = "baseline"
_TIMED = "timed together"  # the fact with the numbers of candidates by id


def measured(problem: Problem, files: Mapping[str, Path], vocab: int) -> dict[str, dict[str, Measurement]]:
    """Time artifacts and the baseline in one interleaved run, on inputs of the workload's size.

    Args:
        problem: whose target is this machine.
        files: the artifacts, by name.
        vocab: the least of all vocabularies, since all have the same inputs.

    Returns:
        For each name, and for `BASELINE`, latency_ms, p90_ms and faster, and of language models ttft_ms; that alone
        where something is generated, since the artifacts have no key/value cache yet.
    """
    workload, runtime = problem.workload, problem.runtime
    paths = {BASELINE: problem.baseline[0], **files}
    runners = {name: runtime.load(path, threads=workload.threads) for name, path in paths.items()}
    timings = time_interleaved(runners, random_texts(vocab, workload, problem.settings.seed), SECONDS * len(runners))
    generates = "ttft_ms" in problem.prices[0].of_shape(problem.teacher.shape)
    found: dict[str, dict[str, Measurement]] = {}
    for name, path in paths.items():
        used = problem.runtime_of(path)
        title = f"{used.name} {used.version}"
        numbers = timing_to_measurements(timings[name], workload, title)
        ratio = faster(timings[BASELINE], timings[name])
        numbers["faster"] = Measurement("faster", *ratio, "measured", title, str(workload))
        if generates:  # a call with the whole prompt is the time to the first token
            first = {"ttft_ms": replace(numbers["latency_ms"], metric="ttft_ms")}
            numbers = first if workload.generated else numbers | first
        found[name] = numbers
    return found


def measured_together(problem: Problem, candidates: Sequence[Candidate], store: Store) -> list[Candidate]:
    """Return confirmed candidates with the numbers of one interleaved run of all whose folders are there: what disturbs
    it meets all of them alike, while each was confirmed at another time. Made again only for new candidates."""
    out = problem.settings.out
    known: dict[str, dict[str, dict[str, Any]]] = store.get(_TIMED, {})
    there = [each for each in candidates if (out / each.path / MANIFEST).is_file()]
    if any(each.id not in known for each in there):
        for group in _groups(there):
            vocab = min(problem.shape(each.plan).vocab for each in group)
            files = {each.id: out / each.path / each.artifacts[0]["files"][0] for each in group}
            for name, numbers in measured(problem, files, min(vocab, problem.teacher.shape.vocab)).items():
                known[name] = {metric: asdict(number) for metric, number in numbers.items()}
        store.put(_TIMED, known)
    found = []
    for each in candidates:
        changed = Candidate.from_json({**each.to_json(), **known.get(each.id, {})})
        if each in there and changed != each:
            export.rewrite_card(out / each.path, changed, provenance(problem))
        found.append(changed)
    return found


def baseline_together(store: Store) -> Measurement | None:
    """Return the baseline's latency in the run of `measured_together`; None if there was none."""
    known = store.get(_TIMED, {}).get(BASELINE, {}).get("latency_ms")
    return None if known is None else Measurement(**known)


def _groups(candidates: Sequence[Candidate]) -> Iterator[list[Candidate]]:
    """Yield the candidates in groups that fit into memory, those of like size together."""
    group: list[Candidate] = []
    for each in sorted(candidates, key=lambda c: c.size_bytes.value):
        if group and sum(c.size_bytes.value for c in (*group, each)) > _TOGETHER:
            yield group
            group = []
        group.append(each)
    if group:
        yield group
