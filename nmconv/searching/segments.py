"""Segments: what could become linear, with its cost."""

from __future__ import annotations

from dataclasses import dataclass

from nmconv.algebra import Geometry, shrunk
from nmconv.finding import Residual
from nmconv.fitting import FitTask, kernel_sizes
from nmconv.planning import Kernel
from nmconv.searching.blocks import Block

__all__ = ["CandidateSegment"]


@dataclass(frozen=True, eq=False)
class CandidateSegment:
    """Consecutive blocks that could become linear, or a residual branch that could be removed.

    Attributes:
        convs: Qualified names of its convolutions, in order of execution.
        sites: Ids of the activations that are dropped.
        blocks: Its blocks; () for a residual branch.
        residual: The residual branch, or None.
        task: Locates its input and output; None for a residual branch.
        geometry: Its geometry as one convolution, away from the border; or why it cannot be one.
        first, last: Positions of its convolutions in the order of execution.
        multiply_adds: Multiply-adds for one image.
        parameters: Parameters of its convolutions, norms folded.
        activations: Number of the dropped activations that belong to a convolution.
        activation_elements: Number of elements of the dropped activations, for one image.
        positions: Number of positions of its output, for one image.
    """

    convs: tuple[str, ...]
    sites: tuple[str, ...]
    blocks: tuple[Block, ...]
    residual: Residual | None
    task: FitTask | None
    geometry: Geometry | str
    first: int
    last: int
    multiply_adds: int
    parameters: int
    activations: int
    activation_elements: int
    positions: int

    @property
    def is_sum(self) -> bool:
        """Whether it is a single block; since that has several convolutions, it is a sum of branches."""
        return len(self.blocks) == 1

    def sizes(self) -> list[tuple[int, ...]]:
        """Return the kernel sizes that it could have, smallest first."""
        return [] if isinstance(self.geometry, str) else kernel_sizes(Kernel(self.convs, "auto"), self.geometry)

    def replacement(self, size: tuple[int, ...]) -> Geometry:
        """Return the geometry of the one convolution that replaces it."""
        assert isinstance(self.geometry, Geometry)
        return shrunk(self.geometry, size)

    def replacement_multiply_adds(self, size: tuple[int, ...]) -> int:
        """Return the multiply-adds of the one convolution that replaces it, for one image."""
        return self.replacement(size).weights * self.positions

    def replacement_parameters(self, size: tuple[int, ...]) -> int:
        """Return the parameters of the one convolution that replaces it."""
        geometry = self.replacement(size)
        return geometry.weights + geometry.out_channels
