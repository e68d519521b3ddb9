"""Which parts of a run become one convolution each: dynamic programming over all sub-runs, branches included."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

from torch import nn
from torch.nn.modules.conv import _ConvNd

from nmconv.algebra import Geometry, Refusal, check_hooks, composed, geometry_of, identity, joined
from nmconv.finding import Element, Join, Step, steps_of

__all__ = ["Node", "Partition", "Price", "Segment", "geometry_of_nodes", "nodes_of", "partition"]


@dataclass(eq=False)
class Node:
    """An element of a run with its numbers.

    Attributes:
        element: What it is.
        geometry: As one convolution, or why it is none.
        sizes: Spatial extents of what comes in.
        result: And of what goes out.
        own: Multiply-adds if it stays as it is; for a join without its branches.
        branches: Of a join.
    """

    element: Element
    geometry: Geometry | Refusal
    sizes: tuple[int, ...]
    result: tuple[int, ...]
    own: int
    branches: tuple[tuple[Node, ...], ...] = ()

    @property
    def convs(self) -> tuple[str, ...]:
        """Names of its convolutions, in order."""
        return tuple(step.name for step in steps_of([self.element]) if step.kind == "conv")

    @property
    def cost(self) -> int:
        """Multiply-adds of all in it."""
        return self.own + sum(node.cost for branch in self.branches for node in branch)


@dataclass(frozen=True)
class Segment:
    """Consecutive nodes that become one convolution."""

    nodes: tuple[Node, ...]
    geometry: Geometry

    @property
    def convs(self) -> tuple[str, ...]:
        """Names of its convolutions, in order."""
        return tuple(name for node in self.nodes for name in node.convs)

    @property
    def cost(self) -> int:
        """Multiply-adds as it is."""
        return sum(node.cost for node in self.nodes)

    @property
    def merged_cost(self) -> int:
        """Multiply-adds of the one convolution, and of the map that is added where there is a border."""
        positions = math.prod(self.nodes[-1].result)
        return (self.geometry.weights + (self.geometry.out_channels if self.geometry.bounded else 0)) * positions

    @property
    def composing(self) -> int:
        """Multiply-adds of making the one kernel from its factors, whatever the input's size; norms aside."""
        return _composing(self.nodes)

    @property
    def is_fold(self) -> bool:
        """Whether it is a single convolution that only takes in norms and padding."""
        return len(self.convs) == 1 and not any(
            isinstance(node.element, Join) or node.element.pools for node in self.nodes
        )


Price = Callable[[Segment], "float | None"]  # as one convolution, or None if it does not pay


@dataclass
class Partition:
    """A choice of segments: the least ``cost`` (whatever the gate counts), and how many operations are left."""

    cost: float = 0
    left: int = 0
    segments: tuple[Segment, ...] = ()

    def cheapest(self) -> tuple[float, int]:
        """What to compare by where the cost counts."""
        return self.cost, self.left

    def fewest(self) -> tuple[int, float]:
        """What to compare by where the number of operations counts."""
        return self.left, self.cost

    def then(self, other: Partition) -> Partition:
        """Both, one after the other."""
        return Partition(self.cost + other.cost, self.left + other.left, (*self.segments, *other.segments))


def nodes_of(
    named: Callable[[str], nn.Module],
    elements: Iterable[Element],
    channels: int | None,
    sizes: tuple[int, ...],
    padding: Callable[[str, Geometry], Geometry],
    refused: Mapping[str, str],
) -> tuple[Node, ...]:
    """Elements with their numbers.

    Args:
        named: From a name to the model's module.
        elements: Of a run.
        channels: That come in, where known.
        sizes: That come in.
        padding: From a convolution's name and geometry to the geometry it had before its padding was hoisted.
        refused: From owners of sums to why their forward cannot be rewritten.
    """
    elements = tuple(elements)
    if channels is None:
        channels = _channels_in(named, elements)
    found = []
    for element in elements:
        if isinstance(element, Step):
            node = _step(named, element, channels or 0, sizes, padding)
        else:
            node = _join(named, element, channels or 0, sizes, padding, refused)
        found.append(node)
        sizes = node.result
        if isinstance(node.geometry, Geometry):
            channels = node.geometry.out_channels
        else:
            convs = [step.name for step in steps_of([element]) if step.kind == "conv"]
            if convs:  # the last one's, in a sum the last one's of either branch
                channels = getattr(named(convs[-1].partition(":")[0]), "out_channels", channels)
    return tuple(found)


def _step(
    named: Callable[[str], nn.Module],
    step: Step,
    channels: int,
    sizes: tuple[int, ...],
    padding: Callable[[str, Geometry], Geometry],
) -> Node:
    rank = len(sizes)
    if step.quiet:
        try:
            check_hooks(named(step.name), step.name)
        except Refusal as refusal:
            return Node(step, refusal, sizes, sizes, 0)
        return Node(step, identity(channels, rank), sizes, sizes, 0)
    try:
        if ":" in step.name:
            raise Refusal(step.why)
        module = named(step.name)
        geometry: Geometry | Refusal = geometry_of(module, step.kind, channels, rank)
    except Refusal as refusal:
        return Node(step, Refusal(f"{step.name}: {refusal}"), sizes, sizes, 0)
    assert isinstance(geometry, Geometry)
    before = padding(step.name, geometry)
    result = _after(before, sizes)
    own = geometry.weights * math.prod(result) if step.kind == "conv" else 0
    if step.kind == "norm":
        own = channels * math.prod(result)
    try:
        if step.why:
            raise Refusal(step.why)
        if geometry.rank != rank or geometry.in_channels != channels:
            raise Refusal(f"it takes {geometry.in_channels} channels where {channels} come")
        check_hooks(module, step.name)
    except Refusal as refusal:
        geometry = Refusal(f"{step.name}: {refusal}")
    return Node(step, geometry, sizes, result, own)


def _join(
    named: Callable[[str], nn.Module],
    join: Join,
    channels: int,
    sizes: tuple[int, ...],
    padding: Callable[[str, Geometry], Geometry],
    refused: Mapping[str, str],
) -> Node:
    branches = tuple(nodes_of(named, branch, channels, sizes, padding, refused) for branch in join.branches)
    results = {branch[-1].result if branch else sizes for branch in branches}
    result = next(iter(results))
    width = channels
    try:
        why = join.why or refused.get(join.owner)
        if why:
            raise Refusal(f"{join.owner or 'the model'}: {why}")
        parts = [geometry_of_nodes(branch, channels, len(sizes)) for branch in branches]
        geometry: Geometry | Refusal = joined(parts)
        width = parts[0].out_channels
    except Refusal as refusal:
        geometry = refusal
    return Node(join, geometry, sizes, result, width * math.prod(result), branches)


def geometry_of_nodes(nodes: Sequence[Node], channels: int, rank: int) -> Geometry:
    """All of them as one convolution.

    Raises:
        Refusal: If they are none.
    """
    parts = []
    for node in nodes:
        if isinstance(node.geometry, Refusal):
            raise node.geometry
        parts.append(node.geometry)
    return reduce(composed, parts) if parts else identity(channels, rank)


def _composing(nodes: Sequence[Node]) -> int:
    """Each weight of a kernel meets the weights of the next one that read its channel."""
    cost, held = 0, None
    for node in nodes:
        assert isinstance(node.geometry, Geometry)
        cost += sum(_composing(branch) for branch in node.branches)
        if held is not None and node.convs:
            cost += held.weights * node.geometry.weights // node.geometry.in_channels
        held = node.geometry if held is None else composed(held, node.geometry)
    return cost


def _of_segment(nodes: Sequence[Node]) -> Geometry:
    """All of them as one convolution; an average behind what is pointwise is taken before it, on fewer elements.

    Raises:
        Refusal: If they are none.
    """
    made = geometry_of_nodes(nodes, 0, 0)
    before = nodes[-1].element.pools and geometry_of_nodes(nodes[:-1], 0, 0).pointwise
    return replace(made, pooled=True) if before else made


def partition(
    nodes: Sequence[Node],
    price: Price,
    *,
    fold: bool,
    fewest: bool = False,
) -> Partition:
    """The best choice of segments.

    Args:
        nodes: Of a run, or of a branch of one.
        price: What a segment costs as one convolution in the unit of :attr:`Node.cost`, or None if it does not pay.
        fold: Whether single convolutions take in their norms.
        fewest: Whether few operations count more than a low cost.
    """
    best: list[Partition] = [Partition()]
    for end in range(1, len(nodes) + 1):
        options = [best[end - 1].then(_alone(nodes[end - 1], price, fold, fewest))]
        for start in range(end - 1, -1, -1):
            part = tuple(nodes[start:end])
            if part[0].element.quiet or part[-1].element.quiet or not any(node.convs for node in part):
                continue
            try:
                segment = Segment(part, _of_segment(part))
            except Refusal:
                break  # nothing that comes before mends it
            if segment.is_fold and (not fold or len(segment.nodes) == 1 or segment.geometry.bounded):
                continue
            cost = segment.merged_cost if segment.is_fold else price(segment)
            if cost is not None:
                options.append(best[start].then(Partition(cost, 1, (segment,))))
        best.append(min(options, key=Partition.fewest if fewest else Partition.cheapest))
    return best[-1]


def _alone(node: Node, price: Price, fold: bool, fewest: bool) -> Partition:
    """One node that no segment takes in."""
    kept = Partition(node.own, int(node.own > 0))
    for branch in node.branches:
        kept = kept.then(partition(branch, price, fold=fold, fewest=fewest))
    return kept


def _channels_in(named: Callable[[str], nn.Module], elements: Iterable[Element]) -> int | None:
    """What the first convolution or norm takes."""
    for element in elements:
        if isinstance(element, Join):
            for branch in element.branches:
                found = _channels_in(named, branch)
                if found is not None:
                    return found
        elif ":" not in element.name and element.kind in ("conv", "norm"):
            module = named(element.name)
            if isinstance(module, _ConvNd):
                return module.in_channels
            mean = getattr(module, "running_mean", None)
            return getattr(module, "num_features", None) if mean is None else len(mean)
    return None


def _after(geometry: Geometry, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Spatial extents of the output; at least 1."""
    pads = geometry.pads(sizes)
    return tuple(
        max((size + left + right - extent) // step + 1, 1)
        for size, (left, right), extent, step in zip(sizes, pads, geometry.extent, geometry.stride, strict=True)
    )
