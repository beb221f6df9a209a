"""Profile a model of the user's: say where a call's time goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from autolite.artifact import call_of, find
from autolite.errors import ModelError
from autolite.machine import processors
from autolite.measure import Workload

if TYPE_CHECKING:
    from autolite.runtime.operators import OperatorProfile


def profile(
    path: str | Path,
    workload: str | None = None,
    seconds: float = 3.0,
    progress: Callable[[str], None] | None = None,
) -> OperatorProfile:
    """Say where a call of a model spends its time, by ONNX Runtime's own trace.

    Args:
        path: a candidate's folder, another folder with one model, or the model's file.
        workload: as in "batch=1,tokens=64,threads=1"; what is not named is what the candidate was made for, on as
            many threads as this machine has, else a batch of one with 128 tokens on one thread.
        seconds: wall time of the calls.
        progress: told in words what is done.

    Raises:
        InputError: if there is no model at the path, or the workload does not fit the model or this machine.
        ModelError: if the model cannot be loaded or run, or is one for another runtime.
    """
    from autolite.hardware.local import check_threads
    from autolite.hardware.peaks import local_peaks
    from autolite.runtime.onnxruntime import OnnxRuntime
    from autolite.runtime.operators import collect

    found = find(Path(path))
    made_for = found.workload or Workload()
    default = replace(made_for, threads=min(made_for.threads, processors()))
    asked = Workload.parse(workload, default) if workload is not None else default
    check_threads(asked.threads)
    runner = OnnxRuntime().load(found.file, asked.threads)
    wanted, inputs = call_of(found, runner.inputs, workload, default)
    try:
        runner.run(inputs)
    except ModelError as error:
        raise ModelError(
            f"{found.file} does not run with {wanted}; if it has fewer positions, ask for fewer tokens ({error})"
        ) from error
    return collect(found.file, runner, inputs, wanted, local_peaks(wanted.threads, progress), seconds, progress)
