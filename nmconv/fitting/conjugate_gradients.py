"""Least squares by conjugate gradients, where the moments would be too large: every step reads all rows again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from nmconv.algebra import Geometry, patches
from nmconv.fitting.normal_equations import Line, Rows

__all__ = ["ConjugateGradients"]

_CLOSE = 1e-10  # of the residual at the start, where the steps end
_STEPS = 500  # at most; what is not solved by then is the firmer ridge's answer, nearly, and judged as such


class ConjugateGradients(Rows):
    """Inputs and targets as they are; rows are made of them block by block, and forgotten.

    Args:
        batches: What the convolution is given and what it should give.
        geometry: Of the convolution.
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

    def spread(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of ``row @ weight``, each ``[groups, outputs]``."""
        mean = self.mean[:, None] @ weight
        square = sum((rows @ weight - mean).square().sum(1) for rows, _ in self._blocks())
        assert isinstance(square, Tensor)
        return mean.squeeze(1), square / self.rows

    def _column_squares(self) -> Tensor:
        return self._diagonal

    def _blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        for input, target in self._batches:
            yield from patches(input, target, self._geometry)

    def _solver(self, start: Line, intercept: bool) -> Callable[[float], Tensor]:
        diagonal, mean, constant = self._diagonal, self.mean[:, None], self.target_mean[:, None]
        if not intercept:
            diagonal = diagonal + self.rows * self.mean.square()
            mean, constant = torch.zeros_like(mean), start.constant[:, None]
        pull = torch.zeros_like(start.weight)
        for rows, targets in self._blocks():
            rows = rows - mean
            pull += rows.transpose(1, 2) @ (targets - constant - rows @ start.weight)
        scale = diagonal.mean(1)
        found = torch.zeros_like(pull)

        def product(weight: Tensor) -> Tensor:
            result = torch.zeros_like(weight)
            for rows, _ in self._blocks():
                rows = rows - mean
                result.baddbmm_(rows.transpose(1, 2), rows @ weight)
            return result

        def solve(ridge: float) -> Tensor:
            nonlocal found
            held = ridge * torch.where(scale > 0, scale, 1.0)[:, None, None]
            found = _conjugate(lambda weight: product(weight) + held * weight, pull, diagonal[..., None] + held, found)
            return found

        return solve

    def _squares(self, line: Line) -> float:
        constant = line.constant[:, None]
        return sum(float((rows @ line.weight + constant - targets).square().sum()) for rows, targets in self._blocks())


def _conjugate(product: Callable[[Tensor], Tensor], right: Tensor, diagonal: Tensor, guess: Tensor) -> Tensor:
    """Solve ``product(x) = right``, ``[groups, columns, outputs]``, each output by itself, scaled by the diagonal."""
    inverse = torch.where(diagonal > 0, 1 / diagonal.clamp_min(1e-300), 0.0)
    limit = _CLOSE**2 * (right * inverse * right).sum(1, keepdim=True)
    found = guess.clone()
    rest = right - product(found)
    step = inverse * rest
    size = (rest * step).sum(1, keepdim=True)
    for _ in range(_STEPS):
        going = size > limit
        if not bool(going.any()):
            break
        image = product(step)
        bend = (step * image).sum(1, keepdim=True)
        length = torch.where(going & (bend > 0), size / bend, 0.0)
        found += length * step
        rest -= length * image
        scaled = inverse * rest
        before, size = size, (rest * scaled).sum(1, keepdim=True)
        step = scaled + torch.where(before > 0, size / before, 0.0) * step
    return found
