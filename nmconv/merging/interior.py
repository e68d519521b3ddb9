"""A run as one convolution away from the border: what it would be if all its padding were hoisted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce

from torch import Tensor, nn

from nmconv.algebra import (
    Affine,
    Geometry,
    Refusal,
    affine_in_double,
    compose,
    composed,
    identity,
    join,
    joined,
    of_identity,
)
from nmconv.finding import Join
from nmconv.merging.partitioning import Node

__all__ = ["interior_affine", "interior_geometry"]


def interior_geometry(nodes: Sequence[Node], channels: int, rank: int) -> Geometry:
    """The geometry of :func:`interior_affine`, without any numbers.

    Raises:
        Refusal: If there is none, and why.
    """
    made = identity(channels, rank)
    for node in nodes:
        width = made.out_channels
        if isinstance(node.element, Join):
            if node.element.why:
                raise Refusal(f"{node.element.owner or 'the model'}: {node.element.why}")
            part = joined([interior_geometry(branch, width, rank) for branch in node.branches])
        elif isinstance(node.geometry, Refusal):
            raise node.geometry
        else:
            part = node.geometry
        made = composed(made, part, exact=False)
    return made


def interior_affine(
    nodes: Sequence[Node], module: Callable[[str], nn.Module], channels: int, rank: int, like: Tensor
) -> Affine:
    """The nodes as one convolution in float64, equal to them where no border is near; padding and outputs' size fit.

    Args:
        nodes: Of a run or of a branch of one.
        module: From a name to the module.
        channels: That come in.
        rank: Spatial axes.
        like: Gives the device.

    Raises:
        Refusal: If there is none, and why.
    """
    parts = [part for node in nodes if (part := _of_node(node, module, channels, rank, like)) is not None]
    return reduce(partial(compose, exact=False), parts) if parts else of_identity(like, channels, rank)


def _of_node(node: Node, module: Callable[[str], nn.Module], channels: int, rank: int, like: Tensor) -> Affine | None:
    element = node.element
    if isinstance(element, Join):
        if element.why:
            raise Refusal(f"{element.owner or 'the model'}: {element.why}")
        width = next((inner.geometry.in_channels for branch in node.branches for inner in branch
                      if isinstance(inner.geometry, Geometry)), channels)  # fmt: skip
        return join([interior_affine(branch, module, width, rank, like) for branch in node.branches])
    if isinstance(node.geometry, Refusal):
        raise node.geometry
    if element.quiet:
        return None
    if element.kind == "pad":
        width = node.geometry.in_channels
        return Affine(node.geometry, of_identity(like, width, rank).weight, diagonal=True)
    return affine_in_double(module(element.name), element.kind, node.geometry)
