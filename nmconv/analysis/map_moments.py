"""Sums over the positions of one activation's maps, batch by batch: means and scatters joined by Chan's formula."""

from __future__ import annotations

import torch
from torch import Tensor

from nmconv.errors import FitError

__all__ = ["MapMoments"]

_CHUNK = 2**22  # numbers that are in float64 at a time


class MapMoments:
    """What is known of one activation so far; in float64, on the device of the first map.

    Two sets of n and m positions with means a and b and scatters A and B have together the mean a + (b - a)·m/(n + m)
    and the scatter A + B + (b - a)(b - a)ᵀ·n·m/(n + m) (Chan, Golub and LeVeque 1979).

    Args:
        name: Of the activation, for messages.
        axis: Where its channels are; a tensor of one axis has one channel.

    Attributes:
        given: Positions of inputs: numbers for each channel.
        positive: ``[channels]``, how many of these are above 0; None while there is nothing.
        positions: Positions of outputs.
        zeros: How many of their numbers are 0.
        mean: ``[channels]``, of the outputs.
        scatter: ``[channels, channels]``: the sum of (y - mean)(y - mean)ᵀ over positions.
        norms: Sum of the norms of gradients, over images.
        images: How many images have had a gradient.
    """

    def __init__(self, name: str, axis: int) -> None:
        self.name = name
        self.axis = axis
        self.given = 0
        self.positive: Tensor | None = None
        self.positions = 0
        self.zeros = 0
        self.mean: Tensor | None = None
        self.scatter: Tensor | None = None
        self.norms = 0.0
        self.images = 0

    def add_input(self, value: Tensor) -> None:
        """Count an input, of any shape."""
        if not value.numel():
            return
        rows = self._rows(value)
        positive = (rows > 0).sum(0)
        self.positive = positive if self.positive is None else self._same(self.positive, positive) + positive
        self.given += len(rows)

    def add_output(self, value: Tensor) -> None:
        """Add an output, of any shape."""
        if not value.numel():
            return
        rows = self._rows(value)
        self.zeros += int((rows == 0).sum())
        for part in rows.split(max(1, _CHUNK // max(1, rows.shape[1]))):
            part = part.double()
            mean = part.mean(0)
            centred = part - mean
            self.join(len(part), mean, centred.T @ centred)

    def join(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        """Add so many positions of this mean and scatter."""
        if self.mean is None or self.scatter is None:
            self.positions, self.mean, self.scatter = count, mean, scatter
            return
        shift = mean - self._same(self.mean, mean)
        total = self.positions + count
        self.mean = self.mean + shift * (count / total)
        self.scatter += scatter
        self.scatter += torch.outer(shift, shift) * (self.positions * count / total)
        self.positions = total

    def add_gradient(self, gradient: Tensor, scale: float) -> None:
        """Add the norm of each image's gradient, times ``scale``; the first axis counts images."""
        if gradient.numel():
            self.norms += scale * float(gradient.double().reshape(len(gradient), -1).norm(dim=1).sum())

    def _rows(self, value: Tensor) -> Tensor:
        """The value as ``[positions, channels]``."""
        if value.dim() < 2:
            return value.reshape(-1, 1)
        moved = value.movedim(self.axis, -1)
        return moved.reshape(-1, moved.shape[-1])

    def _same(self, before: Tensor, now: Tensor) -> Tensor:
        if before.shape != now.shape:
            raise FitError(
                f"{self.name} is called with {len(now)} channels, and was called with {len(before)} before: it has no "
                "statistics of channels; give images of one kind, or a model that does not share the module around it"
            )
        return before
