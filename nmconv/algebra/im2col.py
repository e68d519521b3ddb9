"""What each output of a convolution sees of its input."""

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

_MOST = 2**25  # numbers in one block of patches: 256 MiB in float64


def patches(input: Tensor, target: Tensor, geometry: Geometry) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of the regression, block by block, in float64.

    Args:
        input: ``[batch, in, *sizes]``.
        target: ``[batch, out, *output sizes]``.
        geometry: Of the convolution.

    Returns:
        Pairs of ``[groups, rows, in / groups · kernel elements]`` and ``[groups, rows, out / groups]``; one row for
        each position of each image.

    Raises:
        FitError: If the convolution is not given a batch.
        ValueError: If the convolution gives outputs of another size.
    """
    rank, groups = geometry.rank, geometry.groups
    if input.dim() != rank + 2:
        raise FitError(f"data gives a convolution a tensor of shape {tuple(input.shape)}: give batches of images")
    pads = geometry.pads(tuple(input.shape[-rank:]))
    columns = geometry.in_channels * math.prod(geometry.kernel)
    rows = math.prod(target.shape[2:])
    step = max(_MOST // max(rows * columns, 1), 1)
    for start in range(0, len(input), step):
        part = pad(input[start : start + step].double(), pads, geometry.mode)
        for axis in range(rank):
            part = part.unfold(2 + axis, geometry.extent[axis], geometry.stride[axis])
        slices: tuple[Any, ...] = tuple(slice(None, None, gap) for gap in geometry.dilation)
        part = part[(..., *slices)]
        if part.shape[2 : 2 + rank] != target.shape[2:]:
            raise ValueError(f"outputs of size {tuple(part.shape[2 : 2 + rank])} for {tuple(target.shape[2:])}")
        batch = part.shape[0]
        # [batch, in, *outputs, *kernel] -> [groups, batch · outputs, in / groups · kernel]
        part = part.reshape(batch, groups, -1, rows, *geometry.kernel).transpose(2, 3)
        part = part.transpose(0, 1).reshape(groups, batch * rows, -1)
        wanted = target[start : start + step].double().reshape(batch, groups, -1, rows).transpose(2, 3)
        yield part, wanted.transpose(0, 1).reshape(groups, batch * rows, -1)


def columns_of(geometry: Geometry, kept: tuple[slice, ...], device: torch.device) -> Tensor:
    """Which columns of the patches a smaller kernel sees.

    Args:
        geometry: Of the larger one.
        kept: Elements of it along each axis.
        device: Of the result.
    """
    inputs = geometry.in_channels // geometry.groups
    grid = torch.arange(inputs * math.prod(geometry.kernel), device=device).reshape(inputs, *geometry.kernel)
    return grid[(slice(None), *kept)].reshape(-1)
