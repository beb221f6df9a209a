"""An embedding table as a product of two thin factors, and the language-model head that is tied to it."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F


class FactoredEmbedding(nn.Module):
    """Rows of a table [tokens, rank], projected to [..., width]: stands where nn.Embedding [tokens, width] stood.

    `weight` is the table, as nn.Embedding's is; the projection's weight is [width, rank].
    """

    def __init__(self, table: Tensor, projection: Tensor, padding: int | None = None) -> None:
        """Take the factors [tokens, rank] and [width, rank]; the row of `padding` is not trained."""
        super().__init__()
        tokens, rank = table.shape
        self.table = nn.Embedding(tokens, rank, padding, _weight=table)
        self.projection = nn.Linear(rank, len(projection), bias=False, device="meta")
        self.projection.weight = nn.Parameter(projection)

    @property
    def weight(self) -> nn.Parameter:
        """The table [tokens, rank]."""
        return cast("nn.Parameter", self.table.weight)

    @property
    def padding_idx(self) -> int | None:
        """The row that is not trained, as nn.Embedding has it."""
        return self.table.padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        """Return [..., width] of `ids` [...]."""
        projected: Tensor = self.projection(self.table(ids))
        return projected


class TiedHead(nn.Module):
    """Logits by both factors of an embedding, the projection first; it has no weights of its own, and stores none."""

    bias = None

    def __init__(self, embedding: FactoredEmbedding) -> None:
        super().__init__()
        self.__dict__["embedding"] = embedding  # not as a submodule, whose parameters would have a second name

    @property
    def weight(self) -> nn.Parameter:
        """The embedding's table [tokens, rank]."""
        return cast("nn.Parameter", self.__dict__["embedding"].weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the logits [..., tokens] of `hidden` [..., width]."""
        return F.linear(F.linear(hidden, self.__dict__["embedding"].projection.weight.T), self.weight)
