"""Least squares by normal equations, streamed: what is kept is the moments, never the rows."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Line", "Moments", "Rows"]

_LARGE = 1024  # columns, up to which it is found out what follows from what
_ALIKE = 1e-12  # of the largest eigenvalue: what float32 inputs leave where columns depend on each other
_HARDLY = 1e-10  # ridges below this do not keep the system away from being singular


@dataclass(frozen=True, eq=False)
class Line:
    """Per group, ``target = row @ weight + constant``.

    Attributes:
        weight: ``[groups, columns, outputs]``, in float64.
        constant: ``[groups, outputs]``.
    """

    weight: Tensor
    constant: Tensor


class Rows(ABC):
    """A regression: rows and targets, in whatever form, and what is asked of them. All in float64.

    Attributes:
        rows: How many.
        mean, target_mean: ``[groups, columns]`` and ``[groups, outputs]``.
        target_square: ``[groups, outputs]``: sum of squares of (target - mean).
    """

    rows: int
    mean: Tensor
    target_mean: Tensor
    target_square: Tensor

    @property
    def columns(self) -> int:
        """Unknowns per output."""
        return self.mean.shape[-1]

    def lines(self, start: Line, ridges: Iterable[float], *, intercept: bool = True) -> Iterator[Line]:
        """For each ridge the line with the least squared error and ``ridge`` times the distance from ``start``.

        The penalty is relative: weights are held by ``ridge`` times the columns' mean square, the mean output by
        ``ridge`` times the number of rows. With an infinite ridge it is ``start``, with 0 plain least squares (of
        several equal ones that nearest to ``start``).

        Args:
            start: Where the ridge pulls to.
            ridges: From 0 to infinity.
            intercept: Whether the constant is fitted too; else it stays as it is.
        """
        solve: Callable[[float], Tensor] | None = None
        for ridge in ridges:
            if ridge == math.inf:
                yield start
                continue
            solve = solve or self._solver(start, intercept)
            weight = start.weight + solve(ridge)
            if not intercept:
                yield Line(weight, start.constant)
                continue
            before = (self.mean[:, None] @ start.weight).squeeze(1) + start.constant
            mean = (self.target_mean + ridge * before) / (1 + ridge)
            yield Line(weight, mean - (self.mean[:, None] @ weight).squeeze(1))

    def error(self, line: Line) -> float:
        """Mean squared error of a line over all rows, relative to the targets' mean variance."""
        total, scale = max(self._squares(line), 0.0), float(self.target_square.sum())
        return total / scale if scale > 0 else float(total > 0)

    def lacks(self) -> tuple[int, int]:
        """How many unknowns belong to columns that never change, and how many more nothing tells apart.

        The second is not looked for, and 0, where it would take long: from 1025 columns on.
        """
        squares = self._column_squares()
        dead = int((squares <= squares.amax(-1, keepdim=True) * 1e-24).sum())
        return dead, 0

    @abstractmethod
    def _column_squares(self) -> Tensor:
        """``[groups, columns]``: sums of squares of (row - mean)."""

    @abstractmethod
    def spread(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of ``row @ weight``, each ``[groups, outputs]``."""

    @abstractmethod
    def _solver(self, start: Line, intercept: bool) -> Callable[[float], Tensor]:
        """From a ridge to how far the weight goes away from ``start``; asked in any order."""

    @abstractmethod
    def _squares(self, line: Line) -> float:
        """Sum of squared errors."""


class Moments(Rows):
    """Sums over rows, centred; blocks are joined by Chan's formula, so that nothing cancels.

    Attributes:
        square: ``[groups, columns, columns]``: sum of (row - mean)ᵀ(row - mean).
        cross: ``[groups, columns, outputs]``: the same of rows and targets.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.mean = self.target_mean = self.square = self.cross = self.target_square = torch.empty(0)

    def add(self, rows: Tensor, targets: Tensor) -> None:
        """Take in a block: ``[groups, rows, columns]`` and ``[groups, rows, outputs]``."""
        count = rows.shape[1]
        mean, target_mean = rows.mean(1), targets.mean(1)
        if not self.rows:
            groups, columns = mean.shape
            self.mean, self.target_mean = mean, target_mean
            self.square = mean.new_zeros(groups, columns, columns)
            self.cross = mean.new_zeros(groups, columns, target_mean.shape[1])
            self.target_square = torch.zeros_like(target_mean)
        total = self.rows + count
        step, target_step = mean - self.mean, target_mean - self.target_mean
        # One row more stands for the way between the two means.
        share = math.sqrt(self.rows * count / total)
        rows = torch.cat([rows - mean[:, None], share * step[:, None]], 1)
        targets = torch.cat([targets - target_mean[:, None], share * target_step[:, None]], 1)
        self.square.baddbmm_(rows.transpose(1, 2), rows)
        self.cross.baddbmm_(rows.transpose(1, 2), targets)
        self.target_square += targets.square().sum(1)
        self.mean = self.mean + step * (count / total)
        self.target_mean = self.target_mean + target_step * (count / total)
        self.rows = total

    def of_columns(self, columns: Tensor) -> Moments:
        """The moments of some columns only."""
        part = Moments()
        part.rows = self.rows
        if not self.rows:
            return part
        part.target_mean, part.target_square = self.target_mean, self.target_square
        part.mean, part.cross = self.mean[:, columns], self.cross[:, columns]
        part.square = self.square[:, columns][:, :, columns]
        return part

    def spread(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of ``row @ weight``, each ``[groups, outputs]``."""
        variance = (weight * (self.square @ weight)).sum(1).clamp_min(0) / max(self.rows, 1)
        return (self.mean[:, None] @ weight).squeeze(1), variance

    def lacks(self) -> tuple[int, int]:
        """See :meth:`Rows.lacks`."""
        dead, _ = super().lacks()
        if self.columns > _LARGE:
            return dead, 0
        values = torch.linalg.eigvalsh(self.square)
        floor = values.amax(-1, keepdim=True) * _ALIKE
        return dead, max(int((values <= floor).sum()) - dead, 0)

    def _column_squares(self) -> Tensor:
        return self.square.diagonal(dim1=1, dim2=2)

    def _solver(self, start: Line, intercept: bool) -> Callable[[float], Tensor]:
        square, cross = self.square, self.cross
        if not intercept:  # of rows as they are and of (targets - constant), not centred
            off = self.target_mean - start.constant
            square = square + self.rows * self.mean[:, :, None] * self.mean[:, None, :]
            cross = cross + self.rows * self.mean[:, :, None] * off[:, None, :]
        pull = cross - square @ start.weight
        scale = square.diagonal(dim1=1, dim2=2).mean(1)

        def solve(ridge: float) -> Tensor:
            system = square.clone()
            system.diagonal(dim1=1, dim2=2).add_(ridge * torch.where(scale > 0, scale, 1.0)[:, None])
            return _solved(system, pull, ridge < _HARDLY)

        return solve

    def _squares(self, line: Line) -> float:
        off = (self.mean[:, None] @ line.weight).squeeze(1) + line.constant - self.target_mean
        fitted = (line.weight * (self.square @ line.weight - 2 * self.cross)).sum(1)
        return float((self.target_square + fitted + self.rows * off.square()).sum())


def _solved(system: Tensor, right: Tensor, singular: bool) -> Tensor:
    if not singular:
        factor, failed = torch.linalg.cholesky_ex(system)
        if not bool(failed.any()):
            return torch.cholesky_solve(right, factor)
    # Rank-deficient, and hardly any ridge: the shortest solution.
    values, vectors = torch.linalg.eigh(system)
    floor = values.amax(-1, keepdim=True) * values.shape[-1] * torch.finfo(values.dtype).eps
    inverse = torch.where(values > floor, 1 / values.clamp_min(1e-300), torch.zeros_like(values))
    return vectors @ (inverse[..., None] * (vectors.transpose(1, 2) @ right))
