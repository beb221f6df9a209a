"""Profile a model of the user's: find it, make inputs of the workload's size, and say where a call's time goes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autolite.errors import InputError, ModelError
from autolite.hardware.processor import processors
from autolite.inference import FALLBACK, MANIFEST, read_manifest
from autolite.measure import Workload

if TYPE_CHECKING:
    from autolite.runtime.operators import OperatorProfile

Dims = list[int | str | None]

_RUNTIME = "onnxruntime"
_INTEGERS = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}
_FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
_IMAGE = {"channel": "num_channels", "height": "image_size", "width": "image_size"}  # dimension -> config.json


@dataclass(frozen=True)
class Found:
    """A model on the disk, and what the files beside it say about it; None for what they do not."""

    file: Path
    workload: Workload
    config: Any


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
    found = find(Path(path))
    wanted = Workload.parse(workload, found.workload) if workload is not None else found.workload
    if wanted.generated:
        raise InputError(f"workload '{workload}': one call is profiled; leave 'generated' out")
    from autolite.hardware.local import check_threads
    from autolite.hardware.peaks import local_peaks
    from autolite.runtime.onnxruntime import OnnxRuntime
    from autolite.runtime.operators import collect

    check_threads(wanted.threads)
    runner = OnnxRuntime().load(found.file, wanted.threads)
    asked = [part.partition("=")[0].strip() for part in (workload or "").split(",") if part]
    wanted = fitting(wanted, runner.inputs, asked)
    check_positions(wanted, runner.inputs, found.config)
    inputs = inputs_for(runner.inputs, wanted, found.config)
    try:
        runner.run(inputs)
    except ModelError as error:
        raise ModelError(
            f"{found.file} does not run with {wanted}; if it has fewer positions, ask for fewer tokens ({error})"
        ) from error
    return collect(found.file, runner, inputs, wanted, local_peaks(wanted.threads, progress), seconds, progress)


def find(path: Path) -> Found:
    """Find the model at a path.

    Raises:
        InputError: if there is none, or more than one to choose from.
        ModelError: if the folder's autolite.json is damaged, or names no model for ONNX Runtime.
    """
    if not path.exists():
        raise InputError(f"there is nothing at {path}; give a candidate's folder, or a folder or file with a model")
    folder = path if path.is_dir() else path.parent
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else None
    if path.is_file():
        file = path
    elif manifest is not None:
        file = folder / _artifact(folder, manifest)
    else:
        file = _only_model(folder)
    return Found(file, _made_for(manifest), _config(folder))


def _artifact(folder: Path, manifest: Mapping[str, Any]) -> str:
    artifacts = manifest.get("artifacts") or [FALLBACK]
    try:
        files = {artifact["runtime"]: artifact["files"][0] for artifact in artifacts}
        if _RUNTIME in files:
            return str(files[_RUNTIME])
    except (KeyError, IndexError, TypeError) as error:
        raise ModelError(f"{folder / MANIFEST} names no artifact that can be run: {artifacts!r:.200}") from error
    raise ModelError(
        f"the artifact in {folder} is for {', '.join(files)}, but only ONNX Runtime's can be profiled; "
        "give the path of a model.onnx"
    )


def _only_model(folder: Path) -> Path:
    if (folder / "model.onnx").is_file():
        return folder / "model.onnx"
    if (folder / "front.json").is_file():
        inside = sorted(p.parent for p in folder.glob("candidates/*/autolite.json")) or [folder / "teacher"]
        raise InputError(f"{folder} is a run; give one of its candidates, as in: autolite profile {inside[0]}")
    models = sorted(p for ending in ("onnx", "ort") for p in folder.glob(f"*.{ending}"))
    if len(models) == 1:
        return models[0]
    if models:
        raise InputError(f"{folder} has {len(models)} models; give one of {', '.join(map(str, models[:5]))}")
    raise InputError(f"there is no model.onnx in {folder}; give a candidate's folder, or a folder or file with a model")


def _made_for(manifest: Mapping[str, Any] | None) -> Workload:
    """The workload of a manifest, one call of it, on no more threads than there are here."""
    if manifest is None or "workload" not in manifest:
        return Workload()
    made_for = Workload.parse(str(manifest["workload"]))
    return replace(made_for, generated=0, threads=min(made_for.threads, processors()))


def _config(folder: Path) -> Any:
    """The transformers configuration in the folder, or None if there is none that can be read."""
    if not (folder / "config.json").is_file():
        return None
    from transformers import AutoConfig

    with suppress(Exception):  # whatever a foreign configuration can do wrong: it is not needed
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    return None


def fitting(workload: Workload, inputs: Mapping[str, tuple[str, Dims]], asked: Collection[str] = ()) -> Workload:
    """Return the workload with the sizes at which the model's inputs are fixed; images are one token.

    Raises:
        InputError: if a part of the workload is fixed at another size, and this part was `asked` for.
    """
    tokens = any(kind in _INTEGERS for kind, _ in inputs.values())
    fixed: dict[str, int] = {} if tokens else {"tokens": 1}
    for kind, dims in inputs.values():
        parts = ("batch", "tokens") if kind in _INTEGERS and len(dims) == 2 else ("batch",) if len(dims) > 1 else ()
        fixed |= {part: dim for part, dim in zip(parts, dims, strict=False) if isinstance(dim, int)}
    for part in asked:
        if fixed.get(part, getattr(workload, part)) != getattr(workload, part):
            raise InputError(
                f"{part}={getattr(workload, part)}, but this model takes {part}={fixed[part]} only; leave it out"
            )
    return replace(workload, **fixed)


def check_positions(workload: Workload, inputs: Mapping[str, tuple[str, Dims]], config: Any) -> None:
    """Refuse more tokens than the model has positions for, as far as its configuration says.

    Raises:
        InputError: naming both.
    """
    if config is None or not any(kind in _INTEGERS for kind, _ in inputs.values()):
        return
    from autolite.families import usable_positions

    with suppress(ModelError):  # of a family that AutoLite does not know
        limit = usable_positions(config)
        if workload.tokens > limit:
            raise InputError(
                f"tokens={workload.tokens}, but the model takes {limit} at most; give fewer, as in "
                f"--workload tokens={limit}"
            )


def inputs_for(inputs: Mapping[str, tuple[str, Dims]], workload: Workload, config: Any = None) -> dict[str, np.ndarray]:
    """Return inputs of the workload's size: random tokens, full masks, positions in order, normal noise for floats.

    Open dimensions are the batch, an image's as its configuration says, nothing for the past, and tokens otherwise.

    Raises:
        ModelError: if an input is of a type, or has a dimension, that cannot be made up.
    """
    rng = np.random.default_rng(0)
    vocab = int(getattr(config, "vocab_size", None) or 1)  # unknown: the first token, which every vocabulary has
    arrays: dict[str, np.ndarray] = {}
    for name, (kind, dims) in inputs.items():
        shape = [_size(name, axis, dim, workload, config) for axis, dim in enumerate(dims)]
        if kind in _FLOATS:
            arrays[name] = rng.standard_normal(shape).astype(_FLOATS[kind])
        elif kind == "tensor(bool)":
            arrays[name] = np.full(shape, "mask" in name)
        elif kind not in _INTEGERS:
            raise ModelError(f"the model's input '{name}' is a {kind}, which cannot be made up for a profile")
        elif "mask" in name:
            arrays[name] = np.ones(shape, _INTEGERS[kind])
        elif "position" in name:
            arrays[name] = np.broadcast_to(np.arange(shape[-1], dtype=_INTEGERS[kind]), shape).copy()
        elif "type" in name:
            arrays[name] = np.zeros(shape, _INTEGERS[kind])
        else:
            arrays[name] = rng.integers(0, vocab, shape, dtype=_INTEGERS[kind])
    return arrays


def _size(name: str, axis: int, dim: int | str | None, workload: Workload, config: Any) -> int:
    if isinstance(dim, int):
        return dim
    label = str(dim or "").lower()
    if axis == 0 or "batch" in label:
        return workload.batch
    for part, setting in _IMAGE.items():
        if part in label:
            size = getattr(config, setting, None)
            if not isinstance(size, int):
                raise ModelError(
                    f"the model leaves '{dim}' of its input '{name}' open, and no config.json beside it says "
                    f"{setting}; put the model's config.json into its folder"
                )
            return size
    return 0 if label.startswith("past") and "+" not in label else workload.tokens
