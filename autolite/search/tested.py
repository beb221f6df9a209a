"""The finalists on the test split: their metric, and how they compare with the teacher. The first results are kept, so
that the split is used once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
from transformers import AutoTokenizer

from autolite.front import Candidate, Front, Quality, intervals
from autolite.search.problem import Problem
from autolite.search.scoring import compared, interval, quality, score, scoring_threads
from autolite.store import FURTHER, TEST, Store
from autolite.tasks.base import Further


def tested(problem: Problem, front: Front, store: Store) -> Front:
    """Return a front with what its candidates and the teacher are worth on *test*."""
    teacher: dict[str, Any] = {**front.teacher, "test": asdict(problem.teacher_quality("test"))}
    found = {c.id: replace(c, test=_quality(problem, c, store)) for c in front}
    if isinstance(problem.task, Further):
        further = _further(problem, problem.task, front.candidates, store)
        teacher["further"] = further["teacher"]
        found = {name: replace(c, further=intervals(further.get(c.plan.digest, {}))) for name, c in found.items()}
    return replace(front, teacher=teacher, candidates=tuple(found.values()))


def _quality(problem: Problem, candidate: Candidate, store: Store) -> Quality:
    key = TEST + candidate.plan.digest
    known = store.get(key)
    if known is None:
        runner = problem.runtime.load(_artifact(problem, candidate), threads=scoring_threads())
        examples, pad_id = problem.data.test, problem.context.pad_id
        if not _reads_teachers_tokens(problem, candidate):
            tokenizer = AutoTokenizer.from_pretrained(problem.settings.out / candidate.path, local_files_only=True)
            examples, pad_id = problem.data_of(tokenizer).test, tokenizer.pad_token_id or 0
        scored = score(runner, problem.task, examples, pad_id)
        known = asdict(quality(scored, problem.task, "test", problem.settings.seed))
        store.put(key, known)
    return Quality(**known)


def _further(problem: Problem, task: Further, candidates: Sequence[Candidate], store: Store) -> dict[str, Any]:
    """Return the further numbers of the teacher and, by the digests of their plans, of those candidates that read the
    teacher's tokens. As many artifacts as memory has room for are run together, so that the teacher, the slowest of
    them, is run once for all of these."""
    same = [c for c in candidates if _reads_teachers_tokens(problem, c)]
    files = {"teacher": problem.baseline[0], **{c.plan.digest: _artifact(problem, c) for c in same}}
    known = {name: store.get(FURTHER + name) for name in files}
    for names in _together({name: files[name] for name in files if known[name] is None}):
        runners = {name: problem.runtime.load(files[name], threads=scoring_threads()) for name in {"teacher", *names}}
        scores = compared(runners, "teacher", task, problem.data.test, problem.context.pad_id)
        for name in names:
            numbers = {what: interval(each, problem.settings.seed) for what, each in scores[name].items()}
            known[name] = {what: asdict(number) for what, number in numbers.items()}
            store.put(FURTHER + name, known[name])
    return known


def _together(files: Mapping[str, Path]) -> Iterator[list[str]]:
    """Yield names of files in groups that take up to a quarter of the free memory, of one file at least."""
    room = psutil.virtual_memory().available / 4
    names: list[str] = []
    size = 0
    for name, file in files.items():
        more = sum(part.stat().st_size for part in file.parent.glob(f"{file.stem}.*"))  # weights may lie beside it
        if names and size + more > room:
            yield names
            names, size = [], 0
        names.append(name)
        size += more
    if names:
        yield names


def _reads_teachers_tokens(problem: Problem, candidate: Candidate) -> bool:
    return problem.shape(candidate.plan).vocab == problem.teacher.shape.vocab


def _artifact(problem: Problem, candidate: Candidate) -> Path:
    file: str = candidate.artifacts[0]["files"][0]
    return problem.settings.out / candidate.path / file
