"""Least squares by normal equations, streamed: what is kept is the moments, never the rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Line", "Moments", "ridge_line"]


@dataclass(frozen=True, eq=False)
class Line:
    """Per group, ``target = row @ weight + constant``.

    Attributes:
        weight: ``[groups, columns, outputs]``, in float64.
        constant: ``[groups, outputs]``.
    """

    weight: Tensor
    constant: Tensor


class Moments:
    """Sums over rows, centred, in float64; blocks are joined by Chan's formula, so that nothing cancels.

    Attributes:
        rows: How many.
        mean, target_mean: ``[groups, columns]`` and ``[groups, outputs]``.
        square: ``[groups, columns, columns]``: sum of (row - mean)ᵀ(row - mean).
        cross: ``[groups, columns, outputs]``: the same of rows and targets.
        target_square: ``[groups, outputs]``: sum of squares of (target - mean).
    """

    def __init__(self) -> None:
        self.rows = 0
        self.mean = self.target_mean = self.square = self.cross = self.target_square = torch.empty(0)

    def add(self, rows: Tensor, targets: Tensor) -> None:
        """Take in a block: ``[groups, rows, columns]`` and ``[groups, rows, outputs]``."""
        count = rows.shape[1]
        mean, target_mean = rows.mean(1), targets.mean(1)
        rows = rows - mean[:, None]
        targets = targets - target_mean[:, None]
        square = rows.transpose(1, 2) @ rows
        cross = rows.transpose(1, 2) @ targets
        target_square = targets.square().sum(1)
        if not self.rows:
            self.rows = count
            self.mean, self.target_mean = mean, target_mean
            self.square, self.cross, self.target_square = square, cross, target_square
            return
        total = self.rows + count
        share = self.rows * count / total
        step, target_step = mean - self.mean, target_mean - self.target_mean
        self.square += square + share * step[:, :, None] * step[:, None, :]
        self.cross += cross + share * step[:, :, None] * target_step[:, None, :]
        self.target_square += target_square + share * target_step.square()
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

    def about_zero(self, constant: Tensor) -> Moments:
        """The moments of rows as they are and of (targets - constant), not centred: for lines without a constant."""
        part = Moments()
        part.rows = self.rows
        off = self.target_mean - constant
        part.square = self.square + self.rows * self.mean[:, :, None] * self.mean[:, None, :]
        part.cross = self.cross + self.rows * self.mean[:, :, None] * off[:, None, :]
        return part

    def error(self, line: Line) -> float:
        """Mean squared error of a line over all rows, relative to the targets' mean variance."""
        off = (self.mean[:, None] @ line.weight).squeeze(1) + line.constant - self.target_mean
        fitted = (line.weight * (self.square @ line.weight - 2 * self.cross)).sum(1)
        total = float((self.target_square + fitted + self.rows * off.square()).sum())
        scale = float(self.target_square.sum())
        return max(total, 0.0) / scale if scale > 0 else float(total > 0)

    def variance(self, weight: Tensor) -> Tensor:
        """Of the outputs ``row @ weight``: ``[groups, outputs]``."""
        return (weight * (self.square @ weight)).sum(1).clamp_min(0) / max(self.rows, 1)


def ridge_line(moments: Moments, start: Line, ridge: float, *, intercept: bool = True) -> Line:
    """The line with the least squared error and ``ridge`` times the distance from ``start``.

    The penalty is relative: weights are held by ``ridge`` times the columns' mean square, the mean output by ``ridge``
    times the number of rows. With an infinite ridge it is ``start``, with 0 plain least squares.

    Args:
        moments: Of the rows.
        start: Where the ridge pulls to.
        ridge: From 0 to infinity.
        intercept: Whether the constant is fitted too; else it stays as it is.
    """
    if ridge == float("inf"):
        return start
    if not intercept:
        moments = moments.about_zero(start.constant)
    columns = moments.square.shape[-1]
    scale = moments.square.diagonal(dim1=1, dim2=2).mean(1)  # [groups]
    held = ridge * torch.where(scale > 0, scale, torch.ones_like(scale))
    system = moments.square + held[:, None, None] * torch.eye(columns, dtype=torch.float64, device=scale.device)
    pull = moments.cross - moments.square @ start.weight
    weight = start.weight + _solved(system, pull)
    if not intercept:
        return Line(weight, start.constant)
    before = (moments.mean[:, None] @ start.weight).squeeze(1) + start.constant
    mean = (moments.target_mean + ridge * before) / (1 + ridge)
    return Line(weight, mean - (moments.mean[:, None] @ weight).squeeze(1))


def _solved(system: Tensor, right: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(system)
    if not bool(failed.any()):
        return torch.cholesky_solve(right, factor)
    # Rank-deficient, and hardly any ridge: the shortest solution.
    values, vectors = torch.linalg.eigh(system)
    floor = values.amax(-1, keepdim=True) * values.shape[-1] * torch.finfo(values.dtype).eps
    inverse = torch.where(values > floor, 1 / values.clamp_min(1e-300), torch.zeros_like(values))
    return vectors @ (inverse[..., None] * (vectors.transpose(1, 2) @ right))
