"""Time models on a device, all of them in turn; what was timed before a connection is lost counts."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autolite.devices.base import ConnectionLost, Device, answers, health_of
from autolite.errors import DeviceError, ModelError
from autolite.measure import Inputs, Timing

MIN_ROUNDS = 15
_ATTEMPTS = 4  # connections, until a device that goes away again and again is given up
_PAUSE = 2.0  # seconds before the second, and twice as long before each further one
_COOLING = 180.0  # seconds that a hot device is given to cool down
_LOOK = 5.0  # seconds between two looks at its temperature

Models = Mapping[str, Mapping[str, str]]  # by name, where its file and its inputs are on a device


@dataclass(frozen=True)
class Artifact:
    """Files that belong together, the model's own first, and the inputs of its calls."""

    files: Sequence[Path]
    inputs: Inputs


@dataclass(frozen=True)
class State:
    """A device while it was timing: seconds since the beginning, the hottest sensor, and the clocks of its cores."""

    seconds: float
    celsius: float | None
    megahertz: Sequence[int] | None


@dataclass(frozen=True)
class Session:
    """What was timed on a device.

    Attributes:
        timings: by the models' names.
        peak_bytes: of memory that each model took, its process's peak less that of one without it; None where the
            device does not tell; empty if that was not asked for.
        states: of the device meanwhile.
        runtime: that ran the models, and its version.
    """

    timings: Mapping[str, Timing]
    peak_bytes: Mapping[str, int | None]
    states: Sequence[State]
    runtime: str


def time_on(
    device: Device,
    artifacts: Mapping[str, Artifact],
    threads: int,
    seconds: float,
    *,
    cores: Sequence[int] = (),
    warmup: float = 0.5,
    memory: bool = True,
    keep: bool = True,
    say: Callable[[str], None] = lambda message: None,
) -> Session:
    """Time artifacts on a connected device, interleaved as in `autolite.measure.time_interleaved`.

    A device that is about to slow down since it is hot is waited for. One that goes away is connected to again, three
    times at most, and what is left is timed then.

    Args:
        device: to time on.
        artifacts: by name.
        threads: that a model computes with.
        seconds: for all of them.
        cores: numbers of the cores to run on; any if empty.
        warmup: seconds of untimed calls of each before it is timed.
        memory: whether to find out what each takes too, in a process of its own.
        keep: whether the device keeps the files for another time.
        say: told in words what is done.

    Raises:
        DeviceError: if a model does not fit or run there.
        ConnectionLost: if the device stays away before there are enough rounds.
    """
    so_far = _Progress(seconds)
    spec = {"threads": threads, "cores": list(cores), "lock": device.address != "local"}
    spec |= {"warmup": warmup, "min_rounds": MIN_ROUNDS}
    with tempfile.TemporaryDirectory() as folder, device.alone(say):
        inputs = {
            name: saved(_whole(each), Path(folder) / f"{i}.npz") for i, (name, each) in enumerate(artifacts.items())
        }
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                if attempt > 1:
                    device.close()
                    time.sleep(_PAUSE * 2 ** (attempt - 2))
                    device.open()
                models = {
                    name: {"file": device.push(each.files), "inputs": device.push([inputs[name]])}
                    for name, each in artifacts.items()
                }
                if memory:
                    _measure_memory(device, spec, models, so_far, say)
                _cool(device, say)
                _measure_time(device, spec, models, so_far, say)
                break
            except ConnectionLost as error:
                so_far.lost(len(artifacts))
                if attempt < _ATTEMPTS:
                    say(f"{error}; {len(so_far.rounds)} rounds are kept, connecting again")
                elif len(so_far.rounds) < MIN_ROUNDS:
                    raise
                else:
                    say(f"{error}; the {len(so_far.rounds)} rounds that were timed have to do")
        if not keep:
            with suppress(DeviceError):
                device.drop([path for each in models.values() for path in each.values()])
    bursts = [found for _, found in sorted(so_far.rounds.items())]
    timings = {name: Timing(tuple(found[name] for found in bursts)) for name in artifacts}
    return Session(timings, so_far.peaks, so_far.states, so_far.runtime)


def _whole(artifact: Artifact) -> Inputs:
    """The inputs of a call, and of a model that goes on from earlier calls, that there were none."""
    from autolite.runtime.inputs import nothing_before

    file, past = artifact.files[0], {}
    if file.suffix == ".onnx" and artifact.inputs:
        with suppress(ModelError):  # what is damaged is the device's to refuse
            past = nothing_before(file, len(next(iter(artifact.inputs.values()))))
    return {**past, **artifact.inputs}


class _Progress:
    """What was heard so far of a device that may go away.

    Attributes:
        left: seconds that models are yet to be timed.
        rounds: the bursts of each round, by the models' names.
        process: number of the runner there that was heard last.
    """

    def __init__(self, seconds: float) -> None:
        self.left, self.runtime, self.process = seconds, "", None
        self.rounds: dict[int, dict[str, tuple[float, ...]]] = {}
        self.states: list[State] = []
        self.peaks: dict[str, int | None] = {}
        self._begun = time.monotonic()
        self._timing: tuple[float, float] | None = None  # when it began and when it was last heard of

    def hear(self, answer: Mapping[str, Any]) -> None:
        """Take in an answer of a runner that times."""
        now = time.monotonic()
        self._timing = (self._timing[0] if self._timing else now, now)
        if "runtime" in answer:
            self.runtime, self.process = f"onnxruntime {answer['runtime']}", answer["process"]
        elif "state" in answer:
            self.states.append(State(now - self._begun, **answer["state"]))
        else:
            self.rounds.setdefault(answer["round"], {})[answer["model"]] = tuple(answer["milliseconds"])

    def lost(self, models: int) -> None:
        """Keep the rounds in which all models were timed."""
        if self._timing:
            self.left = max(0.0, self.left - (self._timing[1] - self._timing[0]))
            self._timing = None
        self.rounds = {number: found for number, found in self.rounds.items() if len(found) == models}


def _measure_time(
    device: Device, spec: Mapping[str, Any], models: Models, so_far: _Progress, say: Callable[[str], None]
) -> None:
    first = len(so_far.rounds)
    how = {**spec, "replaces": so_far.process, "models": models, "seconds": so_far.left, "first": first}
    for answer in _heard(answers(device, ["time"], how), say):
        so_far.hear(answer)


def _measure_memory(
    device: Device, spec: Mapping[str, Any], models: Models, so_far: _Progress, say: Callable[[str], None]
) -> None:
    for name in [name for name in models if name not in so_far.peaks]:
        how = {**spec, "replaces": so_far.process, "models": {name: models[name]}}
        for answer in _heard(answers(device, ["memory"], how), say):
            so_far.peaks[name] = answer["peak_bytes"]


def outputs_on(device: Device, artifact: Artifact, exact: bool = True) -> Any:
    """Return the first output of an artifact on a connected device, as nested lists.

    Args:
        device: to run on.
        artifact: with its inputs.
        exact: whether ONNX Runtime is to avoid products that overflow there, where it can.

    Raises:
        DeviceError: if it does not run there.
    """
    with tempfile.TemporaryDirectory() as folder:
        inputs = device.push([saved(artifact.inputs, Path(folder) / "inputs.npz")])
        models = {"it": {"file": device.push(artifact.files), "inputs": inputs}}
        spec = {"models": models, "threads": 1, "cores": [], "lock": False, "exact": exact}
        (answer,) = answers(device, ["outputs"], spec)
    return answer["output"]


def _heard(heard: Iterator[dict[str, Any]], say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Yield answers, and say once if the device has to wait for another process of its own."""
    told = False
    for answer in heard:
        if "waiting" not in answer:
            yield answer
        elif not told:
            say("waiting: another process is timing a model on that device")
            told = True


def drift(timing: Timing) -> float:
    """Return by how much the last third of the rounds was slower than the first: 0.1 is 10 %."""
    medians = timing.medians
    third = max(1, len(medians) // 3)
    return float(np.median(medians[-third:]) / np.median(medians[:third]) - 1)


def saved(inputs: Inputs, file: Path) -> Path:
    """Write inputs to a file, and return that."""
    np.savez(file, **inputs)  # type: ignore[arg-type]  # numpy's stub takes the first for an option
    return file


def _cool(device: Device, say: Callable[[str], None]) -> None:
    """Wait until a device is not about to slow down any more, for three minutes at most."""
    for look in range(round(_COOLING / _LOOK)):
        health = health_of(device)
        if not health.is_hot:
            return
        if look == 0:
            say(f"{device.address} is {health.margin_celsius:.0f} degrees from where it slows down: letting it cool")
        time.sleep(_LOOK)
    say(f"{device.address} does not cool down: what follows are the times of a hot device")
