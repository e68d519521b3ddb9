"""Sequences and sums of convolutions as the geometry of one convolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from nmconv.algebra.geometry import Geometry, Refusal, Stage

__all__ = ["add_geometries", "compose_geometries", "hoisted", "zeros_cut"]

Pairs = tuple[tuple[int, int], ...]  # (left, right) of each axis

_AVERAGED = "an average over the input is part of a convolution that was merged before"


@lru_cache(maxsize=1024)  # blocks are alike, and every sub-run of a run is composed
def compose_geometries(one: Geometry, two: Geometry, *, exact: bool = True) -> Geometry:
    """Return the convolution that equals ``one`` followed by ``two`` at every input size and up to the border.

    Merged extent s1·d2·(k2-1) + d1·(k1-1) + 1, stride s1·s2, padding p1 + s1·p2, groups gcd(g1, g2).

    Args:
        one: The first convolution.
        two: The second convolution.
        exact: If False, equality holds away from the border only, as if all padding were hoisted.

    Raises:
        Refusal: If there is no such convolution.
    """
    if one.pooled or two.pooled:
        raise Refusal(_AVERAGED)
    if one.out_channels != two.in_channels:
        raise Refusal(f"{two.in_channels} input channels are expected, not {one.out_channels}")
    mode = _common_mode((one, two))
    kernel, dilation, padding, stages = [], [], [], []
    if (two.crop and one.bounded) or (one.crop and two.bounded):
        raise Refusal("a crop meets biases that end at the border")
    for axis, step in enumerate(one.stride):
        if exact and two.is_padded(axis):
            _check_inner_padding(one, two, axis)
        size, gap = _taps(one.kernel[axis], one.dilation[axis], two.kernel[axis], step * two.dilation[axis])
        kernel.append(size)
        dilation.append(gap)
        axis_stages = _needed_stages((*one.axis_stages(axis), *two.axis_stages(axis)))
        stages.append(axis_stages)
        (left, right), (left2, right2) = one.padding[axis], two.padding[axis]
        padding.append((0, 0) if axis_stages else (left + step * left2, right + step * right2))
    after = two if exact else None
    bias, bounded = _constants([(one.bias, one.bounded, after), (two.bias, two.bounded, None)])
    fixed_padding, crop = _without_overlap(tuple(padding), _crops(one, two))
    return Geometry(
        in_channels=one.in_channels,
        out_channels=two.out_channels,
        kernel=tuple(kernel),
        stride=tuple(s1 * s2 for s1, s2 in zip(one.stride, two.stride, strict=True)),
        dilation=tuple(dilation),
        groups=math.gcd(one.groups, two.groups),
        padding=fixed_padding,
        mode=mode,
        stages=tuple(stages) if any(stages) else (),
        bounded=bounded,
        bias=bias,
        crop=crop,
    )


def add_geometries(branches: Sequence[Geometry]) -> Geometry:
    """Return the convolution that is the sum of parallel ones (RepVGG, arXiv 2101.03697), identities included.

    Raises:
        Refusal: If their strides, output sizes or borders differ.
    """
    first = branches[0]
    mode = _common_mode(branches)
    if any(branch.pooled for branch in branches):
        raise Refusal(_AVERAGED)
    if any(branch.crop for branch in branches):
        raise Refusal("a summed branch crops its input")
    if any((branch.in_channels, branch.out_channels) != (first.in_channels, first.out_channels) for branch in branches):
        raise Refusal("summed branches differ in their channels")
    kernel, dilation, padding, stages = [], [], [], []
    for axis in range(first.rank):
        if any(branch.stride[axis] != first.stride[axis] for branch in branches):
            raise Refusal("summed branches differ in their stride")
        axis_stages = {branch.stages[axis] if branch.stages else () for branch in branches}
        extents = {branch.extent[axis] for branch in branches}
        if len(axis_stages) > 1 or (any(axis_stages) and len(extents) > 1):
            raise Refusal("the padding of summed branches depends on the input's size")
        growths = {sum(branch.padding[axis]) - branch.extent[axis] for branch in branches}
        if len(growths) > 1:
            raise Refusal("summed branches differ in their output's size")
        left = max(branch.padding[axis][0] for branch in branches)
        taps = [tap for branch in branches for tap in branch.taps(axis, left)]
        gap = math.gcd(*taps) or 1
        kernel.append(max(taps) // gap + 1)
        dilation.append(gap)
        padding.append((left, growths.pop() + max(taps) + 1 - left))
        stages.append(axis_stages.pop())
    bias, bounded = _constants([(branch.bias, branch.bounded, None) for branch in branches])
    return replace(
        first,
        kernel=tuple(kernel),
        dilation=tuple(dilation),
        groups=math.gcd(*(branch.groups for branch in branches)),
        padding=tuple(padding),
        mode=mode,
        stages=tuple(stages) if any(stages) else (),
        bounded=bounded,
        bias=bias,
    )


def hoisted(parts: Sequence[Geometry]) -> list[Geometry]:
    """Return consecutive convolutions with all their padding moved to the first: p1 + s1·p2 + s1·s2·p3 + ...

    Output sizes stay; what the border sees changes. The result composes to one convolution exactly.

    Raises:
        Refusal: If their padding modes differ.
    """
    mode = _common_mode(parts)
    rank = parts[0].rank
    padding: list[tuple[int, int]] = []
    stages: list[tuple[Stage, ...]] = []
    for axis in range(rank):
        axis_stages = _needed_stages(tuple(stage for part in parts for stage in part.axis_stages(axis)))
        left = right = 0
        scale = 1
        for part in parts:
            left, right = left + scale * part.padding[axis][0], right + scale * part.padding[axis][1]
            scale *= part.stride[axis]
        padding.append((0, 0) if axis_stages else (left, right))
        stages.append(axis_stages)
    none = ((0, 0),) * rank
    first = replace(parts[0], padding=tuple(padding), mode=mode, stages=tuple(stages) if any(stages) else ())
    return [first, *(replace(part, padding=none, mode="zeros", stages=()) for part in parts[1:])]


def zeros_cut(geometry: Geometry) -> tuple[bool, ...]:
    """Return for each axis whether a constant that enters the convolution ends at the border, padded with zeros."""
    return tuple(geometry.mode == "zeros" and geometry.is_padded(axis) for axis in range(geometry.rank))


def _check_inner_padding(one: Geometry, two: Geometry, axis: int) -> None:
    """Raise Refusal unless the padding of ``two`` between both can be padding of the input instead."""
    if one.crop and any(one.crop[axis]):
        raise Refusal("a padded convolution follows a crop")
    has_constant = one.bias or (any(one.bounded) and not one.bounded[axis])  # also where the axis is padded
    zeros_on_zeros = one.mode == two.mode == "zeros" and not has_constant  # all that is padded are zeros
    if one.kernel[axis] != 1 or (one.is_padded(axis) and not zeros_on_zeros):
        raise Refusal(
            "a padded convolution follows one that is not an unpadded 1x1: its padding would have to be hoisted "
            "(nmconv.convert with hoist_padding=True)"
        )
    if one.is_padded(axis) and two.bounded and two.bounded[axis]:
        raise Refusal("biases end at the border of a map that was padded before")
    if two.mode != "zeros" and one.stride[axis] != 1:
        raise Refusal(f"{two.mode} padding follows a stride")


def _crops(one: Geometry, two: Geometry) -> Pairs:
    """Return what both skip, in elements of the input: a step of the second is a stride of the first."""
    none = ((0, 0),) * one.rank
    pairs = zip(one.crop or none, two.crop or none, one.stride, strict=True)
    return tuple((left + step * left2, right + step * right2) for (left, right), (left2, right2), step in pairs)


def _without_overlap(padding: Pairs, crop: Pairs) -> tuple[Pairs, Pairs]:
    """Return padding and crop without the padding that is cropped again; a crop of nothing is ()."""
    overlap = [tuple(map(min, pads, cuts)) for pads, cuts in zip(padding, crop, strict=True)]
    padding, crop = (
        tuple((left - a, right - b) for (left, right), (a, b) in zip(pairs, overlap, strict=True))
        for pairs in (padding, crop)
    )
    return padding, crop if any(map(any, crop)) else ()


def _taps(size: int, gap: int, size2: int, gap2: int) -> tuple[int, int]:
    """Return kernel size and dilation of two kernels in sequence, with both dilations in steps of the same map."""
    if size == 1 or size2 == 1:
        return (size, gap) if size > 1 else (size2, gap2 if size2 > 1 else 1)
    common = math.gcd(gap, gap2)
    return (gap * (size - 1) + gap2 * (size2 - 1)) // common + 1, common


def _needed_stages(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """Return the stages that padding must be computed from; () if it is the same for every input size."""
    stages = tuple(map(_with_fixed_padding, stages))
    if all(stage.left >= 0 for stage in stages):
        return ()
    while stages[-1].left == stages[-1].right == 0:
        stages = stages[:-1]
    return tuple(stage for stage in stages if stage != Stage(1, 1, 0, 0))


def _with_fixed_padding(stage: Stage) -> Stage:
    """Return the stage with its padding as numbers where "same" gives equal ones for every input size."""
    if stage.left < 0 and (stage.stride == 1 or stage.extent == 1):
        total = stage.extent - 1
        return Stage(stage.extent, stage.stride, total // 2, total - total // 2)
    return stage


def _common_mode(parts: Sequence[Geometry]) -> str:
    """Return the padding mode of all parts that pad."""
    modes = {part.mode for part in parts if any(part.is_padded(axis) for axis in range(part.rank))}
    if len(modes) > 1:
        raise Refusal(f"{' and '.join(sorted(modes))} padding meet in one run")
    return modes.pop() if modes else "zeros"


def _constants(constants: Sequence[tuple[bool, tuple[bool, ...], Geometry | None]]) -> tuple[bool, tuple[bool, ...]]:
    """Return the ``bias`` and ``bounded`` of a composition.

    Args:
        constants: The ``bias`` and ``bounded`` of each operation, and the operation that follows it, if any.
    """
    ends = set()
    for bias, bounded, after in constants:
        cut = zeros_cut(after) if after else ()
        if bias:
            ends.add(cut if any(cut) else ())
        if bounded:
            ends.add(tuple(was or new for was, new in zip(bounded, cut, strict=True)) if any(cut) else bounded)
    inner = [end for end in ends if end]
    if len(inner) > 1:
        raise Refusal("the biases of several padded convolutions end at different borders")
    return () in ends, inner[0] if inner else ()
