"""A projection whose weights several layers share, with a low-rank difference of each layer's own.

Source: Bae et al. 2024, "Relaxed Recursive Transformers", arXiv:2410.20672.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from autolite.unmapped import is_conv1d


class Delta(nn.Module):
    """y = base(x) + B A x + c. A is `down` [rank, in]; B and c are the weight [out, rank] and the bias of `up`, which
    has one where `base` has. All start at zero.

    `base` is the Linear or Conv1D that layers share. It is a module of its own, so that what is known of it (its
    inputs, its scores) is known over all of its uses. `weight` and `bias` are those of `base`.
    """

    def __init__(self, base: Any, rank: int) -> None:
        super().__init__()
        self.base = base
        weight = base.weight
        out, inner = weight.shape[::-1] if is_conv1d(base) else weight.shape
        self.down = _zeros(inner, rank, False, weight)
        self.up = _zeros(rank, out, base.bias is not None, weight)

    @property
    def weight(self) -> Any:
        """The shared parameter, as `base` stores it."""
        return self.base.weight

    @property
    def bias(self) -> Any:
        """The shared bias, or None."""
        return self.base.bias

    @property
    def rank(self) -> int:
        """The rank of the difference."""
        return int(self.down.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] for x [..., in]."""
        shared: Tensor = self.base(x)
        own: Tensor = self.up(self.down(x))
        return shared + own

    @torch.no_grad()
    def fit(self, difference: Tensor, bias: Tensor | None = None) -> None:
        """Set c to `bias` [out], and B A to the best approximation of `difference` [out, in] in the Frobenius norm:
        B = U S and A = V' of its truncated singular value decomposition.

        Of no difference at all B is zero, and A the first cosines of the discrete cosine transform: orthonormal as V',
        but with a part in every input, so that both can be trained even if inputs are pruned.
        """
        if difference.any():
            left, values, right = torch.linalg.svd(difference, full_matrices=False)
            self.up.weight.copy_(left[:, : self.rank] * values[: self.rank])
            self.down.weight.copy_(right[: self.rank])
        else:
            width = difference.shape[1]
            angles = torch.outer(torch.arange(1, self.rank + 1), torch.arange(width) + 0.5) * (math.pi / width)
            self.up.weight.zero_()
            self.down.weight.copy_(angles.cos() * math.sqrt(2 / width))
        if bias is not None:
            self.up.bias.copy_(bias)


def base_of(module: Any) -> Any:
    """Return the Linear or Conv1D in a projection, which is it itself if it has no difference."""
    return module.base if isinstance(module, Delta) else module


def _zeros(inner: int, out: int, bias: bool, like: Tensor) -> nn.Linear:
    linear = nn.Linear(inner, out, bias=bias, device="meta", dtype=like.dtype).to_empty(device=like.device)
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    return linear
