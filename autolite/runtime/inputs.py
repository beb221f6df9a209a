"""Inputs are compared with what a model takes before it is called: what does not fit is told in one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from autolite.errors import ModelError
from autolite.runtime.modelfile import read_inputs

PAST = "past"  # the dimension that has so many tokens as were in earlier calls


@dataclass(frozen=True)
class Takes:
    """An input of a model. Of `dims`, numbers are fixed, equal names have equal sizes, and None can be anything."""

    name: str
    dtype: np.dtype[Any]
    dims: Sequence[int | str | None]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} [{', '.join('?' if dim is None else str(dim) for dim in self.dims)}]"


def fitted(takes: Sequence[Takes], inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the arrays that a model takes, by name; others are left out. Token types that are not given are zero, and
    keys and values of earlier calls there are none.

    Whole numbers of another width are converted if all of them fit.

    Raises:
        ModelError: if an input is missing or has another type or shape.
    """
    found: dict[str, np.ndarray] = {}
    sizes: dict[str, int] = {}
    for wanted in takes:
        array = inputs.get(wanted.name)
        if array is None and wanted.name == "token_type_ids" and "input_ids" in found:
            array = np.zeros_like(found["input_ids"])
        if array is None and PAST in wanted.dims:
            known = {**sizes, PAST: 0}
            shape = tuple(known.get(dim, 1) if isinstance(dim, str) else dim or 1 for dim in wanted.dims)
            found[wanted.name] = _nothing(shape, wanted.dtype)
            continue
        if array is None:
            raise ModelError(
                f"the input {wanted.name} is missing: the model takes {', '.join(map(str, takes))}, and was given "
                f"{', '.join(inputs) or 'nothing'}"
            )
        array = _converted(array, wanted.dtype)
        if array.dtype != wanted.dtype:
            raise ModelError(f"the input {wanted.name} is {array.dtype}, but the model takes {wanted.dtype}")
        if array.ndim != len(wanted.dims):
            raise ModelError(
                f"the input {wanted.name} has rank {array.ndim}, {list(array.shape)}, but the model takes {wanted}"
            )
        for dim, size in zip(wanted.dims, array.shape, strict=True):
            expected = sizes.setdefault(dim, size) if isinstance(dim, str) else dim
            if expected not in (size, None):
                raise ModelError(
                    f"the input {wanted.name} is {list(array.shape)}, but the model takes {wanted}"
                    + (f" with {dim} = {expected} as in the inputs before it" if isinstance(dim, str) else "")
                )
        found[wanted.name] = array
    _check_sums(sizes)
    return found


@cache  # a call takes two for each layer
def _nothing(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    return np.zeros(shape, dtype)


def _check_sums(sizes: Mapping[str, int]) -> None:
    """Check that a dimension whose name is a sum, as in "past + tokens", has that size."""
    for dim, size in sizes.items():
        parts = dim.split(" + ")
        if len(parts) > 1 and size != (total := sum(sizes.get(part, 0) for part in parts)):
            told = ", ".join(f"{part} = {sizes.get(part, 0)}" for part in parts)
            raise ModelError(f"{dim} is {size} in one input, but {total} by the others: {told}")


def nothing_before(file: Path, batch: int) -> dict[str, np.ndarray]:
    """Return the inputs of an ONNX model that tell it that there were no earlier calls; none if it does not ask.

    Raises:
        ModelError: if the file is no ONNX model.
    """
    sizes = {PAST: 0, "batch": batch}
    caches = {name: dims for name, dims in read_inputs(file).items() if PAST in dims}
    return {
        name: np.zeros([sizes[d] if isinstance(d, str) else d for d in dims], np.float32)
        for name, dims in caches.items()
    }


def _converted(array: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    if array.dtype == dtype or array.dtype.kind not in "biu" or dtype.kind not in "iu":
        return array
    found = array.astype(dtype)
    return found if bool((found == array).all()) else array
