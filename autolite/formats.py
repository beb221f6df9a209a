"""Number formats: encode, decode and exact bytes. The reference that every kernel is tested against.

A weight matrix is [n, k]: n output features (rows), k input features. `Encoded` keeps exactly the tensors that the
ONNX artifact stores, so `nbytes` is a promise about files and not an estimate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from autolite.codebooks import NF4, Fixed, KMeans, powers_of_two
from autolite.errors import PlanError, unknown
from autolite.linear_grids import Linear

GROUP = 32  # inputs that share a scale: the usual block of ONNX Runtime's MatMulNBits
INT7 = 63  # 2 * 63 * 255 fits in 16 bits: such codes multiply 8-bit activations exactly in pairs


@dataclass(frozen=True)
class Encoded:
    """A matrix in a number format: its [n, k] shape and the tensors stored for it."""

    format: str
    shape: tuple[int, int]
    tensors: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


class Grid(Protocol):
    """What is fixed before values are rounded: scales, zero points, codebooks, of a matrix [n, k].

    Values and codes are [n, j], those of the columns from `start` on: rounding can go column by column.
    """

    def quantize(self, values: Tensor, start: int = 0) -> Tensor:
        """Return the codes, integers, of the levels nearest to float32 values."""
        ...

    def dequantize(self, codes: Tensor, start: int = 0) -> Tensor:
        """Return the float32 values of codes."""
        ...

    def tensors(self, codes: Tensor) -> dict[str, Tensor]:
        """Return what is stored for the codes [n, k] of all columns."""
        ...

    def rows(self, chosen: Tensor) -> Grid:
        """Return the grid of some rows, by their numbers, int64 [m]."""
        ...


class Layout(Protocol):
    """How a kind of format fits its grids and stores them."""

    @property
    def bits(self) -> int:
        """Bits of one code."""
        ...

    @property
    def linear(self) -> bool:
        """Whether levels are evenly spaced."""
        ...

    @property
    def shared(self) -> tuple[str, ...]:
        """Names of the stored tensors that are not by row: of which a matrix has one for all rows, [1, ...]."""
        ...

    def by_row(self) -> Layout:
        """Return the same with what is shared repeated for each row."""
        ...

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Grid:
        """Return the grid for a float32 matrix [n, k]; `importance`, not negative and broadcastable to [n, k], weighs
        each value's squared error."""
        ...

    def read(self, tensors: Mapping[str, Tensor], k: int) -> tuple[Grid, Tensor]:
        """Return the grid of stored tensors, and the codes [n, k]."""
        ...

    def nbytes(self, n: int, k: int) -> int:
        """Return the exact bytes of the stored tensors of an [n, k] matrix."""
        ...


@dataclass(frozen=True)
class Float:
    """Floating point of this type: a code is the value itself."""

    type: torch.dtype

    linear = True
    shared = ()

    @property
    def bits(self) -> int:
        """Bits of a value."""
        return 8 * self.type.itemsize

    def by_row(self) -> Float:
        """Return itself."""
        return self

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Float:
        """Return itself: nothing depends on the weights."""
        return self

    def quantize(self, values: Tensor, start: int = 0) -> Tensor:
        """Return the values in this type."""
        return values.to(self.type)

    def dequantize(self, codes: Tensor, start: int = 0) -> Tensor:
        """Return the values in float32."""
        return codes.float()

    def tensors(self, codes: Tensor) -> dict[str, Tensor]:
        """Return what is stored."""
        return {"values": codes}

    def rows(self, chosen: Tensor) -> Float:
        """Return itself."""
        return self

    def read(self, tensors: Mapping[str, Tensor], k: int) -> tuple[Float, Tensor]:
        """Return itself and the values."""
        return self, tensors["values"]

    def nbytes(self, n: int, k: int) -> int:
        """Return the bytes of an [n, k] matrix."""
        return n * k * self.type.itemsize


@dataclass(frozen=True)
class Format:
    """A number format: how it is stored (scales and codebooks come on top of the `bits` of a code), and what a product
    makes of its input.

    `embedding` says that a runtime can look single rows up in it. `activations`: 8-bit integers by the range of each
    call ("dynamic") or by a calibrated one ("static"), or nothing ("float"); where it is "any", the format is about
    stored bytes, and the kernel may do what costs less than the rounding of the weights."""

    name: str
    layout: Layout
    activations: Literal["float", "dynamic", "static", "any"]
    description: str
    embedding: bool = True

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return self.layout.bits

    @property
    def linear(self) -> bool:
        """Whether levels are evenly spaced."""
        return self.layout.linear

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Grid:
        """Return the scales, zero points and codebook for `weight` [n, k].

        Args:
            weight: float32.
            importance: a weight, not negative, of each value's squared error, broadcastable to [n, k]: the sensitivity
                of the model to it. Nothing means that all are alike.
        """
        return self.layout.fit(weight.detach().float().contiguous(), importance)

    def nbytes(self, n: int, k: int) -> int:
        """Return the exact bytes of an [n, k] matrix."""
        return self.layout.nbytes(n, k)


def encode(weight: Tensor, format: str, importance: Tensor | None = None) -> Encoded:
    """Encode a float32 matrix [n, k], every value to its nearest level; `importance` is as for `Format.fit`.

    Raises:
        PlanError: if no format has that name.
    """
    weight = weight.detach().float().contiguous()
    rows, columns = weight.shape
    grid = get(format).fit(weight, importance)
    return Encoded(format, (rows, columns), grid.tensors(grid.quantize(weight)))


def decode(encoded: Encoded) -> Tensor:
    """Return the float32 matrix [n, k] that a kernel must compute with."""
    grid, codes = get(encoded.format).layout.read(encoded.tensors, encoded.shape[1])
    return grid.dequantize(codes)


def nbytes(format: str, n: int, k: int) -> int:
    """Return the exact bytes that an [n, k] matrix takes in the artifact.

    Raises:
        PlanError: if no format has that name.
    """
    return get(format).nbytes(n, k)


def get(format: str) -> Format:
    """Return the format of that name.

    Raises:
        PlanError: if no format has that name.
    """
    if format not in FORMATS:
        raise PlanError(unknown("number format", format, FORMATS))
    return FORMATS[format]


def _formats() -> Iterator[Format]:
    floats, dynamic = "activations stay in floating point", "activations are quantized to 8 bits by each call's range"
    yield Format("fp32", Float(torch.float32), "float", "32-bit floating point")
    faster = "faster than fp32 where the processor multiplies it and the runtime uses that, else only smaller"
    yield Format("bf16", Float(torch.bfloat16), "float", f"bfloat16; {faster}")
    channel = "8-bit integers, one scale per output channel"
    yield Format("int8", Linear(8), "dynamic", f"{channel}; {dynamic}")
    calibrated = "activations are quantized by ranges that were calibrated on training examples"
    yield Format("int8-static", Linear(8), "static", f"as int8, but {calibrated}", embedding=False)
    yield Format("int8-weight", Linear(8), "float", f"as int8, but {floats}", embedding=False)
    yield Format("int8-tensor", Linear(8, whole=True), "dynamic", "as int8, but one scale for the whole matrix")
    asymmetric = "as int8, but each output channel has a zero point too"
    yield Format("int8-asym", Linear(8, symmetric=False), "dynamic", asymmetric)
    seven = "as int8 with codes of 7 bits, whose products do not overflow on x86 processors without VNNI"
    yield Format("int7", Linear(8, largest=INT7), "dynamic", seven)
    group = "bit integers, one scale per group of"
    yield Format("int6", Linear(6, GROUP, scale=torch.bfloat16), "any", f"6-{group} {GROUP} inputs")
    yield Format("int4", Linear(4, GROUP), "any", f"4-{group} {GROUP} inputs")
    for bits, size in ((4, 64), (4, 128), (3, GROUP), (3, 64), (3, 128), (2, GROUP)):
        name = f"int{bits}" if size == GROUP else f"int{bits}-g{size}"
        yield Format(name, Linear(bits, size, scale=torch.bfloat16), "any", f"{bits}-{group} {size} inputs")
    for bits in (4, 3, 2):
        layout = Linear(bits, GROUP, symmetric=False, scale=torch.bfloat16)
        yield Format(f"int{bits}-asym", layout, "any", f"{bits}-{group} {GROUP} inputs, and a zero point")
    fitted = "levels fitted by k-means"
    for bits in (2, 3, 4):
        text = f"{bits}-bit indices into a codebook of {2**bits} levels per output channel, fitted by k-means"
        yield Format(f"kmeans{bits}", KMeans(bits), "any", text)
    for bits in (4, 3, 2):
        text = f"{bits}-bit indices into one codebook of {2**bits} {fitted}, one scale per group of 64 inputs"
        yield Format(f"kmeans{bits}-g64", KMeans(bits, whole=True, group=64), "any", text)
    text = f"-bit indices into one codebook of {{}} {fitted}, one scale per output channel"
    yield Format("kmeans6", KMeans(6, whole=True), "any", f"6{text.format(64)}")
    yield Format("kmeans8", KMeans(8, whole=True), "float", f"8{text.format(256)}; {floats}")
    yield Format("nf4", Fixed(NF4), "any", "the 16 levels of 4-bit NormalFloat, one scale per group of 64 inputs")
    for bits in (4, 3):
        text = f"{bits}-bit codes of powers of two with a sign, one scale per group of 64 inputs"
        yield Format(f"pot{bits}", Fixed(powers_of_two(bits)), "any", text)


FORMATS: dict[str, Format] = {format.name: format for format in _formats()}
