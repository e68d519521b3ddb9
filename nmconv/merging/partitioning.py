"""Choosing which parts of a run become one convolution each: interval dynamic programming, branches included."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from nmconv.algebra import Geometry, Refusal, compose_geometries
from nmconv.finding import ParallelSum
from nmconv.merging.nodes import RunNode, geometry_of_nodes

__all__ = ["Partition", "Price", "Segment", "partition"]


@dataclass(frozen=True)
class Segment:
    """Consecutive nodes that become one convolution.

    Attributes:
        nodes: The nodes.
        geometry: The geometry of the one convolution.
    """

    nodes: tuple[RunNode, ...]
    geometry: Geometry

    @property
    def convs(self) -> tuple[str, ...]:
        """Qualified names of its convolutions, in order of execution."""
        return tuple(name for node in self.nodes for name in node.convs)

    @property
    def cost(self) -> int:
        """Multiply-adds of the nodes."""
        return sum(node.cost for node in self.nodes)

    @property
    def merged_cost(self) -> int:
        """Multiply-adds of the one convolution, and of adding its border term if there is one."""
        positions = math.prod(self.nodes[-1].output_sizes)
        return (self.geometry.weights + (self.geometry.out_channels if self.geometry.bounded else 0)) * positions

    @property
    def composition_cost(self) -> int:
        """Multiply-adds of composing the kernel from its factors, without norms; independent of the input size."""
        return _composition_cost(self.nodes)

    @property
    def is_fold(self) -> bool:
        """Whether it is a single convolution that only absorbs norms and padding."""
        return len(self.convs) == 1 and not any(
            isinstance(node.element, ParallelSum) or node.element.is_pool for node in self.nodes
        )


def _composition_cost(nodes: Sequence[RunNode]) -> int:
    """Return, summed over the weights of each kernel, how many weights of the next kernel read their channel."""
    cost, kernel = 0, None
    for node in nodes:
        assert isinstance(node.geometry, Geometry)
        cost += sum(_composition_cost(branch) for branch in node.branches)
        if kernel is not None and node.convs:
            cost += kernel.weights * node.geometry.weights // node.geometry.in_channels
        kernel = node.geometry if kernel is None else compose_geometries(kernel, node.geometry)
    return cost


Price: TypeAlias = Callable[[Segment], "float | None"]  # cost as one convolution, or None if it does not pay


@dataclass
class Partition:
    """A choice of segments.

    Attributes:
        cost: Total cost in the unit of the gate's price.
        operations: Number of operations that remain.
        segments: What becomes one convolution each.
    """

    cost: float = 0
    operations: int = 0
    segments: tuple[Segment, ...] = ()

    def by_cost(self) -> tuple[float, int]:
        """Return the sort key for the lowest cost."""
        return self.cost, self.operations

    def by_operations(self) -> tuple[int, float]:
        """Return the sort key for the fewest operations."""
        return self.operations, self.cost

    def then(self, other: Partition) -> Partition:
        """Return both choices as one."""
        return Partition(self.cost + other.cost, self.operations + other.operations, (*self.segments, *other.segments))


def partition(nodes: Sequence[RunNode], price: Price, *, fold: bool, fewest: bool = False) -> Partition:
    """Return the best choice of segments.

    Args:
        nodes: Nodes of a run or of a branch.
        price: Returns the cost of a segment as one convolution, in the unit of :attr:`RunNode.cost`, or None if it does
            not pay.
        fold: Whether single convolutions absorb the norms next to them.
        fewest: Whether few operations count more than a low cost.
    """
    best: list[Partition] = [Partition()]  # by number of nodes from the start
    for end in range(1, len(nodes) + 1):
        options = [best[end - 1].then(_unmerged(nodes[end - 1], price, fold, fewest))]
        for start in range(end - 1, -1, -1):
            part = tuple(nodes[start:end])
            if part[0].element.is_identity or part[-1].element.is_identity or not any(node.convs for node in part):
                continue
            try:
                segment = Segment(part, _segment_geometry(part))
            except Refusal:
                break  # a longer part cannot be one convolution either
            if segment.is_fold and (not fold or len(segment.nodes) == 1 or segment.geometry.bounded):
                continue
            cost = segment.merged_cost if segment.is_fold else price(segment)
            if cost is not None:
                options.append(best[start].then(Partition(cost, 1, (segment,))))
        best.append(min(options, key=Partition.by_operations if fewest else Partition.by_cost))
    return best[-1]


def _unmerged(node: RunNode, price: Price, fold: bool, fewest: bool) -> Partition:
    """Return the best choice for a node that is in no segment: that of its branches."""
    choice = Partition(node.own_cost, int(node.own_cost > 0))
    for branch in node.branches:
        choice = choice.then(partition(branch, price, fold=fold, fewest=fewest))
    return choice


def _segment_geometry(nodes: Sequence[RunNode]) -> Geometry:
    """Return the geometry of nodes as one convolution; an average pool after a pointwise one is computed before it.

    Raises:
        Refusal: If there is none.
    """
    geometry = geometry_of_nodes(nodes, 0, 0)
    pools_first = nodes[-1].element.is_pool and geometry_of_nodes(nodes[:-1], 0, 0).pointwise
    return replace(geometry, pooled=True) if pools_first else geometry
