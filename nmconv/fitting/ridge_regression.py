"""Ridge regression: the problem that every solver answers, and the ridge chosen on held-out images."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["RIDGES", "Coefficients", "Regression", "RidgeSolution", "select_ridge"]

RIDGES = tuple(10.0**power for power in range(-7, 2))
_PATIENCE = 2  # stop after this many ridges in a row without improvement


@dataclass(frozen=True, eq=False)
class Coefficients:
    """Per group, ``target = row @ weight + intercept``.

    Attributes:
        weight: ``[groups, columns, outputs]``, in float64.
        intercept: ``[groups, outputs]``.
    """

    weight: Tensor
    intercept: Tensor


class Regression(ABC):
    """Rows and targets of a least-squares problem, in any representation. Everything is float64.

    Attributes:
        rows: Number of rows.
        mean: Mean row, ``[groups, columns]``.
        target_mean: Mean target, ``[groups, outputs]``.
        target_square: Sum of the squared deviations from the mean target, ``[groups, outputs]``.
    """

    rows: int
    mean: Tensor
    target_mean: Tensor
    target_square: Tensor

    @property
    def columns(self) -> int:
        """Number of unknowns per output."""
        return self.mean.shape[-1]

    def solutions(
        self, initial: Coefficients, ridges: Iterable[float], *, fit_intercept: bool = True
    ) -> Iterator[Coefficients]:
        """Yield, for each ridge, the coefficients with the least penalized squared error.

        The penalty is relative: ``ridge`` times the columns' mean square holds the weights to ``initial``, ``ridge``
        times the number of rows holds the mean output. An infinite ridge returns ``initial``; 0 is plain least squares
        (of several equally good solutions, the one nearest to ``initial``).

        Args:
            initial: The coefficients that the ridge pulls towards.
            ridges: From 0 to infinity.
            fit_intercept: Whether to fit the intercept too; otherwise it keeps its initial value.
        """
        weight_change: Callable[[float], Tensor] | None = None
        for ridge in ridges:
            if ridge == math.inf:
                yield initial
                continue
            weight_change = weight_change or self._solver(initial, fit_intercept)
            weight = initial.weight + weight_change(ridge)
            if not fit_intercept:
                yield Coefficients(weight, initial.intercept)
                continue
            initial_mean = (self.mean[:, None] @ initial.weight).squeeze(1) + initial.intercept
            output_mean = (self.target_mean + ridge * initial_mean) / (1 + ridge)
            yield Coefficients(weight, output_mean - (self.mean[:, None] @ weight).squeeze(1))

    def error(self, coefficients: Coefficients) -> float:
        """Return the squared error over all rows, relative to the targets' variance."""
        error, scale = max(self._squared_error(coefficients), 0.0), float(self.target_square.sum())
        return error / scale if scale > 0 else float(error > 0)

    def degenerate_columns(self) -> tuple[int, int]:
        """Return the number of constant columns, and of further columns that depend linearly on others.

        Dependent columns are not counted (0) where that would take long: above 1024 columns.
        """
        squares = self._column_squares()
        constant = int((squares <= squares.amax(-1, keepdim=True) * 1e-24).sum())
        return constant, 0

    @abstractmethod
    def output_statistics(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of ``row @ weight``, each ``[groups, outputs]``."""

    @abstractmethod
    def _column_squares(self) -> Tensor:
        """Return the sum of the squared deviations from the mean row, ``[groups, columns]``."""

    @abstractmethod
    def _solver(self, initial: Coefficients, fit_intercept: bool) -> Callable[[float], Tensor]:
        """Return a function from a ridge to the change of the weight; ridges may come in any order."""

    @abstractmethod
    def _squared_error(self, coefficients: Coefficients) -> float:
        """Return the sum of squared errors."""


@dataclass(frozen=True, eq=False)
class RidgeSolution:
    """The chosen coefficients of one kernel size, with errors as in :class:`nmconv.UnitFit`."""

    size: tuple[int, ...]
    coefficients: Coefficients
    ridge: float
    before: float
    after: float
    held_before: float
    held_after: float

    @property
    def selection_error(self) -> float:
        """The error that solutions are compared by: on held-out images if there are any."""
        return self.after if math.isnan(self.held_after) else self.held_after


def select_ridge(
    fitted: Regression,
    held: Regression,
    initial: Coefficients,
    size: tuple[int, ...],
    ridges: Sequence[float],
    *,
    fit_intercept: bool,
) -> RidgeSolution:
    """Return the solution with the least error on held-out images, ``initial`` included.

    Ridges are tried from the largest down, until two in a row bring no improvement. Without held-out images the first
    ridge is used.

    Args:
        fitted: The regression on the images that are fitted.
        held: The regression on those held out.
        initial: The composed kernel.
        size: The kernel's size, for the record.
        ridges: The ridges to choose from.
        fit_intercept: Whether to fit the intercept too.
    """
    before = fitted.error(initial)
    if not held.rows:
        coefficients = next(fitted.solutions(initial, ridges[:1], fit_intercept=fit_intercept))
        after = fitted.error(coefficients)
        return RidgeSolution(size, coefficients, ridges[0], before, after, math.nan, math.nan)
    best_ridge, best = math.inf, initial
    least = held_before = held.error(initial)
    without_improvement = 0
    descending = sorted(ridges, reverse=True)
    solutions = fitted.solutions(initial, descending, fit_intercept=fit_intercept)
    for ridge, coefficients in zip(descending, solutions, strict=False):
        error = held.error(coefficients)
        if error < least:
            best_ridge, best, least, without_improvement = ridge, coefficients, error, 0
        else:
            without_improvement += 1
            if without_improvement == _PATIENCE:
                break
    after = before if best is initial else fitted.error(best)
    return RidgeSolution(size, best, best_ridge, before, after, held_before, least)
