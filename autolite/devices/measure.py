"""Time models of the user's on a device, and compare what is measured with what was predicted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autolite.artifact import Found, call_of, find
from autolite.devices import connected
from autolite.devices.base import Health, check_runtime, health_of
from autolite.devices.timing import Artifact, Session, State, drift, time_on
from autolite.errors import InputError, TargetError
from autolite.hardware import LOCAL, load_target
from autolite.measure import Measurement, Workload, faster, timing_to_measurements

if TYPE_CHECKING:
    from autolite.hardware.profile import Profile

SECONDS = 4.0  # for each model


@dataclass(frozen=True)
class Row:
    """A model on a device.

    Attributes:
        path: as it was given.
        size_bytes: of its files.
        measured: latency_ms, p90_ms, memory_bytes where the device tells, and of all but the first model, faster (than
            that one).
        predicted: latency_ms and memory_bytes, by the device's profile.
        unpredicted: why there is nothing of that; empty if there is.
        drift: by how much the last third of its calls was slower than the first.
    """

    path: str
    size_bytes: int
    measured: dict[str, Measurement]
    predicted: dict[str, Measurement]
    unpredicted: str
    drift: float


@dataclass(frozen=True)
class Measured:
    """Models that were timed together on a device.

    Attributes:
        device: its address.
        health: what it is, and how it did before.
        profile: that predictions are by; None if none is known.
        workload: of a call.
        rows: the models, in order.
        states: of the device meanwhile.
    """

    device: str
    health: Health
    profile: str | None
    workload: Workload
    rows: tuple[Row, ...]
    states: tuple[State, ...]

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain JSON types."""
        return asdict(self)


def measure_models(
    paths: Sequence[str | Path],
    device: str = LOCAL,
    *,
    workload: str | None = None,
    profile: str | None = None,
    seconds: float | None = None,
    cores: Sequence[int] = (),
    progress: Callable[[str], None] | None = None,
) -> Measured:
    """Time models on a device, all in turn, so that a drift of the device meets all of them.

    Args:
        paths: folders of candidates, other folders or files with a model, or the folder of a run: its teacher and all
            its candidates.
        device: "local", "ssh://[user@]host[:port]", or "adb://[serial]".
        workload: as in "batch=1,tokens=64,threads=1"; what is not named is what the first candidate was made for, on
            no more threads than the device has, else a batch of one with 128 tokens on one thread.
        profile: target to predict by; by default the one whose device says that it is it.
        seconds: wall time of all calls together; four seconds for each model if None.
        cores: numbers of the cores to run on; any if empty.
        progress: told in words what is done.

    Raises:
        InputError: if there is no model, or the workload does not fit it or the device.
        TargetError: if the profile is unknown.
        DeviceError: if the device cannot be reached, or does not run the models.
    """
    from autolite.runtime.onnxruntime import OnnxRuntime

    say = progress or (lambda message: None)
    named = {str(path): find(path) for each in paths for path in _models(Path(each))}
    if not named:
        raise InputError("name a model at least")
    if profile not in (None, LOCAL):
        load_target(str(profile))
    with connected(device) as there:
        health = health_of(there)
        check_runtime(health, device)
        most = len(cores) or health.cores
        made_for = next((found.workload for found in named.values() if found.workload), Workload())
        default = replace(made_for, threads=min(made_for.threads, most))
        artifacts: dict[str, Artifact] = {}
        calls: dict[str, Workload] = {}
        for name, found in named.items():
            takes = OnnxRuntime().load(found.file).inputs
            calls[name], inputs = call_of(found, takes, workload, default)
            artifacts[name] = Artifact(found.files, inputs)
        wanted = _agreed(calls)
        if wanted.threads > most:
            raise InputError(f"threads={wanted.threads}, but {device} has {most} cores to run on: ask for fewer")
        known = _profile(profile, device, health, wanted.threads, say)
        say(f"timing {len(artifacts)} model{'s' if len(artifacts) > 1 else ''} on {device}")
        if seconds is None:
            seconds = SECONDS * len(artifacts)
        session = time_on(there, artifacts, wanted.threads, seconds, cores=cores, say=say)
    rows = tuple(_rows(named, artifacts, session, wanted, known))
    return Measured(device, health, None if known is None else known.name, wanted, rows, tuple(session.states))


def _agreed(calls: Mapping[str, Workload]) -> Workload:
    """The one workload of all models.

    Raises:
        InputError: if some take only calls of another size.
    """
    (first, wanted), *others = calls.items()
    if different := next(((name, call) for name, call in others if call != wanted), None):
        raise InputError(
            f"{first} is called with {wanted}, but {different[0]} takes {different[1]} alone: measure them one by one"
        )
    return wanted


def _models(path: Path) -> list[Path]:
    """The models at a path: of a run, the teacher and the candidates of its front."""
    if not (path / "front.json").is_file():
        return [path]
    from autolite.front import read_front

    return [path / "teacher", *(path / candidate.path for candidate in read_front(path))]


def _profile(
    asked: str | None, device: str, health: Health, threads: int, say: Callable[[str], None]
) -> Profile | None:
    if asked is not None:
        return load_target(asked, threads, say)
    if device == LOCAL:
        return load_target(LOCAL, threads, say)
    from autolite.hardware.profile_files import load_profile, profile_names

    known = [(alias, found) for found in map(load_profile, profile_names()) for alias in found.known_as]
    # A "Pixel 8 Pro" is no "Pixel 8", whose name is shorter.
    fitting = [(len(alias), found) for alias, found in known if health.model.startswith(alias)]
    return max(fitting, key=lambda each: each[0])[1] if fitting else None


def _rows(
    named: Mapping[str, Found],
    artifacts: Mapping[str, Artifact],
    session: Session,
    workload: Workload,
    profile: Profile | None,
) -> Iterator[Row]:
    base = session.timings[next(iter(named))]
    for name, found in named.items():
        timing, peak = session.timings[name], session.peak_bytes[name]
        measured = timing_to_measurements(timing, workload, session.runtime)
        if timing is not base:
            ratio = faster(base, timing)
            measured["faster"] = Measurement("faster", *ratio, "measured", session.runtime, str(workload))
        if peak is not None:
            memory = Measurement("memory_bytes", peak, peak, peak, "measured", session.runtime, str(workload))
            measured["memory_bytes"] = memory
        size = sum(file.stat().st_size for file in artifacts[name].files)
        yield Row(name, size, measured, *_predicted(found, profile, workload), drift(timing))


def _predicted(found: Found, profile: Profile | None, workload: Workload) -> tuple[dict[str, Measurement], str]:
    """What a profile says of a model, or why it says nothing."""
    from autolite.hardware.predict import predict

    if profile is None:
        return {}, "no target is known to be this device; name the nearest with --profile"
    if found.shape is None:
        return {}, "only a candidate's folder says what its model consists of"
    try:
        prices = predict(found.shape, profile, workload)
    except TargetError as error:
        return {}, f"{profile.name}: {error}"
    return {metric: prices[metric] for metric in ("latency_ms", "memory_bytes")}, ""
