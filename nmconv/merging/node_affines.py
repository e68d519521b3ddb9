"""Nodes of a run as one convolution with its weights, exactly or away from the border only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import TypeAlias

from torch import Tensor, nn

from nmconv.algebra import (
    Affine,
    Geometry,
    Refusal,
    add_affines,
    add_geometries,
    affine_in_double,
    affine_of_average,
    affine_of_identity,
    compose,
    compose_geometries,
    identity_geometry,
)
from nmconv.finding import ParallelSum
from nmconv.merging.nodes import RunNode

__all__ = ["ToAffine", "affine_of_nodes", "interior_affine", "interior_geometry"]

ToAffine: TypeAlias = Callable[[nn.Module, str, Geometry], Affine]  # from a module, its kind and its geometry


def affine_of_nodes(
    nodes: Sequence[RunNode],
    get_module: Callable[[str], nn.Module],
    to_affine: ToAffine,
    like: Tensor,
    channels: int,
    rank: int,
    *,
    exact: bool = True,
) -> Affine:
    """Return consecutive nodes as one convolution.

    Args:
        nodes: Nodes of a run or of a branch.
        get_module: Returns the module of a qualified name.
        to_affine: Reads one module as an affine map.
        like: A tensor with the dtype and device of identities and pools.
        channels: Number of input channels.
        rank: Number of spatial axes.
        exact: If False, the convolution is equal only away from the border; padding and output sizes are right.

    Raises:
        Refusal: If there is no such convolution, with the reason.
    """
    parts: list[Affine] = []
    for node in nodes:
        element = node.element
        width = parts[-1].geometry.out_channels if parts else channels
        if isinstance(element, ParallelSum):
            _check_rewritable(element)
            branches = [
                affine_of_nodes(branch, get_module, to_affine, like, width, rank, exact=exact)
                for branch in node.branches
            ]
            parts.append(add_affines(branches))
        elif isinstance(node.geometry, Refusal):
            raise node.geometry
        elif element.kind == "pad":
            parts.append(Affine(node.geometry, affine_of_identity(like, width, rank).weight, diagonal=True))
        elif element.kind == "pool":
            parts.append(affine_of_average(like, node.geometry))
        elif not element.is_identity:
            parts.append(to_affine(get_module(element.name), element.kind, node.geometry))
    return reduce(partial(compose, exact=exact), parts) if parts else affine_of_identity(like, channels, rank)


def interior_affine(
    nodes: Sequence[RunNode], get_module: Callable[[str], nn.Module], channels: int, rank: int, like: Tensor
) -> Affine:
    """Return the nodes as one convolution in float64 that equals them away from the border, as if padding were hoisted.

    Args:
        nodes: Nodes of a run or of a branch.
        get_module: Returns the module of a qualified name.
        channels: Number of input channels.
        rank: Number of spatial axes.
        like: A tensor with the device of the result.

    Raises:
        Refusal: If there is no such convolution, with the reason.
    """
    return affine_of_nodes(nodes, get_module, affine_in_double, like, channels, rank, exact=False)


def interior_geometry(nodes: Sequence[RunNode], channels: int, rank: int) -> Geometry:
    """Return the geometry of :func:`interior_affine`, without computing weights.

    Raises:
        Refusal: If there is no such convolution, with the reason.
    """
    total = identity_geometry(channels, rank)
    for node in nodes:
        if isinstance(node.element, ParallelSum):
            _check_rewritable(node.element)
            part = add_geometries([interior_geometry(branch, total.out_channels, rank) for branch in node.branches])
        elif isinstance(node.geometry, Refusal):
            raise node.geometry
        else:
            part = node.geometry
        total = compose_geometries(total, part, exact=False)
    return total


def _check_rewritable(parallel: ParallelSum) -> None:
    """Raise Refusal if the forward that computes the sum cannot be rewritten."""
    if parallel.why:
        raise Refusal(f"{parallel.owner or 'the model'}: {parallel.why}")
