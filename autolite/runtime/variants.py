"""Places of a graph where equivalent nodes can stand, the options for each, and what is taken unless it was measured.

The options of a place compute the same within the rounding of its number format; which is fastest depends on sizes,
processor and runtime version: `autolite.runtime.tune` measures them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from autolite.formats import FORMATS
from autolite.hardware.footprint import copies_cache
from autolite.runtime.linear import KERNELS, blocks_lookup

FEW_ROWS = 8  # up to so many rows reading the weights is what costs, and kernels that read fewer bytes win


@dataclass(frozen=True)
class Place:
    """A place of a graph: what stands there, the number format it works in, and its sizes.

    kind        sizes                                          options
    int8        ()                                             int8, uint8: how signed 8-bit weights are stored
    product     rows, k, n                                     the kernels of the format (`autolite.runtime.linear`)
    qkv         rows, hidden, query width, key width           merged, separate
    attention   batch, tokens, heads, kv heads, dim, causal    Attention, MultiHeadAttention, plain
    cached      batch, tokens, generated, heads, kv heads, dim Attention, GroupQueryAttention, plain: with a cache
    first       batch, tokens, heads, dim, hidden              products, absorbed: attention of the first token alone
    gelu        rows, width                                    erf, tanh
    norm        rows, width                                    add, skip
    lookup      rows, width                                    blocks, plain
    """

    kind: str
    format: str = "fp32"
    sizes: tuple[int, ...] = ()

    @property
    def options(self) -> tuple[str, ...]:
        """What can stand here, the reference first: the others must agree with it."""
        match self.kind:
            case "int8":
                return ("int8", "uint8")
            case "product":
                return tuple(k for k in ("float", "blocks", "blocks-float", "int8") if k in KERNELS[self.format])
            case "qkv":
                return ("merged", "separate")
            case "attention":
                return ("plain", "Attention", "MultiHeadAttention")
            case "cached":
                return ("plain", "Attention", "GroupQueryAttention")
            case "first":
                return ("products", "absorbed")
            case "gelu":  # the approximation errs by 0.0005: less than a step of 8-bit activations, more than float32's
                return ("erf",) if FORMATS[self.format].activations == "float" else ("erf", "tanh")
            case "norm":
                return ("add", "skip")
            case "lookup":
                return ("plain", "blocks") if blocks_lookup(FORMATS[self.format]) else ("plain",)
        raise ValueError(f"'{self.kind}' is no place of a graph")


Choices = Callable[[Place], str]


def usual(place: Place) -> str:
    """Return the option that was fastest at most sizes on x86 and ARM processors: where nothing was measured."""
    match place.kind:
        case "product" if len(place.options) > 1:
            few = place.sizes[0] <= FEW_ROWS
            return "blocks" if few and "blocks" in place.options else "int8"
        case "qkv":
            return "merged"
        case "cached":
            _, tokens, generated, heads, kv_heads, _ = place.sizes
            return "Attention" if copies_cache(heads, kv_heads, tokens, generated) else "GroupQueryAttention"
    preferred = {
        "int8": "int8",
        "attention": "Attention",
        "first": "absorbed",
        "gelu": "tanh",
        "norm": "add",
        "lookup": "blocks",
    }
    wanted = preferred.get(place.kind, "")
    return wanted if wanted in place.options else place.options[0]
