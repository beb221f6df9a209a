"""Least squares with rows that go: what each removal costs once all other rows have moved to their new best.

With G = X'X and the ridge d, the error ||Y - X W||^2 + d ||W - W0||^2 of a linear map has its least at
W = (G + dI)^-1 (X'Y + d W0), and forcing the rows S of W to zero raises it by tr(W_S' (H_SS)^-1 W_S), H = (G + dI)^-1,
if all others move to their new best. Units are removed one at a time by that loss, exactly, and H is updated by a block
elimination. Sources: Hassibi & Stork 1992, "Optimal Brain Surgeon"; Frantar & Alistarh 2022, "Optimal Brain
Compression"; for groups of rows as units, Kurtic et al. 2023, "ZipLM".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 0.01  # the ridge, as a part of the mean of G's diagonal
FLUSH = 64  # eliminations that are collected before H is updated by one product


@dataclass(frozen=True, eq=False)
class Moments:
    """What the least squares of one linear map need, in float64: `gram` = X'X [k, k], `cross` = X'Y [k, n] and
    `energy` = ||Y||^2, once `damped` with the ridge: X'X + dI, X'Y + d W0 and ||Y||^2 + d ||W0||^2. A bias is the last
    row of W, whose column of X is all ones."""

    gram: Tensor
    cross: Tensor
    energy: float

    @classmethod
    def of(cls, inputs: Tensor, outputs: Tensor) -> Moments:
        """Return the moments of inputs X [tokens, k] and outputs Y [tokens, n], without a ridge."""
        x, y = inputs, outputs
        return cls((x.T @ x).double().cpu(), (x.T @ y).double().cpu(), float(y.square().sum()))

    def __add__(self, other: Moments) -> Moments:
        """Return the moments of the examples of both."""
        return Moments(self.gram + other.gram, self.cross + other.cross, self.energy + other.energy)

    def damped(self, weight: Tensor, damping: float = DAMPING) -> Moments:
        """Add the ridge towards `weight` [k, n]."""
        weight = weight.double()
        ridge = max(damping * float(self.gram.diagonal().mean()), 1e-12)
        gram = self.gram + ridge * torch.eye(len(self.gram), dtype=torch.float64)
        return Moments(gram, self.cross + ridge * weight, self.energy + ridge * float(weight.square().sum()))

    def error(self, weight: Tensor) -> float:
        """Return the error of weights [k, n]."""
        weight = weight.double()
        fit = (weight * (self.gram @ weight)).sum() - 2 * (weight * self.cross).sum()
        return self.energy + float(fit)

    def solution(self) -> Tensor:
        """Return the weights [k, n] of least error."""
        return torch.cholesky_solve(self.cross, torch.linalg.cholesky(self.gram))

    def fit(self, rows: Tensor) -> Tensor:
        """Return the weights [len(rows), n] of least error if all other rows are zero."""
        factor = torch.linalg.cholesky(self.gram[rows][:, rows])
        return torch.cholesky_solve(self.cross[rows], factor)


class _Remainder:
    """One problem as its units go. H is `inverse` - `left` @ `right`, of which `blocks` [units, size, size] are always
    up to date, and `weight` the best one of the rows that are left."""

    def __init__(self, moments: Moments, size: int, units: int):
        self.energy, self.size, self.units = max(moments.energy, 1e-30), size, units
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments.gram))
        cross = moments.cross
        if cross.shape[1] > len(cross):  # only products of two rows matter, and a rotation of the outputs keeps them
            cross = torch.linalg.qr(cross.T, mode="r").R.T
        self.weight = self.inverse @ cross
        spans = [slice(unit * size, (unit + 1) * size) for unit in range(units)]
        self.blocks = torch.stack([self.inverse[span, span] for span in spans])
        self.left, self.right = self.inverse[:, :0], self.inverse[:0]

    def costs(self) -> Tensor:
        """What removing each unit adds to the error, as a part of the energy [units]."""
        rows = self.weight[: self.units * self.size].view(self.units, self.size, -1)
        if self.size == 1:
            costs = rows.square().sum((1, 2)) / self.blocks[:, 0, 0]
        else:
            costs = (rows * torch.linalg.solve(self.blocks, rows)).sum((1, 2))
        return costs / self.energy

    def remove(self, unit: int) -> None:
        """Force a unit's rows to zero."""
        size, units = self.size, self.units
        span = slice(unit * size, (unit + 1) * size)
        column = self.inverse[:, span] - self.left @ self.right[:, span]  # [k, size] of H as it is now
        update = torch.linalg.solve(column[span], column.T)  # (H_SS)^-1 H_S: what H loses is column @ update
        self.weight.addmm_(column, torch.linalg.solve(column[span], self.weight[span]), alpha=-1)
        self.weight[span] = 0
        ours = column[: units * size].view(units, size, size)
        self.blocks -= ours @ update[:, : units * size].view(size, units, size).permute(1, 0, 2)
        self.blocks[unit] = torch.eye(size, dtype=torch.float64)
        self.left, self.right = torch.cat((self.left, column), 1), torch.cat((self.right, update), 0)
        if self.left.shape[1] >= FLUSH:
            self.inverse -= self.left @ self.right
            self.left, self.right = self.left[:, :0], self.right[:0]


def eliminate(problems: Sequence[Moments], size: int, units: int, count: int) -> tuple[list[int], list[float]]:
    """Remove `count` of `units` units, each `size` neighbouring rows of W, greedily by what each removal costs.

    Several problems have their units in common: a unit goes from all of them, and costs the sum of what it costs in
    each, as a part of that one's energy. Returns the units in the order they go, and these costs. Rows after the
    units' (a bias) always stay.
    """
    left = [_Remainder(moments, size, units) for moments in problems]
    alive = torch.ones(units, dtype=torch.bool)
    order: list[int] = []
    losses: list[float] = []
    for _ in range(count):
        costs = torch.stack([problem.costs() for problem in left]).sum(0)
        unit = int(costs.masked_fill(~alive, torch.inf).argmin())
        order.append(unit)
        losses.append(float(costs[unit]))
        alive[unit] = False
        for problem in left:
            problem.remove(unit)
    return order, losses


def removal_scores(problems: Sequence[Moments], size: int, units: int) -> Tensor:
    """Return a score for each unit [units]: what its removal costs when all go one after the other. The later, the
    higher, and no two are equal, so that ranking by score gives the order back."""
    order, losses = eliminate(problems, size, units, units - 1)
    order += set(range(units)) - set(order)
    rising = torch.tensor([0.0, *losses], dtype=torch.float64).cummax(0).values.roll(-1)
    rising[-1] = 2 * rising[-2] if losses else 1.0
    scores = torch.empty(units, dtype=torch.float64)
    scores[order] = rising * (1 + 1e-9 * torch.arange(units, dtype=torch.float64))
    return scores
