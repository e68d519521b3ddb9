"""The ridge chosen on held-out images, and the answer it gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nmconv.fitting.normal_equations import Line, Rows

__all__ = ["RIDGES", "RidgeSolution", "solved"]

RIDGES = tuple(10.0**power for power in range(-7, 2))
_PATIENCE = 2  # ridges


@dataclass(frozen=True, eq=False)
class RidgeSolution:
    """A fitted kernel, and how well it does; errors as in :class:`nmconv.UnitFit`."""

    size: tuple[int, ...]
    line: Line
    ridge: float
    before: float
    after: float
    held_before: float
    held_after: float

    @property
    def judged(self) -> float:
        """The error that counts: on held-out images where there are any."""
        return self.after if math.isnan(self.held_after) else self.held_after


def solved(
    fitted: Rows, held: Rows, start: Line, size: tuple[int, ...], ridges: Sequence[float], *, intercept: bool
) -> RidgeSolution:
    """The line that does best on held-out images, ``start`` included; without any, that of the first ridge.

    Ridges are tried from the firmest on, and no further where two in a row have done no better.

    Args:
        fitted: Of the images that are fitted.
        held: Of those held out.
        start: The composed kernel.
        size: Of the kernel, for the record.
        ridges: To choose from.
        intercept: Whether the constant is fitted too.
    """
    before = fitted.error(start)
    if not held.rows:
        line = next(fitted.lines(start, ridges[:1], intercept=intercept))
        return RidgeSolution(size, line, ridges[0], before, fitted.error(line), math.nan, math.nan)
    ridge, line = math.inf, start
    least = held_before = held.error(start)
    worse = 0
    firmest_first = sorted(ridges, reverse=True)
    for tried, made in zip(firmest_first, fitted.lines(start, firmest_first, intercept=intercept), strict=False):
        error = held.error(made)
        if error < least:
            ridge, line, least, worse = tried, made, error, 0
        else:
            worse += 1
            if worse == _PATIENCE:
                break
    after = before if line is start else fitted.error(line)
    return RidgeSolution(size, line, ridge, before, after, held_before, least)
