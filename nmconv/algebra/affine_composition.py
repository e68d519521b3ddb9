"""Sequences and sums of convolutions as one convolution: tensors in, tensors out, differentiable."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from nmconv.algebra.affine import Affine
from nmconv.algebra.geometry import Geometry
from nmconv.algebra.geometry_composition import add_geometries, compose_geometries, zeros_cut

__all__ = ["add_affines", "compose"]

_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def compose(one: Affine, two: Affine, *, exact: bool = True) -> Affine:
    """Return ``two`` after ``one``, equal everywhere, borders included; with ``exact=False`` away from the border.

    Raises:
        Refusal: See :func:`nmconv.algebra.compose_geometries`.
    """
    geometry = compose_geometries(one.geometry, two.geometry, exact=exact)
    if not two.diagonal:
        one, two = one if one.diagonal else one.dense(), two.dense()
    nowhere = (False,) * geometry.rank
    bounded = geometry.bounded or nowhere
    is_cut = exact and any(zeros_cut(two.geometry))  # whether the constants of ``one`` end at the border
    bias, border = two.bias, two.border
    if one.bias is not None:
        constant = one.bias.reshape(-1, 1, *(1,) * geometry.rank)
        carried = _carry(constant, one, two, bounded if is_cut else nowhere)
        if is_cut:
            border = _plus(border, carried)
        else:
            bias = _plus(bias, carried.flatten())
    if one.border is not None:
        border = _plus(border, _carry(one.border, one, two, bounded))
    if two.diagonal and not one.diagonal:
        scale = two.weight if one.scale is None else one.scale * two.weight
        return Affine(geometry, one.weight, bias, border, scale=scale)
    return Affine(geometry, _composed_weight(one, two, geometry.groups), bias, border, two.diagonal)


def add_affines(branches: Sequence[Affine]) -> Affine:
    """Return the sum of parallel convolutions of the same input.

    Raises:
        Refusal: See :func:`nmconv.algebra.add_geometries`.
    """
    geometry = add_geometries([branch.geometry for branch in branches])
    everywhere = (True,) * geometry.rank
    weight: Tensor | None = None
    bias: Tensor | None = None
    border: Tensor | None = None
    for branch in branches:
        kernel = _ungrouped(branch.dense(), geometry.groups)
        weight = _plus(weight, _on_grid(kernel, branch.geometry, geometry, everywhere))
        if branch.bias is not None:
            bias = _plus(bias, branch.bias)
        if branch.border is not None:
            border = _plus(border, _on_grid(branch.border, branch.geometry, geometry, branch.geometry.bounded))
    assert weight is not None
    return Affine(geometry, weight, bias, border)


def _plus(total: Tensor | None, term: Tensor) -> Tensor:
    return term if total is None else total + term


def _composed_weight(one: Affine, two: Affine, groups: int) -> Tensor:
    """Return the composed kernel, ``[out, in / groups, *kernel]``, or ``[channels]`` for two diagonals."""
    if two.diagonal:
        return one.weight * two.weight
    if one.diagonal:
        rank, own_groups = one.geometry.rank, two.geometry.groups
        outputs, inputs = two.weight.shape[:2]
        scale = one.weight.reshape(own_groups, 1, inputs).expand(own_groups, outputs // own_groups, inputs)
        return two.weight * scale.reshape(outputs, inputs, *(1,) * rank)
    return _carry(_ungrouped(one.dense(), groups), one, two, (True,) * one.geometry.rank)


def _carry(first: Tensor, one: Affine, two: Affine, convolved: Sequence[bool]) -> Tensor:
    """Carry kernels or constants of ``one`` through ``two``.

    Args:
        first: ``[middle, n, *kernel]``, with size 1 along the axes that are not convolved.
        one: The convolution they belong to.
        two: The convolution that follows.
        convolved: For each axis whether kernels are convolved; elsewhere the map is constant and the kernel of ``two``
            is summed.

    Returns:
        ``[out, n, *kernel]``.
    """
    if two.diagonal:
        return first * two.weight.reshape(-1, *(1,) * (first.dim() - 1))
    second = two.weight
    first_gaps, second_gaps = [], []
    for axis, inside in enumerate(convolved):
        if not inside:
            second = second.sum(2 + axis, keepdim=True)
            first_gaps.append(1)
            second_gaps.append(1)
            continue
        gap, gap2 = one.geometry.dilation[axis], one.geometry.stride[axis] * two.geometry.dilation[axis]
        long, long2 = first.shape[2 + axis] > 1, second.shape[2 + axis] > 1
        common = math.gcd(gap if long else 0, gap2 if long2 else 0) or 1
        first_gaps.append(gap // common if long else 1)
        second_gaps.append(gap2 // common if long2 else 1)
    groups = two.geometry.groups
    outputs, inputs = second.shape[:2]
    if math.prod(second.shape[2:]) == 1:  # a product of matrices is much faster
        left = second.reshape(groups, outputs // groups, inputs)
        return (left @ first.reshape(groups, inputs, -1)).reshape(outputs, *first.shape[1:])
    if math.prod(first.shape[2:]) == 1:
        left = second.reshape(groups, outputs // groups, inputs, -1).transpose(2, 3)
        kernel = left.reshape(groups, -1, inputs) @ first.reshape(groups, inputs, -1)
        kernel = kernel.reshape(outputs, -1, first.shape[1]).transpose(1, 2)
        return kernel.reshape(outputs, first.shape[1], *second.shape[2:])
    if first.dtype == torch.float64:
        return _convolved_by_taps(first, second, groups, first_gaps, second_gaps)
    second = second.reshape(groups, outputs // groups, inputs, *second.shape[2:]).transpose(1, 2)
    second = second.reshape(groups * inputs, outputs // groups, *second.shape[3:])
    maps = _dilated(first.transpose(0, 1), first_gaps)
    return _TRANSPOSED[len(convolved)](maps, second, None, 1, 0, 0, groups, second_gaps).transpose(0, 1)


def _dilated(kernels: Tensor, gaps: Sequence[int]) -> Tensor:
    """Return kernels with ``gap - 1`` zeros between elements."""
    if all(gap == 1 for gap in gaps):
        return kernels
    sizes = [gap * (size - 1) + 1 for size, gap in zip(kernels.shape[2:], gaps, strict=True)]
    wide = kernels.new_zeros(*kernels.shape[:2], *sizes)
    wide[(slice(None), slice(None), *(slice(None, None, gap) for gap in gaps))] = kernels
    return wide


def _convolved_by_taps(
    first: Tensor, second: Tensor, groups: int, first_gaps: Sequence[int], second_gaps: Sequence[int]
) -> Tensor:
    """Compute the transposed convolution as one product of matrices per tap of the second kernel.

    Ten times as fast in float64, which oneDNN does not support.
    """
    outputs, inputs = second.shape[:2]
    left = second.reshape(groups, outputs // groups, inputs, -1)
    right = first.reshape(groups, inputs, -1)
    extents = [gap * (taps - 1) + 1 for gap, taps in zip(first_gaps, first.shape[2:], strict=True)]
    sizes = [size + gap * (taps - 1) for size, gap, taps in zip(extents, second_gaps, second.shape[2:], strict=True)]
    total: Tensor | None = None
    for tap, position in enumerate(product(*map(range, second.shape[2:]))):
        starts = [index * gap for index, gap in zip(position, second_gaps, strict=True)]
        slices = [slice(start, start + size, gap) for start, size, gap in zip(starts, extents, first_gaps, strict=True)]
        term = left[..., tap] @ right
        if total is None:  # made from a term, which a transformation (vmap) may have batched
            total = term.new_zeros(groups, outputs // groups, first.shape[1], *sizes)
        target = total[(slice(None), slice(None), slice(None), *slices)]
        target.add_(term.reshape(target.shape))
    assert total is not None
    return total.reshape(outputs, first.shape[1], *sizes)


def _ungrouped(affine: Affine, groups: int) -> Tensor:
    """Return the weight for fewer groups, ``[out, in / groups, *kernel]``, with zeros between the old groups."""
    own_groups = affine.geometry.groups
    if own_groups == groups:
        return affine.weight
    outputs, inputs = affine.weight.shape[:2]
    kernel = affine.weight.shape[2:]
    ratio = own_groups // groups
    blocks = affine.weight.reshape(groups, ratio, outputs // own_groups, inputs, *kernel)
    wide = blocks.new_zeros(groups, ratio, outputs // own_groups, ratio, inputs, *kernel)
    index = torch.arange(ratio, device=blocks.device)
    wide[:, index, :, index] = blocks.transpose(0, 1)
    return wide.reshape(outputs, ratio * inputs, *kernel)


def _on_grid(kernel: Tensor, branch: Geometry, joint: Geometry, spread: Sequence[bool]) -> Tensor:
    """Return a branch's kernel on the grid of the joint kernel, along the axes to spread it on."""
    sizes, slices = [1] * joint.rank, [slice(None)] * joint.rank
    for axis in range(joint.rank):
        if spread[axis]:
            taps, gap = branch.taps(axis, joint.padding[axis][0]), joint.dilation[axis]
            sizes[axis] = joint.kernel[axis]
            slices[axis] = slice(taps[0] // gap, taps[-1] // gap + 1, max(taps.step // gap, 1))
    if sizes == list(kernel.shape[2:]):
        return kernel
    wide = kernel.new_zeros(*kernel.shape[:2], *sizes)
    wide[(slice(None), slice(None), *slices)] = kernel
    return wide
