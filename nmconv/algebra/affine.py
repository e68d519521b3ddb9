"""Composing and adding convolutions: tensors in, tensors out, differentiable. No modules.

A convolution here is ``Affine``: out = conv(x, weight) + bias + conv(1, border), where the last term is the response of
constants that later convolutions padded with zeros. It is what the original run makes of an all-zero input, and a
kernel over a map of ones gives it for every input size and stride.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from nmconv.algebra.geometry import Geometry, composed, diagonal, identity, joined
from nmconv.algebra.padding import is_known, pad

__all__ = ["Affine", "apply", "compose", "join", "of_average", "of_identity", "of_norm", "response", "sizes_of"]

_CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_AVERAGES = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_PART = 1 << 16  # numbers multiplied at a time: 512 KiB in float64


@dataclass(frozen=True, eq=False)
class Affine:
    """A convolution with its numbers.

    Attributes:
        geometry: Its extents.
        weight: ``[out, in / groups, *kernel]``, or ``[channels]`` where ``diagonal``.
        bias: ``[out]``: a constant everywhere, or None.
        border: ``[out, 1, *kernel]``, the kernel 1 along axes that ``geometry.bounded`` does not name, or None.
        diagonal: Whether it only multiplies each channel by a number of its own.
        scale: ``[out]``: what each output channel's weights are still to be multiplied by, or None. A norm behind a
            convolution comes to no more than this, until something else follows.
    """

    geometry: Geometry
    weight: Tensor
    bias: Tensor | None = None
    border: Tensor | None = None
    diagonal: bool = False
    scale: Tensor | None = None

    def dense(self) -> Affine:
        """The same with its weight written out as a kernel, and multiplied."""
        if self.diagonal:
            weight = self.weight.reshape(-1, 1, *self.geometry.kernel)
        elif self.scale is None:
            return self
        else:
            weight = self.weight * self.scale.reshape(-1, *(1,) * (self.weight.dim() - 1))
        return Affine(self.geometry, weight, self.bias, self.border)

    @torch.no_grad()
    def cast(self, dtype: torch.dtype) -> Tensor:
        """The weight as a kernel in another dtype, without history; multiplied in parts that a cache holds."""
        if self.scale is None or self.weight.is_meta:
            return self.dense().weight.to(dtype)
        made = torch.empty(self.weight.shape, dtype=dtype, device=self.weight.device)
        rows = max(1, _PART * len(made) // max(1, made.numel()))
        shape = (-1, *(1,) * (made.dim() - 1))
        for part, weight, scale in zip(*(each.split(rows) for each in (made, self.weight, self.scale)), strict=True):
            part.copy_(weight.to(scale.dtype, copy=True).mul_(scale.reshape(shape)))
        return made


def of_norm(scale: Tensor, shift: Tensor, rank: int) -> Affine:
    """A norm in eval mode, times ``scale`` plus ``shift``, each ``[channels]``."""
    return Affine(diagonal(len(scale), rank), scale, shift, diagonal=True)


def of_identity(like: Tensor, channels: int, rank: int) -> Affine:
    """An identity, in the dtype and on the device of ``like``."""
    return Affine(identity(channels, rank), like.new_ones(channels), diagonal=True)


def of_average(like: Tensor, geometry: Geometry) -> Affine:
    """An average pool, in the dtype and on the device of ``like``."""
    weight = like.new_full((geometry.out_channels, 1, *geometry.kernel), 1 / math.prod(geometry.kernel))
    return Affine(geometry, weight)


def compose(one: Affine, two: Affine, *, exact: bool = True) -> Affine:
    """``two`` after ``one``: equal everywhere, borders included; with ``exact=False`` away from the border.

    Raises:
        Refusal: See :func:`nmconv.algebra.composed`.
    """
    geometry = composed(one.geometry, two.geometry, exact=exact)
    if not two.diagonal:
        one, two = one if one.diagonal else one.dense(), two.dense()
    bounds = geometry.bounded or (False,) * geometry.rank
    bias, border = two.bias, two.border
    for constant, was in ((one.bias, ()), (one.border, one.geometry.bounded)):
        if constant is None:
            continue
        kernel = constant if was else constant.reshape(-1, 1, *(1,) * geometry.rank)
        cut = tuple(
            exact and two.geometry.mode == "zeros" and two.geometry.is_padded(axis) for axis in range(geometry.rank)
        )
        response = _through(kernel, one, two, bounds if was or any(cut) else (False,) * geometry.rank)
        if was or any(cut):
            border = response if border is None else border + response
        else:
            bias = response.flatten() if bias is None else bias + response.flatten()
    if two.diagonal and not one.diagonal:
        scale = two.weight if one.scale is None else one.scale * two.weight
        return Affine(geometry, one.weight, bias, border, scale=scale)
    return Affine(geometry, _weights(one, two, geometry.groups), bias, border, two.diagonal)


def join(branches: Sequence[Affine]) -> Affine:
    """The sum of parallel convolutions of the same input.

    Raises:
        Refusal: See :func:`nmconv.algebra.joined`.
    """
    geometry = joined([branch.geometry for branch in branches])
    full = (True,) * geometry.rank
    weights = [_ungrouped(branch.dense(), geometry.groups) for branch in branches]
    weight = _sum([_spread(part, own.geometry, geometry, full) for part, own in zip(weights, branches, strict=True)])
    biases = [branch.bias for branch in branches if branch.bias is not None]
    borders = [
        _spread(branch.border, branch.geometry, geometry, branch.geometry.bounded)
        for branch in branches
        if branch.border is not None
    ]
    return Affine(geometry, weight, _sum(biases) if biases else None, _sum(borders) if borders else None)


def apply(input: Tensor, geometry: Geometry, weight: Tensor, bias: Tensor | None, border: Tensor | None) -> Tensor:
    """Run it on ``[batch, in, *sizes]`` (or ``[in, *sizes]``); gives ``[batch, out, *sizes]``."""
    if geometry.pooled:
        input = _AVERAGES[geometry.rank](input, geometry.kernel, geometry.stride)
        return _CONVS[geometry.rank](input, weight, bias, 1, 0, 1, geometry.groups)
    sizes = sizes_of(input, geometry.rank)
    result = _convolve(input, geometry, geometry.pads(sizes), weight, bias, geometry.groups)
    return result if border is None else result + response(geometry, border, sizes)


def sizes_of(input: Tensor, rank: int) -> tuple[int, ...]:
    """The last ``rank`` extents, one by one, so that they may be symbolic."""
    return tuple(input.shape[axis - rank] for axis in range(rank))


def response(geometry: Geometry, border: Tensor, sizes: Sequence[int]) -> Tensor:
    """What the run makes of its inner constants for inputs of ``sizes``: ``[out, *sizes]``, broadcasting.

    Args:
        geometry: Of the merged convolution.
        border: Its kernel over a map of ones.
        sizes: Of the input.
    """
    pads = geometry.pads(sizes)
    within = [size if inside else 1 for size, inside in zip(sizes, geometry.bounded, strict=True)]
    ones = border.new_ones(1, 1, *within)
    inner = [pair if inside else (0, 0) for pair, inside in zip(pads, geometry.bounded, strict=True)]
    stride = [size if inside else 1 for size, inside in zip(geometry.stride, geometry.bounded, strict=True)]
    dilation = [size if inside else 1 for size, inside in zip(geometry.dilation, geometry.bounded, strict=True)]
    return _CONVS[geometry.rank](pad(ones, inner, "zeros"), border, None, stride, 0, dilation).squeeze(0)


def _convolve(
    input: Tensor, geometry: Geometry, pads: Sequence[tuple[int, int]], weight: Tensor, bias: Tensor | None, groups: int
) -> Tensor:
    conv = _CONVS[geometry.rank]
    if is_known(pads) and geometry.mode == "zeros" and all(0 <= left == right for left, right in pads):
        padding = [left for left, _ in pads]
        return conv(input, weight, bias, geometry.stride, padding, geometry.dilation, groups)
    return conv(pad(input, pads, geometry.mode), weight, bias, geometry.stride, 0, geometry.dilation, groups)


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _weights(one: Affine, two: Affine, groups: int) -> Tensor:
    """The composed kernel: ``[out, in / groups, *kernel]``, or ``[channels]`` for two diagonals."""
    if two.diagonal:
        return one.weight * two.weight
    rank, own = one.geometry.rank, two.geometry.groups
    if one.diagonal:
        outputs, inputs = two.weight.shape[:2]
        scale = one.weight.reshape(own, 1, inputs).expand(own, outputs // own, inputs)
        return two.weight * scale.reshape(outputs, inputs, *(1,) * rank)
    first = _ungrouped(one.dense(), groups)
    return _through(first, one, two, (True,) * rank)


def _through(first: Tensor, one: Affine, two: Affine, along: Sequence[bool]) -> Tensor:
    """Kernels ``[middle, n, *kernel]`` of ``one``'s geometry carried through ``two``: ``[out, n, *kernel]``.

    Args:
        first: The kernels; 1 along the axes that are not in ``along``.
        one: Where they come from.
        two: What follows.
        along: Axes that are convolved; along the others the map is constant and ``two``'s kernel is summed.
    """
    if two.diagonal:
        return first * two.weight.reshape(-1, *(1,) * (first.dim() - 1))
    second = two.weight
    grid, gaps = [], []
    for axis, inside in enumerate(along):
        if not inside:
            second = second.sum(2 + axis, keepdim=True)
            grid.append(1)
            gaps.append(1)
            continue
        own, other = one.geometry.dilation[axis], one.geometry.stride[axis] * two.geometry.dilation[axis]
        long, long2 = first.shape[2 + axis] > 1, second.shape[2 + axis] > 1
        common = math.gcd(own if long else 0, other if long2 else 0) or 1
        grid.append(own // common if long else 1)
        gaps.append(other // common if long2 else 1)
    groups = two.geometry.groups
    outputs, inputs = second.shape[:2]
    if math.prod(second.shape[2:]) == 1:  # a product of matrices is much faster
        left = second.reshape(groups, outputs // groups, inputs)
        made = left @ first.reshape(groups, inputs, -1)
        return made.reshape(outputs, *first.shape[1:])
    if math.prod(first.shape[2:]) == 1:
        left = second.reshape(groups, outputs // groups, inputs, -1).transpose(2, 3)
        made = left.reshape(groups, -1, inputs) @ first.reshape(groups, inputs, -1)
        made = made.reshape(outputs, -1, first.shape[1]).transpose(1, 2)
        return made.reshape(outputs, first.shape[1], *second.shape[2:])
    if first.dtype == torch.float64:
        return _product(first, second, groups, grid, gaps)
    second = second.reshape(groups, outputs // groups, inputs, *second.shape[2:]).transpose(1, 2)
    second = second.reshape(groups * inputs, outputs // groups, *second.shape[3:])
    images = _dilated(first.transpose(0, 1), grid)
    return _TRANSPOSED[len(along)](images, second, None, 1, 0, 0, groups, gaps).transpose(0, 1)


def _dilated(kernels: Tensor, steps: Sequence[int]) -> Tensor:
    """Kernels with ``steps - 1`` zeros between elements."""
    if all(step == 1 for step in steps):
        return kernels
    sizes = [step * (size - 1) + 1 for size, step in zip(kernels.shape[2:], steps, strict=True)]
    wide = kernels.new_zeros(*kernels.shape[:2], *sizes)
    wide[(slice(None), slice(None), *(slice(None, None, step) for step in steps))] = kernels
    return wide


def _product(first: Tensor, second: Tensor, groups: int, grid: Sequence[int], gaps: Sequence[int]) -> Tensor:
    """The transposed convolution as one product of matrices for each of the second kernel's taps.

    Ten times as fast in float64, which oneDNN does not have.
    """
    outputs, inputs = second.shape[:2]
    left = second.reshape(groups, outputs // groups, inputs, -1)
    right = first.reshape(groups, inputs, -1)
    reach = [step * (taps - 1) + 1 for step, taps in zip(grid, first.shape[2:], strict=True)]
    sizes = [own + gap * (taps - 1) for own, gap, taps in zip(reach, gaps, second.shape[2:], strict=True)]
    made: Tensor | None = None
    for tap, at in enumerate(product(*map(range, second.shape[2:]))):
        starts = [place * gap for place, gap in zip(at, gaps, strict=True)]
        spots = [slice(start, start + own, step) for start, own, step in zip(starts, reach, grid, strict=True)]
        part = left[..., tap] @ right
        if made is None:  # of the part, which a transformation (vmap) may have made larger
            made = part.new_zeros(groups, outputs // groups, first.shape[1], *sizes)
        spot = made[(slice(None), slice(None), slice(None), *spots)]
        spot.add_(part.reshape(spot.shape))
    assert made is not None
    return made.reshape(outputs, first.shape[1], *sizes)


def _ungrouped(part: Affine, groups: int) -> Tensor:
    """The weight for a smaller number of groups: ``[out, in / groups, *kernel]`` with zeros between groups."""
    own = part.geometry.groups
    if own == groups:
        return part.weight
    outputs, inputs = part.weight.shape[:2]
    ratio = own // groups
    blocks = part.weight.reshape(groups, ratio, outputs // own, inputs, *part.weight.shape[2:])
    wide = blocks.new_zeros(groups, ratio, outputs // own, ratio, inputs, *part.weight.shape[2:])
    at = torch.arange(ratio, device=blocks.device)
    wide[:, at, :, at] = blocks.transpose(0, 1)
    return wide.reshape(outputs, ratio * inputs, *part.weight.shape[2:])


def _spread(kernel: Tensor, branch: Geometry, onto: Geometry, along: Sequence[bool]) -> Tensor:
    """A branch's kernel laid onto the joint kernel's grid, along the axes where it has an extent."""
    sizes, slots = [1] * onto.rank, [slice(None)] * onto.rank
    for axis in range(onto.rank):
        if along[axis]:
            taps, gap = branch.taps(axis, onto.padding[axis][0]), onto.dilation[axis]
            sizes[axis] = onto.kernel[axis]
            slots[axis] = slice(taps[0] // gap, taps[-1] // gap + 1, max(taps.step // gap, 1))
    if sizes == list(kernel.shape[2:]):
        return kernel
    wide = kernel.new_zeros(*kernel.shape[:2], *sizes)
    wide[(slice(None), slice(None), *slots)] = kernel
    return wide
