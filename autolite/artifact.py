"""A model on the disk: which file of a folder it is, what was said of it when it was made, and inputs of a size."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from autolite.architecture import ModelShape
from autolite.errors import InputError, ModelError
from autolite.inference import FALLBACK, MANIFEST, read_manifest
from autolite.measure import Workload

Dims = list[int | str | None]

_RUNTIME = "onnxruntime"
_INTEGERS = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}
_FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
_IMAGE = {"channel": "num_channels", "height": "image_size", "width": "image_size"}  # dimension -> config.json


@dataclass(frozen=True)
class Found:
    """A model on the disk, and what the files beside it say about it; None for what they do not.

    Attributes:
        file: the model's.
        workload: one call of that which it was made for.
        config: of transformers.
        shape: with its number formats.
    """

    file: Path
    workload: Workload | None
    config: Any
    shape: ModelShape | None

    @property
    def files(self) -> list[Path]:
        """All files that the model consists of, its own first."""
        if self.file.suffix != ".onnx":
            return [self.file]
        from autolite.runtime.modelfile import data_files

        return [self.file, *data_files(self.file)]


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
    shape = None
    if manifest is not None and path.is_dir() and "shape" in manifest:
        shape = ModelShape.from_json(manifest["shape"])
    return Found(file, _made_for(manifest), _config(folder), shape)


def call_of(
    found: Found, inputs: Mapping[str, tuple[str, Dims]], workload: str | None, default: Workload
) -> tuple[Workload, dict[str, np.ndarray]]:
    """Return the call that is meant, and inputs for it.

    Args:
        found: the model.
        inputs: that it takes, with their types and dimensions.
        workload: as in "batch=1,tokens=64,threads=1", or None.
        default: what is not named there.

    Raises:
        InputError: if the workload is none that this model can be called with.
        ModelError: if an input cannot be made up.
    """
    wanted = Workload.parse(workload, default) if workload is not None else default
    if wanted.generated:
        raise InputError(f"workload '{workload}': one call is meant; leave 'generated' out")
    asked = [part.partition("=")[0].strip() for part in (workload or "").split(",") if part]
    wanted = fitting(wanted, inputs, asked)
    check_positions(wanted, inputs, found.config)
    return wanted, inputs_for(inputs, wanted, found.config)


def _artifact(folder: Path, manifest: Mapping[str, Any]) -> str:
    artifacts = manifest.get("artifacts") or [FALLBACK]
    try:
        files = {artifact["runtime"]: artifact["files"][0] for artifact in artifacts}
        if _RUNTIME in files:
            return str(files[_RUNTIME])
    except (KeyError, IndexError, TypeError) as error:
        raise ModelError(f"{folder / MANIFEST} names no artifact that can be run: {artifacts!r:.200}") from error
    raise ModelError(
        f"the artifact in {folder} is for {', '.join(files)}, but only ONNX Runtime's can be run here; "
        "give the path of a model.onnx"
    )


def _only_model(folder: Path) -> Path:
    if (folder / "model.onnx").is_file():
        return folder / "model.onnx"
    if (folder / "front.json").is_file():
        inside = sorted(p.parent for p in folder.glob("candidates/*/autolite.json")) or [folder / "teacher"]
        raise InputError(f"{folder} is a run; give one of its candidates, as in {inside[0]}")
    models = sorted(p for ending in ("onnx", "ort") for p in folder.glob(f"*.{ending}"))
    if len(models) == 1:
        return models[0]
    if models:
        raise InputError(f"{folder} has {len(models)} models; give one of {', '.join(map(str, models[:5]))}")
    raise InputError(f"there is no model.onnx in {folder}; give a candidate's folder, or a folder or file with a model")


def _made_for(manifest: Mapping[str, Any] | None) -> Workload | None:
    """The workload of a manifest, one call of it."""
    if manifest is None or "workload" not in manifest:
        return None
    return replace(Workload.parse(str(manifest["workload"])), generated=0)


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
            raise ModelError(f"the model's input '{name}' is a {kind}, which cannot be made up")
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
