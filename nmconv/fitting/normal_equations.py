"""Least squares by normal equations: rows are streamed, only their moments are kept."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nmconv.fitting.ridge_regression import Coefficients, Regression

__all__ = ["Moments"]

_MAX_EIGEN_COLUMNS = 1024  # largest number of columns for which linear dependence is looked for
_DEPENDENT = 1e-12  # relative to the largest eigenvalue: what float32 inputs leave of linearly dependent columns
_NEGLIGIBLE_RIDGE = 1e-10  # smaller ridges do not keep the system from being singular


class Moments(Regression):
    """Centered sums over rows; blocks are combined by Chan's formula, which avoids cancellation.

    Attributes:
        square: Sum of (row - mean)ᵀ(row - mean), ``[groups, columns, columns]``.
        cross: Sum of (row - mean)ᵀ(target - target mean), ``[groups, columns, outputs]``.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.mean = self.target_mean = self.square = self.cross = self.target_square = torch.empty(0)

    def add(self, rows: Tensor, targets: Tensor) -> None:
        """Add a block: ``[groups, rows, columns]`` and ``[groups, rows, outputs]``."""
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
        # One additional row accounts for the distance between the two means.
        factor = math.sqrt(self.rows * count / total)
        rows = torch.cat([rows - mean[:, None], factor * step[:, None]], 1)
        targets = torch.cat([targets - target_mean[:, None], factor * target_step[:, None]], 1)
        self.square.baddbmm_(rows.transpose(1, 2), rows)
        self.cross.baddbmm_(rows.transpose(1, 2), targets)
        self.target_square += targets.square().sum(1)
        self.mean = self.mean + step * (count / total)
        self.target_mean = self.target_mean + target_step * (count / total)
        self.rows = total

    def of_columns(self, columns: Tensor) -> Moments:
        """Return the moments of a subset of the columns."""
        part = Moments()
        part.rows = self.rows
        if not self.rows:
            return part
        part.target_mean, part.target_square = self.target_mean, self.target_square
        part.mean, part.cross = self.mean[:, columns], self.cross[:, columns]
        part.square = self.square[:, columns][:, :, columns]
        return part

    def output_statistics(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of ``row @ weight``, each ``[groups, outputs]``."""
        variance = (weight * (self.square @ weight)).sum(1).clamp_min(0) / max(self.rows, 1)
        return (self.mean[:, None] @ weight).squeeze(1), variance

    def degenerate_columns(self) -> tuple[int, int]:
        """See :meth:`Regression.degenerate_columns`."""
        constant, _ = super().degenerate_columns()
        if self.columns > _MAX_EIGEN_COLUMNS:
            return constant, 0
        eigenvalues = torch.linalg.eigvalsh(self.square)
        threshold = eigenvalues.amax(-1, keepdim=True) * _DEPENDENT
        return constant, max(int((eigenvalues <= threshold).sum()) - constant, 0)

    def _column_squares(self) -> Tensor:
        return self.square.diagonal(dim1=1, dim2=2)

    def _solver(self, initial: Coefficients, fit_intercept: bool) -> Callable[[float], Tensor]:
        square, cross = self.square, self.cross
        if not fit_intercept:  # moments of uncentered rows and of (targets - intercept)
            offset = self.target_mean - initial.intercept
            square = square + self.rows * self.mean[:, :, None] * self.mean[:, None, :]
            cross = cross + self.rows * self.mean[:, :, None] * offset[:, None, :]
        right = cross - square @ initial.weight
        scale = square.diagonal(dim1=1, dim2=2).mean(1)

        def solve(ridge: float) -> Tensor:
            system = square.clone()
            system.diagonal(dim1=1, dim2=2).add_(ridge * torch.where(scale > 0, scale, 1.0)[:, None])
            return _solve(system, right, maybe_singular=ridge < _NEGLIGIBLE_RIDGE)

        return solve

    def _squared_error(self, coefficients: Coefficients) -> float:
        weight = coefficients.weight
        offset = (self.mean[:, None] @ weight).squeeze(1) + coefficients.intercept - self.target_mean
        explained = (weight * (self.square @ weight - 2 * self.cross)).sum(1)
        return float((self.target_square + explained + self.rows * offset.square()).sum())


def _solve(system: Tensor, right: Tensor, *, maybe_singular: bool) -> Tensor:
    """Solve by Cholesky; by the pseudoinverse (the solution of least norm) if the system may be singular."""
    if not maybe_singular:
        factor, failed = torch.linalg.cholesky_ex(system)
        if not bool(failed.any()):
            return torch.cholesky_solve(right, factor)
    values, vectors = torch.linalg.eigh(system)
    threshold = values.amax(-1, keepdim=True) * values.shape[-1] * torch.finfo(values.dtype).eps
    inverse = torch.where(values > threshold, 1 / values.clamp_min(1e-300), torch.zeros_like(values))
    return vectors @ (inverse[..., None] * (vectors.transpose(1, 2) @ right))
