"""Inputs and target outputs of one convolution, as regressions for kernels of several sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from nmconv.algebra import Geometry, center_slices, columns_of, patches, shrunk
from nmconv.fitting.conjugate_gradients import ConjugateGradients
from nmconv.fitting.normal_equations import Moments
from nmconv.fitting.ridge_regression import Regression

__all__ = ["UnitSamples", "has_small_moments"]

_MAX_COLUMNS = 6144  # of a convolution without groups; its moments then take 288 MiB


class UnitSamples:
    """Collect batches of inputs and targets: as moments, or as they are if moments would take too much memory.

    Args:
        geometry: The geometry with the largest kernel.

    Attributes:
        rows: Number of output positions so far.
    """

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry
        self._moments = Moments() if has_small_moments(geometry) else None
        self._batches: list[tuple[Tensor, Tensor]] = []
        self.rows = 0

    def add(self, input: Tensor, target: Tensor) -> None:
        """Add ``[batch, in, *sizes]`` and ``[batch, out, *output sizes]``."""
        self.rows += target.numel() // target.shape[1]
        if self._moments is None:
            self._batches.append((input, target))
            return
        for rows, targets in patches(input, target, self._geometry):
            self._moments.add(rows, targets)

    def regression(self, size: Sequence[int]) -> Regression:
        """Return the regression for a kernel of this size: the center of the largest one."""
        geometry = shrunk(self._geometry, size)
        if self._moments is not None:
            if geometry.kernel == self._geometry.kernel or not self._moments.rows:
                return self._moments
            return self._moments.of_columns(
                columns_of(self._geometry, center_slices(self._geometry, size), self._moments.square.device)
            )
        if not has_small_moments(geometry):
            return ConjugateGradients(self._batches, geometry)
        samples = UnitSamples(geometry)
        for input, target in self._batches:
            samples.add(input, target)
        return samples.regression(size)


def has_small_moments(geometry: Geometry) -> bool:
    """Return whether the moments of a convolution's inputs are small enough to keep in memory."""
    columns = geometry.in_channels // geometry.groups * math.prod(geometry.kernel)
    return geometry.groups * columns**2 <= _MAX_COLUMNS**2
