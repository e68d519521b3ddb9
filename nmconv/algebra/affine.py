"""Convolutions as tensors, without modules: out = conv(x, weight) + bias + conv(1, border), differentiable.

The last term is the response to constants that later convolutions pad with zeros: what the original run returns for
an all-zero input. A kernel over a map of ones gives it for every input size and stride.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nmconv.algebra.geometry import Geometry, diagonal, identity_geometry
from nmconv.algebra.padding import is_known, pad

__all__ = [
    "Affine",
    "affine_of_average",
    "affine_of_identity",
    "affine_of_norm",
    "apply_conv",
    "border_term",
    "sizes_of",
]

_CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_AVERAGES = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_CHUNK = 1 << 16  # elements multiplied at a time: 512 KiB in float64


@dataclass(frozen=True, eq=False)
class Affine:
    """A convolution with its weights.

    Attributes:
        geometry: Its extents.
        weight: ``[out, in / groups, *kernel]``, or ``[channels]`` where ``diagonal``.
        bias: ``[out]``, a constant that does not end at the border, or None.
        border: ``[out, 1, *kernel]``, with size 1 along axes where ``geometry.bounded`` is False, or None.
        diagonal: Whether it only multiplies each channel by a factor.
        scale: ``[out]``, factors by which the weights of each output channel are still to be multiplied, or None. A
            norm after a convolution stays such a factor until another operation follows.
    """

    geometry: Geometry
    weight: Tensor
    bias: Tensor | None = None
    border: Tensor | None = None
    diagonal: bool = False
    scale: Tensor | None = None

    def dense(self) -> Affine:
        """Return the same convolution with a full kernel as its weight, scaled."""
        if self.diagonal:
            weight = self.weight.reshape(-1, 1, *self.geometry.kernel)
        elif self.scale is None:
            return self
        else:
            weight = self.weight * self.scale.reshape(-1, *(1,) * (self.weight.dim() - 1))
        return Affine(self.geometry, weight, self.bias, self.border)

    @torch.no_grad()
    def cast(self, dtype: torch.dtype) -> Tensor:
        """Return the full kernel in another dtype, detached; scaled in chunks that fit into a cache."""
        if self.scale is None or self.weight.is_meta:
            return self.dense().weight.to(dtype)
        kernel = torch.empty(self.weight.shape, dtype=dtype, device=self.weight.device)
        rows = max(1, _CHUNK * len(kernel) // max(1, kernel.numel()))
        shape = (-1, *(1,) * (kernel.dim() - 1))
        for chunk, weight, scale in zip(*(each.split(rows) for each in (kernel, self.weight, self.scale)), strict=True):
            chunk.copy_(weight.to(scale.dtype, copy=True).mul_(scale.reshape(shape)))
        return kernel


def affine_of_norm(scale: Tensor, shift: Tensor, rank: int) -> Affine:
    """Return a norm in eval mode: times ``scale`` plus ``shift``, each ``[channels]``."""
    return Affine(diagonal(len(scale), rank), scale, shift, diagonal=True)


def affine_of_identity(like: Tensor, channels: int, rank: int) -> Affine:
    """Return an identity with the dtype and device of ``like``."""
    return Affine(identity_geometry(channels, rank), like.new_ones(channels), diagonal=True)


def affine_of_average(like: Tensor, geometry: Geometry) -> Affine:
    """Return an average pool with the dtype and device of ``like``."""
    weight = like.new_full((geometry.out_channels, 1, *geometry.kernel), 1 / math.prod(geometry.kernel))
    return Affine(geometry, weight)


def apply_conv(input: Tensor, geometry: Geometry, weight: Tensor, bias: Tensor | None, border: Tensor | None) -> Tensor:
    """Apply a convolution to ``[batch, in, *sizes]`` or ``[in, *sizes]``.

    Args:
        input: The input.
        geometry: Extents of the convolution.
        weight: ``[out, in / groups, *kernel]``; ``[out, in / groups, 1, ...]`` where ``geometry.pooled``.
        bias: ``[out]`` or None.
        border: The border term as in :class:`Affine`, or None.

    Returns:
        ``[batch, out, *sizes]`` or ``[out, *sizes]``.
    """
    conv = _CONVS[geometry.rank]
    if geometry.pooled:
        input = _AVERAGES[geometry.rank](input, geometry.kernel, geometry.stride)
        return conv(input, weight, bias, 1, 0, 1, geometry.groups)
    sizes = sizes_of(input, geometry.rank)
    pads = geometry.pads(sizes)
    padding = [0] * geometry.rank
    if is_known(pads) and geometry.mode == "zeros" and all(0 <= left == right for left, right in pads):
        padding = [left for left, _ in pads]
    else:
        input = pad(input, pads, geometry.mode)
    result = conv(input, weight, bias, geometry.stride, padding, geometry.dilation, geometry.groups)
    return result if border is None else result + border_term(geometry, border, sizes)


def sizes_of(input: Tensor, rank: int) -> tuple[int, ...]:
    """Return the last ``rank`` extents, read one by one so that they may be symbolic."""
    return tuple(input.shape[axis - rank] for axis in range(rank))


def border_term(geometry: Geometry, border: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the border term for inputs of some size: ``[out, *sizes]``, 1 along axes where it is constant.

    Args:
        geometry: Of the merged convolution.
        border: Its kernel over a map of ones, ``[out, 1, *kernel]``.
        sizes: Spatial extents of the input.
    """
    bounded = geometry.bounded
    within = [size if inside else 1 for size, inside in zip(sizes, bounded, strict=True)]
    ones = border.new_ones(1, 1, *within)
    pads = [pair if inside else (0, 0) for pair, inside in zip(geometry.pads(sizes), bounded, strict=True)]
    stride = [step if inside else 1 for step, inside in zip(geometry.stride, bounded, strict=True)]
    dilation = [gap if inside else 1 for gap, inside in zip(geometry.dilation, bounded, strict=True)]
    return _CONVS[geometry.rank](pad(ones, pads, "zeros"), border, None, stride, 0, dilation).squeeze(0)
