"""The elements of a linear run with their geometries, sizes and multiply-adds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

from torch import nn
from torch.nn.modules.conv import _ConvNd

from nmconv.algebra import (
    Geometry,
    Refusal,
    add_geometries,
    check_hooks,
    compose_geometries,
    geometry_of,
    identity_geometry,
)
from nmconv.finding import Element, ParallelSum, Step, conv_names

__all__ = ["RunNode", "geometry_of_nodes", "nodes_of", "refuse_all"]


@dataclass(eq=False)
class RunNode:
    """An element of a run with its numbers.

    Attributes:
        element: The module or the sum of branches.
        geometry: Its geometry as one convolution, or the reason why it cannot be one.
        input_sizes: Spatial extents of its input.
        output_sizes: Spatial extents of its output.
        own_cost: Multiply-adds if it stays as it is; for a sum, those of the addition only.
        branches: The branches of a sum.
    """

    element: Element
    geometry: Geometry | Refusal
    input_sizes: tuple[int, ...]
    output_sizes: tuple[int, ...]
    own_cost: int
    branches: tuple[tuple[RunNode, ...], ...] = ()

    @property
    def convs(self) -> tuple[str, ...]:
        """Qualified names of its convolutions, in order of execution."""
        return conv_names([self.element])

    @property
    def cost(self) -> int:
        """Multiply-adds of everything in it."""
        return self.own_cost + sum(node.cost for branch in self.branches for node in branch)


def refuse_all(nodes: Sequence[RunNode], reason: Refusal) -> None:
    """Give all nodes, including those of branches, the reason in place of their geometry."""
    for node in nodes:
        node.geometry = reason
        for branch in node.branches:
            refuse_all(branch, reason)


def geometry_of_nodes(nodes: Sequence[RunNode], channels: int, rank: int) -> Geometry:
    """Return the geometry of consecutive nodes as one convolution.

    Args:
        nodes: The nodes; if there are none, the geometry is that of an identity.
        channels: Number of input channels of an identity.
        rank: Number of spatial axes of an identity.

    Raises:
        Refusal: If they cannot be one convolution.
    """
    parts = []
    for node in nodes:
        if isinstance(node.geometry, Refusal):
            raise node.geometry
        parts.append(node.geometry)
    return reduce(compose_geometries, parts) if parts else identity_geometry(channels, rank)


def nodes_of(
    get_module: Callable[[str], nn.Module],
    elements: Iterable[Element],
    channels: int | None,
    sizes: tuple[int, ...],
    unhoisted: Callable[[str, Geometry], Geometry] = lambda name, geometry: geometry,
    refused: Mapping[str, str] = {},
) -> tuple[RunNode, ...]:
    """Return the nodes of consecutive elements.

    Args:
        get_module: Returns the model's module of a qualified name.
        elements: The elements of a run or of a branch.
        channels: Number of input channels, or None to read it off the first convolution or norm.
        sizes: Spatial extents of the input.
        unhoisted: Returns a convolution's geometry before its padding was hoisted, from its name and geometry; by
            default no padding was.
        refused: By owner of a sum, the reason why its forward cannot be rewritten.
    """
    elements = tuple(elements)
    if channels is None:
        channels = _input_channels(get_module, elements)
    nodes = []
    for element in elements:
        if isinstance(element, Step):
            node = _node_of_step(get_module, element, channels or 0, sizes, unhoisted)
        else:
            node = _node_of_sum(get_module, element, channels or 0, sizes, unhoisted, refused)
        nodes.append(node)
        sizes = node.output_sizes
        if isinstance(node.geometry, Geometry):
            channels = node.geometry.out_channels
        elif node.convs:  # the last convolution's; all branches of a sum have the same number
            channels = getattr(get_module(node.convs[-1].partition(":")[0]), "out_channels", channels)
    return tuple(nodes)


def _node_of_step(
    get_module: Callable[[str], nn.Module],
    step: Step,
    channels: int,
    sizes: tuple[int, ...],
    unhoisted: Callable[[str, Geometry], Geometry],
) -> RunNode:
    rank = len(sizes)
    if step.is_identity:
        try:
            check_hooks(get_module(step.name), step.name)
        except Refusal as refusal:
            return RunNode(step, refusal, sizes, sizes, 0)
        return RunNode(step, identity_geometry(channels, rank), sizes, sizes, 0)
    try:
        if ":" in step.name:
            raise Refusal(step.why)
        module = get_module(step.name)
        geometry: Geometry | Refusal = geometry_of(module, step.kind, channels, rank)
    except Refusal as refusal:
        return RunNode(step, Refusal(f"{step.name}: {refusal}"), sizes, sizes, 0)
    assert isinstance(geometry, Geometry)
    before = unhoisted(step.name, geometry)
    result = _output_sizes(before, sizes)
    cost = geometry.weights * math.prod(result) if step.kind == "conv" else 0
    if step.kind == "norm":
        cost = channels * math.prod(result)
    try:
        if step.why:
            raise Refusal(step.why)
        if geometry.rank != rank or geometry.in_channels != channels:
            raise Refusal(f"it takes {geometry.in_channels} channels where {channels} come")
        check_hooks(module, step.name)
    except Refusal as refusal:
        geometry = Refusal(f"{step.name}: {refusal}")
    return RunNode(step, geometry, sizes, result, cost)


def _node_of_sum(
    get_module: Callable[[str], nn.Module],
    parallel: ParallelSum,
    channels: int,
    sizes: tuple[int, ...],
    unhoisted: Callable[[str, Geometry], Geometry],
    refused: Mapping[str, str],
) -> RunNode:
    branches = tuple(nodes_of(get_module, branch, channels, sizes, unhoisted, refused) for branch in parallel.branches)
    results = {branch[-1].output_sizes if branch else sizes for branch in branches}
    result = next(iter(results))
    width = channels
    try:
        why = parallel.why or refused.get(parallel.owner)
        if why:
            raise Refusal(f"{parallel.owner or 'the model'}: {why}")
        parts = [geometry_of_nodes(branch, channels, len(sizes)) for branch in branches]
        geometry: Geometry | Refusal = add_geometries(parts)
        width = parts[0].out_channels
    except Refusal as refusal:
        geometry = refusal
    return RunNode(parallel, geometry, sizes, result, width * math.prod(result), branches)


def _input_channels(get_module: Callable[[str], nn.Module], elements: Iterable[Element]) -> int | None:
    """Return the number of input channels of the first convolution or norm."""
    for element in elements:
        if isinstance(element, ParallelSum):
            for branch in element.branches:
                channels = _input_channels(get_module, branch)
                if channels is not None:
                    return channels
        elif ":" not in element.name and element.kind in ("conv", "norm"):
            module = get_module(element.name)
            if isinstance(module, _ConvNd):
                return module.in_channels
            mean = getattr(module, "running_mean", None)
            return getattr(module, "num_features", None) if mean is None else len(mean)
    return None


def _output_sizes(geometry: Geometry, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the spatial extents of the output, each at least 1."""
    pads = geometry.pads(sizes)
    return tuple(
        max((size + left + right - extent) // step + 1, 1)
        for size, (left, right), extent, step in zip(sizes, pads, geometry.extent, geometry.stride, strict=True)
    )
