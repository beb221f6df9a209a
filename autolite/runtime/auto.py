"""Whichever installed runtime runs a student faster on this machine, found by timing its artifacts side by side."""

from __future__ import annotations

import shutil
from functools import cached_property
from pathlib import Path

from autolite import registry
from autolite.errors import AutoliteError, ModelError, PlanError
from autolite.measure import Runner, Workload, random_texts, time_interleaved
from autolite.runtime.base import Runtime
from autolite.techniques.base import Student

CANDIDATES = {".onnx": "onnxruntime", ".xml": "openvino"}  # by the suffix of an artifact's first file
SECONDS = 0.3  # for each runtime


class AutoRuntime:
    """Emits for every runtime that can run the student's formats, and keeps the artifact that is faster here.

    Nothing is timed unless the artifact is asked to be tuned to this machine: the first that can run it is taken then.
    """

    name = "auto"

    @cached_property
    def runtimes(self) -> dict[str, Runtime]:
        """The runtimes that are installed, by the suffix of their artifacts."""
        found = {}
        for suffix, name in CANDIDATES.items():
            try:
                runtime: Runtime = registry.get("runtime", name)
                assert runtime.version  # asking for it shows whether it is installed
            except AutoliteError:
                continue
            found[suffix] = runtime
        return found

    @property
    def formats(self) -> frozenset[str]:
        """Formats that any of them runs."""
        return frozenset[str]().union(*(runtime.formats for runtime in self.runtimes.values()))

    @property
    def version(self) -> str:
        """The versions of all."""
        return ", ".join(f"{runtime.name} {runtime.version}" for runtime in self.runtimes.values())

    def of(self, file: Path) -> Runtime:
        """Return the runtime that an artifact is for."""
        return self.runtimes[".xml" if file.suffix == ".xml" else ".onnx"]

    def emit(self, student: Student, folder: Path, workload: Workload | None = None, tuned: bool = False) -> list[Path]:
        """Write the artifact of the runtime that is fastest, or with nothing to time, of the first.

        Raises:
            ModelError: if none of the runtimes can read what is written for it.
            PlanError: if no runtime runs all of the student's formats.
        """
        able = [runtime for runtime in self.runtimes.values() if student.shape.formats <= runtime.formats]
        if not able:
            wanted = ", ".join(sorted(student.shape.formats))
            raise PlanError(f"no installed runtime runs all of {wanted} in one model; installed are {self.version}")
        if len(able) == 1 or not tuned:
            return able[0].emit(student, folder, workload, tuned)
        workload = workload or Workload()
        made: dict[str, list[Path]] = {}
        runners: dict[str, Runner] = {}
        failures: list[ModelError] = []
        for each in able:
            try:
                made[each.name] = each.emit(student, folder / each.name, workload, tuned)
                runners[each.name] = each.load(made[each.name][0], workload.threads)
            except ModelError as error:  # what one cannot read, another may
                failures.append(error)
        if not runners:
            raise failures[0]
        inputs = random_texts(student.shape.vocab, workload)
        timings = time_interleaved(runners, inputs, SECONDS * len(runners), warmup=0.05)
        best = min(timings, key=lambda name: timings[name].median)
        kept = [file.replace(folder / file.name) for file in made[best]]
        for each in able:
            shutil.rmtree(folder / each.name, ignore_errors=True)
        return kept

    def load(self, file: Path, threads: int = 1) -> Runner:
        """Load an artifact with the runtime that it is for; raises what that raises."""
        return self.of(file).load(file, threads)
