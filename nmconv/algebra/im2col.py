"""Patches of a convolution's input as rows of a linear regression (im2col)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nmconv.algebra.geometry import Geometry
from nmconv.algebra.padding import pad
from nmconv.errors import FitError

__all__ = ["columns_of", "patches"]

_BLOCK = 2**25  # elements in one block of patches: 256 MiB in float64


def patches(input: Tensor, target: Tensor, geometry: Geometry) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the rows of the regression of ``target`` on the patches of ``input``, block by block, in float64.

    Args:
        input: ``[batch, in, *sizes]``.
        target: ``[batch, out, *output sizes]``.
        geometry: Of the convolution.

    Yields:
        ``[groups, rows, in / groups · kernel elements]`` and ``[groups, rows, out / groups]``, with one row for each
        output position of each image.

    Raises:
        FitError: If the input has no batch axis.
        ValueError: If the outputs of the convolution have another size than the target.
    """
    rank, groups = geometry.rank, geometry.groups
    if input.dim() != rank + 2:
        raise FitError(
            f"data gives a convolution an input of shape {tuple(input.shape)}, without a batch axis: pass batches of "
            "images"
        )
    pads = geometry.pads(tuple(input.shape[-rank:]))
    columns = geometry.in_channels * math.prod(geometry.kernel)
    positions = math.prod(target.shape[2:])
    step = max(_BLOCK // max(positions * columns, 1), 1)
    for start in range(0, len(input), step):
        block = pad(input[start : start + step].double(), pads, geometry.mode)
        for axis in range(rank):
            block = block.unfold(2 + axis, geometry.extent[axis], geometry.stride[axis])
        slices: tuple[Any, ...] = tuple(slice(None, None, gap) for gap in geometry.dilation)
        block = block[(..., *slices)]
        if block.shape[2 : 2 + rank] != target.shape[2:]:
            raise ValueError(f"outputs of size {tuple(block.shape[2 : 2 + rank])} for {tuple(target.shape[2:])}")
        batch = block.shape[0]
        # [batch, in, *outputs, *kernel] -> [groups, batch · outputs, in / groups · kernel]
        block = block.reshape(batch, groups, -1, positions, *geometry.kernel).transpose(2, 3)
        block = block.transpose(0, 1).reshape(groups, batch * positions, -1)
        targets = target[start : start + step].double().reshape(batch, groups, -1, positions).transpose(2, 3)
        yield block, targets.transpose(0, 1).reshape(groups, batch * positions, -1)


def columns_of(geometry: Geometry, kept: tuple[slice, ...], device: torch.device) -> Tensor:
    """Return the columns of the patches that a smaller kernel reads.

    Args:
        geometry: Of the convolution with the larger kernel.
        kept: The elements of that kernel that the smaller one has, along each axis.
        device: Of the result.
    """
    inputs = geometry.in_channels // geometry.groups
    grid = torch.arange(inputs * math.prod(geometry.kernel), device=device).reshape(inputs, *geometry.kernel)
    return grid[(slice(None), *kept)].reshape(-1)
