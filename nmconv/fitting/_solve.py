"""The ridge chosen on held-out images, and the answer it gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nmconv.fitting._moments import Line, Moments, ridge_line

__all__ = ["RIDGES", "Answer", "solved"]

RIDGES = tuple(10.0**power for power in range(-7, 2))


@dataclass(frozen=True, eq=False)
class Answer:
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
    fitted: Moments, held: Moments, start: Line, size: tuple[int, ...], ridges: Sequence[float], *, intercept: bool
) -> Answer:
    """The line that does best on held-out images, ``start`` included; without any, that of the first ridge.

    Args:
        fitted: Of the images that are fitted.
        held: Of those held out.
        start: The composed kernel.
        size: Of the kernel, for the record.
        ridges: To choose from.
        intercept: Whether the constant is fitted too.
    """
    best = (math.inf, start)
    if not held.rows:
        best = (ridges[0], ridge_line(fitted, start, ridges[0], intercept=intercept))
    else:
        least = held.error(start)
        for ridge in ridges:
            line = ridge_line(fitted, start, ridge, intercept=intercept)
            error = held.error(line)
            if error < least:
                best, least = (ridge, line), error
    ridge, line = best
    outside = (held.error(start), held.error(line)) if held.rows else (math.nan, math.nan)
    return Answer(size, line, ridge, fitted.error(start), fitted.error(line), *outside)
