"""Make a profile of a device by timing on it: first probes that each isolate one cost, then whole models."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from autolite.cache import cache_dir
from autolite.devices import connected
from autolite.devices.base import ConnectionLost, Device, Health, check_runtime, health_of
from autolite.devices.submodels import Recipe, made, recipes
from autolite.devices.timing import Artifact, outputs_on, time_on
from autolite.errors import DeviceError, InputError, TargetError
from autolite.files import write_atomically
from autolite.hardware import LOCAL
from autolite.hardware.calibration import FEWEST, Calibrated, Sample, calibrated
from autolite.hardware.fit import USUAL_CACHE, Machine, fit_profile, quiet
from autolite.hardware.local import keep_local
from autolite.hardware.probes import Probe, probes
from autolite.hardware.processor import cores as physical_cores
from autolite.hardware.profile import Profile
from autolite.hardware.profile_files import SUFFIXES, dump_profile, parse_profile
from autolite.measure import Workload
from autolite.saturation import has_overflown, overflowing

_PROBES = 12.0  # seconds that all probes are timed
_MODEL = 0.8  # and each model
_AT_ONCE = 5  # models that are timed in turn, beside the reference: one of each family
# Timed with all others: what slows it, slows them.
REFERENCE = Recipe("bert", 3, 6, 32, 384, 1000, "int8", "int8", "int8", Workload(tokens=32))
_RANGE = (5e-5, 0.15)  # seconds that a model may take, if it ran at the peak of fp32
_LEAST = 60.0  # seconds
_NOISE = 0.25
_NOTHING = "null"  # the line of a model that did not run
_FAILURES = 3  # batches in a row that do not run there
_REVISION = 3  # of what is kept


def calibrate(
    device: str = LOCAL,
    *,
    threads: int | None = None,
    cores: Sequence[int] = (),
    budget: float = 300.0,
    fresh: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Calibrated:
    """Measure a device: probes, and then as many whole models as there is time for. What was timed is kept in the
    user's cache folder as it comes in; the same call goes on where an interrupted one was.

    Args:
        device: "local", "ssh://[user@]host[:port]", or "adb://[serial]".
        threads: that models compute with; as many as the device has cores if None.
        cores: numbers of the cores to run on; any if empty.
        budget: seconds.
        fresh: whether to forget what was timed before.
        progress: told in words what is done.

    Raises:
        InputError: if the device has fewer cores than `threads`, or the budget is too small.
        DeviceError: if it cannot be reached, or lacks ONNX Runtime.
    """
    if budget < _LEAST:
        raise InputError(f"a budget of {budget:g} s is too small to calibrate with: give {_LEAST:g} s at least")
    say, end = progress or (lambda message: None), time.monotonic() + budget
    with connected(device) as there:
        health = health_of(there)
        check_runtime(health, device)
        most = len(cores) or (physical_cores() if device == LOCAL else health.cores)
        threads = threads or most
        if threads > (len(cores) or health.cores):
            raise InputError(f"threads={threads}, but {device} has {len(cores) or health.cores} cores to run on")
        folder = _folder(device, health, threads, cores)
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
        base = _probed(there, folder / "probes.yaml", health, threads, cores, say)
        samples = _samples(there, folder / "models.jsonl", base, threads, cores, end, say)
    source = f"{len(samples)} models timed on it, ONNX Runtime {health.onnxruntime}"
    found = calibrated(base, samples, source)
    off = np.abs(found.errors).mean()
    text = f"{base.description}; {len(samples)} models, {off:.1%} off where held out by family"
    return replace(found, profile=found.profile.model_copy(update={"description": text}))


def _folder(device: str, health: Health, threads: int, cores: Sequence[int]) -> Path:
    """Where is kept what was timed on a device."""
    pinned = f"-cores-{'-'.join(map(str, cores))}" if cores else ""
    where = _slug(health.model if device == LOCAL else f"{device} {health.model}")
    return cache_dir() / "calibration" / f"{where}-{threads}t{pinned}-ort{health.onnxruntime}-r{_REVISION}"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "device"


def _probed(
    device: Device, file: Path, health: Health, threads: int, cores: Sequence[int], say: Callable[[str], None]
) -> Profile:
    """The profile by the probes alone."""
    with suppress(TargetError, OSError, UnicodeDecodeError):  # not there, or damaged
        return parse_profile(file.read_text(encoding="utf-8"), str(file))
    say(f"timing probes on {device.address}")
    models = probes(health.cache_bytes or USUAL_CACHE, _saturates(device))
    with tempfile.TemporaryDirectory() as folder:
        artifacts = _stored(models, Path(folder))
        found = time_on(device, artifacts, threads, _PROBES, cores=cores, warmup=0.01, memory=False, say=say)
    machine = Machine(LOCAL, health.model, threads, float(health.memory_bytes), health.cache_bytes)
    profile = fit_profile(found.timings, models, machine, f"ONNX Runtime {health.onnxruntime}")
    noise = float(np.median([timing.median / quiet(timing) for timing in found.timings.values()])) - 1
    if noise <= _NOISE:
        write_atomically(file, dump_profile(profile).encode())
    else:
        say(f"other programs slowed the probes by {100 * noise:.0f} %: they are timed again next time")
    return profile


def _stored(models: dict[str, Probe], folder: Path) -> dict[str, Artifact]:
    """Write probes to files, equal models once."""
    files: dict[bytes, Path] = {}
    for probe in models.values():
        if probe.model not in files:
            files[probe.model] = folder / f"{len(files)}.onnx"
            files[probe.model].write_bytes(probe.model)
    return {name: Artifact([files[probe.model]], probe.inputs) for name, probe in models.items()}


def _saturates(device: Device) -> bool:
    """Whether products of signed 8-bit weights overflow on a device's processor."""
    model, inputs = overflowing()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "product.onnx"
        file.write_bytes(model)
        return has_overflown(outputs_on(device, Artifact([file], inputs), exact=False))


def _samples(
    device: Device,
    file: Path,
    profile: Profile,
    threads: int,
    cores: Sequence[int],
    end: float,
    say: Callable[[str], None],
) -> list[Sample]:
    """Time models until the end, and as many as are needed whenever that is; those that were timed before count."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    peak = profile.unit.peak["fp32"].value * 1e9
    left = islice(recipes(threads, (_RANGE[0] * peak, _RANGE[1] * peak)), len(lines), None)
    took, failures, done = 0.0, 0, len([line for line in lines if line != _NOTHING])
    while (now := time.monotonic()) + took < end or done < FEWEST:
        chosen = list(islice(left, _AT_ONCE))
        new = [_NOTHING] * len(chosen)
        try:
            new = [json.dumps(each.to_json()) for each in timed(device, chosen, threads, cores, say)]
            failures = 0
        except ConnectionLost:
            raise
        except DeviceError as error:
            failures += 1
            if failures == _FAILURES:
                raise
            say(f"left out: {error}")
        lines += new
        write_atomically(file, "".join(f"{line}\n" for line in lines).encode())
        done, took = len([line for line in lines if line != _NOTHING]), time.monotonic() - now
        say(f"{done} models timed, {max(0.0, end - time.monotonic()):.0f} s left")
    return undisturbed([Timed.from_json(json.loads(line)) for line in lines if line != _NOTHING])


@dataclass(frozen=True)
class Timed:
    """A model that was timed beside the reference, and the reference's time meanwhile, in milliseconds."""

    sample: Sample
    reference: float

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON types."""
        return {**self.sample.to_json(), "reference": self.reference}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Timed:
        """Rebuild it from `to_json`'s form."""
        return cls(Sample.from_json(data), data["reference"])


def timed(
    device: Device,
    chosen: Sequence[Recipe],
    threads: int,
    cores: Sequence[int] = (),
    say: Callable[[str], None] = lambda message: None,
) -> list[Timed]:
    """Make models and time them in turn with a reference, so that what disturbs the device meets it too.

    Raises:
        DeviceError: if one does not run there.
    """
    reference = replace(REFERENCE, workload=replace(REFERENCE.workload, threads=threads))
    with tempfile.TemporaryDirectory() as folder:
        ready = [made(recipe, Path(folder) / str(i)) for i, recipe in enumerate((reference, *chosen))]
        artifacts = {str(i): artifact for i, (_, artifact) in enumerate(ready)}
        seconds = _MODEL * len(artifacts)
        found = time_on(
            device, artifacts, threads, seconds, cores=cores, warmup=0.02, memory=False, keep=False, say=say
        )
    beside, *others = (found.timings[name] for name in artifacts)
    rows = []
    for recipe, (shape, _), timing in zip(chosen, ready[1:], others, strict=True):
        ratio = float(np.median(timing.medians / beside.medians))
        sample = Sample(shape, recipe.workload, ratio * quiet(beside), recipe.family)
        rows.append(Timed(sample, quiet(beside)))
    return rows


def undisturbed(found: Sequence[Timed]) -> list[Sample]:
    """Return what the models take where the reference takes the least that it was seen to take."""
    least = min(each.reference for each in found)
    return [replace(each.sample, milliseconds=each.sample.milliseconds * least / each.reference) for each in found]


def destination(device: str, cores: Sequence[int], out: str | None) -> Path | None:
    """Return the file that a profile is written to; None for this machine's, which becomes that of the target "local".

    Args:
        device: that it is of.
        cores: that it is of.
        out: the file that is asked for; None if none is: one that is called as the device.

    Raises:
        InputError: if a profile cannot be called so, or one of some cores of this machine has no file.
    """
    if device == LOCAL and out is None:
        if cores:
            raise InputError("the target local runs on any core: give the profile of some cores a file with --out")
        return None
    file = Path(out or f"{_slug(device.partition('://')[2])}.yaml")
    if file.suffix not in SUFFIXES or file.stem == LOCAL:
        raise InputError(f"{file}: a profile is a file that ends in {' or '.join(SUFFIXES)}, and not called {LOCAL}")
    return file


def keep(profile: Profile, file: Path | None) -> None:
    """Write a profile to the `destination` that it has.

    Raises:
        StorageError: if it cannot be written.
    """
    if file is None:
        keep_local(profile)
    else:
        write_atomically(file, dump_profile(profile.model_copy(update={"name": file.stem})).encode())
