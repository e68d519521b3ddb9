"""Least squares by conjugate gradients, for moments that do not fit in memory: every step reads all rows again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from nmconv.algebra import Geometry, patches
from nmconv.fitting.ridge_regression import Coefficients, Regression

__all__ = ["ConjugateGradients"]

_TOLERANCE = 1e-10  # stop at this residual, relative to the right-hand side
_MAX_STEPS = 500  # what has not converged by then is close to the previous, larger ridge's solution, and judged as such


class ConjugateGradients(Regression):
    """A regression that keeps inputs and targets, and makes its rows by im2col, block by block.

    Args:
        batches: Pairs of the convolution's input and its target output.
        geometry: The convolution's geometry.
    """

    def __init__(self, batches: Sequence[tuple[Tensor, Tensor]], geometry: Geometry) -> None:
        self._batches = batches
        self._geometry = geometry
        self.rows = 0
        self.mean = self.target_mean = self.target_square = self._diagonal = torch.empty(0)
        if not batches:
            return
        for rows, targets in self._blocks():
            count = rows.shape[1]
            share = count / (self.rows + count)
            mean, target_mean = rows.mean(1), targets.mean(1)
            self.mean = self.mean + share * (mean - self.mean) if self.rows else mean
            self.target_mean = self.target_mean + share * (target_mean - self.target_mean) if self.rows else target_mean
            self.rows += count
        self._diagonal, self.target_square = torch.zeros_like(self.mean), torch.zeros_like(self.target_mean)
        for rows, targets in self._blocks():
            self._diagonal += (rows - self.mean[:, None]).square().sum(1)
            self.target_square += (targets - self.target_mean[:, None]).square().sum(1)

    def output_statistics(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of ``row @ weight``, each ``[groups, outputs]``."""
        mean = self.mean[:, None] @ weight
        square = sum((rows @ weight - mean).square().sum(1) for rows, _ in self._blocks())
        assert isinstance(square, Tensor)
        return mean.squeeze(1), square / self.rows

    def _column_squares(self) -> Tensor:
        return self._diagonal

    def _blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        for input, target in self._batches:
            yield from patches(input, target, self._geometry)

    def _solver(self, initial: Coefficients, fit_intercept: bool) -> Callable[[float], Tensor]:
        diagonal, mean, intercept = self._diagonal, self.mean[:, None], self.target_mean[:, None]
        if not fit_intercept:  # rows are not centered then
            diagonal = diagonal + self.rows * self.mean.square()
            mean, intercept = torch.zeros_like(mean), initial.intercept[:, None]
        right = torch.zeros_like(initial.weight)
        for rows, targets in self._blocks():
            rows = rows - mean
            right += rows.transpose(1, 2) @ (targets - intercept - rows @ initial.weight)
        scale = diagonal.mean(1)
        solution = torch.zeros_like(right)

        def normal_operator(weight: Tensor) -> Tensor:
            result = torch.zeros_like(weight)
            for rows, _ in self._blocks():
                rows = rows - mean
                result.baddbmm_(rows.transpose(1, 2), rows @ weight)
            return result

        def solve(ridge: float) -> Tensor:
            nonlocal solution  # the initial solution for the next ridge
            penalty = ridge * torch.where(scale > 0, scale, 1.0)[:, None, None]
            solution = _conjugate_gradients(
                lambda weight: normal_operator(weight) + penalty * weight,
                right,
                diagonal[..., None] + penalty,
                solution,
            )
            return solution

        return solve

    def _squared_error(self, coefficients: Coefficients) -> float:
        weight, intercept = coefficients.weight, coefficients.intercept[:, None]
        return sum(float((rows @ weight + intercept - targets).square().sum()) for rows, targets in self._blocks())


def _conjugate_gradients(
    operator: Callable[[Tensor], Tensor], right: Tensor, diagonal: Tensor, guess: Tensor
) -> Tensor:
    """Solve ``operator(x) = right`` by conjugate gradients with a Jacobi preconditioner, each output separately.

    Args:
        operator: Symmetric and positive semidefinite.
        right: ``[groups, columns, outputs]``.
        diagonal: The operator's diagonal, ``[groups, columns, 1]``.
        guess: The initial solution, shaped as ``right``.
    """
    inverse = torch.where(diagonal > 0, 1 / diagonal.clamp_min(1e-300), 0.0)
    limit = _TOLERANCE**2 * (right * inverse * right).sum(1, keepdim=True)
    solution = guess.clone()
    residual = right - operator(solution)
    direction = inverse * residual
    norm = (residual * direction).sum(1, keepdim=True)
    for _ in range(_MAX_STEPS):
        active = norm > limit
        if not bool(active.any()):
            break
        image = operator(direction)
        curvature = (direction * image).sum(1, keepdim=True)
        length = torch.where(active & (curvature > 0), norm / curvature, 0.0)
        solution += length * direction
        residual -= length * image
        preconditioned = inverse * residual
        previous, norm = norm, (residual * preconditioned).sum(1, keepdim=True)
        direction = preconditioned + torch.where(previous > 0, norm / previous, 0.0) * direction
    return solution
