"""What a linear run amounts to, in numbers without tensors: one convolution's extents, or why there is none.

Left and right padding are told apart, and padding may depend on the input's size (TensorFlow's "same"), so that what
timm's ``tf_*`` networks do is a geometry too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

__all__ = [
    "Geometry",
    "Refusal",
    "Stage",
    "composed",
    "cropped",
    "diagonal",
    "hoisted",
    "identity",
    "joined",
    "padded",
    "shrunk",
    "taps_kept",
]


class Refusal(Exception):
    """Two operations that are not one convolution, and why; never leaves this package."""


@dataclass(frozen=True)
class Stage:
    """One axis of one convolution of a run, for computing padding from the input's size.

    Attributes:
        extent: Of the dilated kernel.
        stride: In steps of its own input.
        left: Padding before the first element, or -1 for "same" (ceil(size / stride) outputs, the odd one right).
        right: Padding behind the last element.
    """

    extent: int
    stride: int
    left: int
    right: int

    def pads(self, size: int) -> tuple[int, int]:
        """Left and right padding for an input of ``size``."""
        if self.left >= 0:
            return self.left, self.right
        # extent - 1 - (size - 1) % stride, at least 0; without a comparison, which a symbolic size could not do.
        total = self.extent - self.stride + -size % self.stride
        if self.extent < self.stride:
            total = sum((total - step) // self.stride + 1 for step in range(1, self.extent))
        return total // 2, total - total // 2


@dataclass(frozen=True)
class Geometry:
    """A convolution without its numbers, all tuples one entry an axis.

    Attributes:
        padding: (left, right) of each axis; (0, 0) where ``stages`` tells.
        mode: Of padding: ``zeros``, ``reflect``, ``replicate`` or ``circular``.
        stages: For each axis the convolutions that its padding is computed from, or () where it is fixed; () if it
            is fixed everywhere.
        bounded: For each axis, whether the bias is only there where the input map is: a constant that a later
            convolution has padded with zeros (see ``Affine.border``).
        bias: Whether there is a constant term that reaches beyond the map.
        crop: (left, right) of each axis: elements of the padded input that the kernel leaves out; () if there are none.
        pooled: Whether its weights are the same all over the kernel, so that averaging the input first (kernel and
            stride) leaves a 1x1.
    """

    in_channels: int
    out_channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding: tuple[tuple[int, int], ...]
    mode: str = "zeros"
    stages: tuple[tuple[Stage, ...], ...] = ()
    bounded: tuple[bool, ...] = ()
    bias: bool = True
    crop: tuple[tuple[int, int], ...] = ()
    pooled: bool = False

    @property
    def rank(self) -> int:
        """Number of spatial axes."""
        return len(self.kernel)

    @property
    def extent(self) -> tuple[int, ...]:
        """Of the dilated kernel, per axis."""
        return tuple(dil * (size - 1) + 1 for size, dil in zip(self.kernel, self.dilation, strict=True))

    @property
    def weights(self) -> int:
        """Number of weights, biases not counted: multiply-adds per output position."""
        taps = 1 if self.pooled else math.prod(self.kernel)
        return self.out_channels * (self.in_channels // self.groups) * taps

    @property
    def pointwise(self) -> bool:
        """Whether it makes one output of each place of its input: what an average may as well be taken before."""
        plain = not (self.stages or self.bounded or self.crop or self.pooled or any(map(any, self.padding)))
        return plain and all(size == 1 for size in (*self.kernel, *self.stride))

    @property
    def border_kernel(self) -> tuple[int, ...]:
        """Extents of the kernel over a map of ones: 1 along axes where the constant has no end; () without one."""
        return tuple(size if inside else 1 for size, inside in zip(self.kernel, self.bounded, strict=False))

    def axis_stages(self, axis: int) -> tuple[Stage, ...]:
        """What the axis' padding depends on; one fixed stage where it depends on nothing."""
        if self.stages and self.stages[axis]:
            return self.stages[axis]
        outside = sum(self.crop[axis]) if self.crop else 0
        return (Stage(self.extent[axis] + outside, self.stride[axis], *self.padding[axis]),)

    def taps(self, axis: int, left: int) -> range:
        """Where the kernel's elements lie on a map padded by ``left``, at least as much as its own padding."""
        start = left - self.padding[axis][0]
        return range(start, start + self.extent[axis], self.dilation[axis])

    def is_padded(self, axis: int) -> bool:
        """Whether anything is padded there, at any size."""
        return self.padding[axis] != (0, 0) or bool(self.stages and self.stages[axis])

    def pads(self, sizes: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """(left, right) of each axis, in steps of the input, for an input of these sizes; negative where it is cut."""
        found: list[tuple[int, int]] = []
        for axis, size in enumerate(sizes):
            if not (self.stages and self.stages[axis]):
                found.append(self.padding[axis])
                continue
            left = right = 0
            scale = 1
            for stage in self.stages[axis]:
                before, behind = stage.pads(size)
                left, right = left + scale * before, right + scale * behind
                size = (size + before + behind - stage.extent) // stage.stride + 1
                scale *= stage.stride
            found.append((left, right))
        if self.crop:
            found = [(left - a, right - b) for (left, right), (a, b) in zip(found, self.crop, strict=True)]
        return tuple(found)


def diagonal(channels: int, rank: int, bias: bool = True) -> Geometry:
    """A norm in eval mode: times a number and plus a number, channel by channel."""
    ones = (1,) * rank
    return Geometry(channels, channels, ones, ones, ones, channels, ((0, 0),) * rank, bias=bias)


def identity(channels: int, rank: int) -> Geometry:
    """What hands its input on."""
    return diagonal(channels, rank, bias=False)


def padded(channels: int, padding: Sequence[tuple[int, int]], mode: str) -> Geometry:
    """Padding alone, as a convolution."""
    return replace(identity(channels, len(padding)), padding=tuple(padding), mode=mode)


def cropped(channels: int, crop: Sequence[tuple[int, int]]) -> Geometry:
    """Leaving out the border alone, as a convolution."""
    return replace(identity(channels, len(crop)), crop=tuple(crop))


@lru_cache(maxsize=1024)  # blocks are alike, and every sub-run of a run is asked for
def composed(one: Geometry, two: Geometry, *, exact: bool = True) -> Geometry:
    """The convolution that does what ``one`` and then ``two`` do, at every size and up to the border.

    Merged extent s1·d2·(k2-1) + d1·(k1-1) + 1, stride s1·s2, padding p1 + s1·p2, groups gcd(g1, g2).

    Args:
        one: Comes first.
        two: Comes second.
        exact: If False, only away from the border: as if all padding were hoisted.

    Raises:
        Refusal: If no convolution does that.
    """
    if one.pooled or two.pooled:
        raise Refusal("an average over the input is part of a convolution that was merged before")
    if one.out_channels != two.in_channels:
        raise Refusal(f"{one.out_channels} channels come in where {two.in_channels} are expected")
    mode = _mode((one, two))
    kernel, dilation, padding, stages = [], [], [], []
    if (two.crop and one.bounded) or (one.crop and two.bounded):
        raise Refusal("a crop meets biases that end at the border")
    for axis, step in enumerate(one.stride):
        if exact and two.is_padded(axis) and one.crop and any(one.crop[axis]):
            raise Refusal("a padded convolution follows a crop")
        if exact and two.is_padded(axis):
            constant = one.bias or (any(one.bounded) and not one.bounded[axis])  # also where the axis is padded
            more_zeros = one.mode == two.mode == "zeros" and not constant  # beyond zeros only more of them
            if one.kernel[axis] != 1 or (one.is_padded(axis) and not more_zeros):
                raise Refusal(
                    "a padded convolution follows one that is no unpadded 1x1: its padding would have to be hoisted "
                    "(nmconv.convert with hoist_padding=True)"
                )
            if one.is_padded(axis) and two.bounded and two.bounded[axis]:
                raise Refusal("biases end at the border of a map that was padded before")
            if two.mode != "zeros" and step != 1:
                raise Refusal(f"{two.mode} padding follows a stride")
        size, gap = _taps(one.kernel[axis], one.dilation[axis], two.kernel[axis], step * two.dilation[axis])
        kernel.append(size)
        dilation.append(gap)
        line = _line((*one.axis_stages(axis), *two.axis_stages(axis)))
        stages.append(line)
        (left, right), (left2, right2) = one.padding[axis], two.padding[axis]
        padding.append((0, 0) if line else (left + step * left2, right + step * right2))
    after = two if exact else None
    bias, bounded = _borders([(one.bias, one.bounded, after), (two.bias, two.bounded, None)])
    padding, crop = _less(padding, _crops(one, two))
    return Geometry(
        in_channels=one.in_channels,
        out_channels=two.out_channels,
        kernel=tuple(kernel),
        stride=tuple(s1 * s2 for s1, s2 in zip(one.stride, two.stride, strict=True)),
        dilation=tuple(dilation),
        groups=math.gcd(one.groups, two.groups),
        padding=tuple(padding),
        mode=mode,
        stages=tuple(stages) if any(stages) else (),
        bounded=bounded,
        bias=bias,
        crop=crop,
    )


def _crops(one: Geometry, two: Geometry) -> tuple[tuple[int, int], ...]:
    """What both leave out of the input: the second's elements are ``stride`` of the first's apart."""
    none = ((0, 0),) * one.rank
    pairs = zip(one.crop or none, two.crop or none, one.stride, strict=True)
    found = tuple((left + step * left2, right + step * right2) for (left, right), (left2, right2), step in pairs)
    return found if any(map(any, found)) else ()


def _less(
    padding: list[tuple[int, int]], crop: tuple[tuple[int, int], ...]
) -> tuple[list[tuple[int, int]], tuple[tuple[int, int], ...]]:
    """Padding that is left out again was never needed: what is left of both."""
    if not crop:
        return padding, crop
    both = [tuple(map(min, pads, cuts)) for pads, cuts in zip(padding, crop, strict=True)]
    pads = [(left - a, right - b) for (left, right), (a, b) in zip(padding, both, strict=True)]
    cuts = tuple((left - a, right - b) for (left, right), (a, b) in zip(crop, both, strict=True))
    return pads, cuts if any(map(any, cuts)) else ()


def joined(branches: Sequence[Geometry]) -> Geometry:
    """The convolution that is the sum of parallel ones (RepVGG, arXiv 2101.03697); an identity is one of them.

    Raises:
        Refusal: If their strides, output sizes or borders differ.
    """
    first = branches[0]
    mode = _mode(branches)
    if any(other.pooled for other in branches):
        raise Refusal("an average over the input is part of a convolution that was merged before")
    if any(other.crop for other in branches):
        raise Refusal("a summed branch leaves out the border of its input")
    if any((other.in_channels, other.out_channels) != (first.in_channels, first.out_channels) for other in branches):
        raise Refusal("summed branches differ in their channels")
    kernel, dilation, padding, stages = [], [], [], []
    for axis in range(first.rank):
        if any(other.stride[axis] != first.stride[axis] for other in branches):
            raise Refusal("summed branches differ in their stride")
        lines = {other.stages[axis] if other.stages else () for other in branches}
        if len(lines) > 1 or (any(lines) and len({other.extent[axis] for other in branches}) > 1):
            raise Refusal("the padding of summed branches depends on the input's size")
        grown = {sum(other.padding[axis]) - other.extent[axis] for other in branches}
        if len(grown) > 1:
            raise Refusal("summed branches differ in their output's size")
        left = max(other.padding[axis][0] for other in branches)
        taps = [tap for other in branches for tap in other.taps(axis, left)]
        gap = math.gcd(*taps) or 1
        kernel.append(max(taps) // gap + 1)
        dilation.append(gap)
        padding.append((left, grown.pop() + max(taps) + 1 - left))
        stages.append(lines.pop())
    bias, bounded = _borders([(other.bias, other.bounded, None) for other in branches])
    return replace(
        first,
        kernel=tuple(kernel),
        dilation=tuple(dilation),
        groups=math.gcd(*(other.groups for other in branches)),
        padding=tuple(padding),
        mode=mode,
        stages=tuple(stages) if any(stages) else (),
        bounded=bounded,
        bias=bias,
    )


def hoisted(parts: Sequence[Geometry]) -> list[Geometry]:
    """Convolutions that follow one another with all their padding moved to the first: p1 + s1·p2 + s1·s2·p3 + ...

    Output sizes stay as they are; what the border sees changes. They then are one convolution, exactly.

    Raises:
        Refusal: If their padding modes differ.
    """
    mode = _mode(parts)
    rank = parts[0].rank
    padding: list[tuple[int, int]] = []
    stages: list[tuple[Stage, ...]] = []
    for axis in range(rank):
        line = _line(tuple(stage for part in parts for stage in part.axis_stages(axis)))
        left = right = 0
        scale = 1
        for part in parts:
            left, right = left + scale * part.padding[axis][0], right + scale * part.padding[axis][1]
            scale *= part.stride[axis]
        padding.append((0, 0) if line else (left, right))
        stages.append(line)
    none = ((0, 0),) * rank
    first = replace(parts[0], padding=tuple(padding), mode=mode, stages=tuple(stages) if any(stages) else ())
    return [first, *(replace(part, padding=none, mode="zeros", stages=()) for part in parts[1:])]


def taps_kept(geometry: Geometry, kernel: Sequence[int]) -> tuple[slice, ...]:
    """Which elements of the kernel a smaller one has, along each axis: those around its middle."""
    starts = [(size - kept) // 2 for size, kept in zip(geometry.kernel, kernel, strict=True)]
    return tuple(slice(start, start + kept) for start, kept in zip(starts, kernel, strict=True))


def shrunk(geometry: Geometry, kernel: Sequence[int]) -> Geometry:
    """The same convolution with only the middle of its kernel: the same outputs at the same places.

    Args:
        geometry: Without a border term.
        kernel: Sizes, none larger than the geometry's.
    """
    padding: list[tuple[int, int]] = []
    crop: list[tuple[int, int]] = []
    for axis, kept in enumerate(taps_kept(geometry, kernel)):
        gap = geometry.dilation[axis]
        cut = (gap * kept.start, gap * (geometry.kernel[axis] - kept.stop))
        own = geometry.crop[axis] if geometry.crop else (0, 0)
        pads = geometry.padding[axis]  # (0, 0) where stages tell
        padding.append((max(pads[0] - cut[0], 0), max(pads[1] - cut[1], 0)))
        crop.append((own[0] + max(cut[0] - pads[0], 0), own[1] + max(cut[1] - pads[1], 0)))
    return replace(
        geometry,
        kernel=tuple(kernel),
        dilation=tuple(1 if size == 1 else gap for size, gap in zip(kernel, geometry.dilation, strict=True)),
        padding=tuple(padding),
        crop=tuple(crop) if any(map(any, crop)) else (),
    )


def _taps(size: int, gap: int, size2: int, gap2: int) -> tuple[int, int]:
    """Kernel size and dilation of two kernels applied one after the other, gaps in steps of the same map."""
    if size == 1 or size2 == 1:
        return (size, gap) if size > 1 else (size2, gap2 if size2 > 1 else 1)
    common = math.gcd(gap, gap2)
    return (gap * (size - 1) + gap2 * (size2 - 1)) // common + 1, common


def _line(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """What padding must be computed from: () if it is the same for every size."""
    fixed = [_fixed(stage) for stage in stages]
    if all(stage.left >= 0 for stage in fixed):
        return ()
    while fixed[-1].left == fixed[-1].right == 0:
        fixed.pop()
    return tuple(stage for stage in fixed if stage != Stage(1, 1, 0, 0))


def _fixed(stage: Stage) -> Stage:
    """The stage with its padding as numbers, where "same" gives the same ones for every size."""
    if stage.left < 0 and (stage.stride == 1 or stage.extent == 1):
        total = stage.extent - 1
        return Stage(stage.extent, stage.stride, total // 2, total - total // 2)
    return stage


def _mode(parts: Sequence[Geometry]) -> str:
    """The padding mode of all that is padded."""
    modes = {part.mode for part in parts if any(part.is_padded(axis) for axis in range(part.rank))}
    if len(modes) > 1:
        raise Refusal(f"{' and '.join(sorted(modes))} padding meet in one run")
    return modes.pop() if modes else "zeros"


def _borders(
    constants: Sequence[tuple[bool, tuple[bool, ...], Geometry | None]],
) -> tuple[bool, tuple[bool, ...]]:
    """Whether there is a constant that reaches everywhere, and where the other ends.

    Args:
        constants: Of each operation whether it has the one, where it has the other, and what follows it.
    """
    ends = set()
    for everywhere, bounded, after in constants:
        cut = tuple(after.mode == "zeros" and after.is_padded(axis) for axis in range(after.rank)) if after else ()
        if everywhere:
            ends.add(cut if any(cut) else ())
        if bounded:
            ends.add(tuple(was or new for was, new in zip(bounded, cut, strict=True)) if any(cut) else bounded)
    inner = [end for end in ends if end]
    if len(inner) > 1:
        raise Refusal("the biases of several padded convolutions end at different borders")
    return () in ends, inner[0] if inner else ()
