"""The extents of a convolution: kernel, stride, padding and the like, without any tensor.

Left and right padding are separate, and padding may depend on the size of the input (TensorFlow's "same"), so that the
convolutions of timm's ``tf_*`` networks have a geometry too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

__all__ = [
    "Geometry",
    "Refusal",
    "Stage",
    "center_slices",
    "cropped",
    "diagonal",
    "identity_geometry",
    "padded",
    "shrunk",
]


class Refusal(Exception):
    """The reason why operations cannot be one convolution; never leaves this library."""


@dataclass(frozen=True)
class Stage:
    """One axis of one convolution of a run, from which padding is computed for an input size.

    Attributes:
        extent: Extent of the dilated kernel.
        stride: Stride in steps of the convolution's own input.
        left: Padding before the first element, or -1 for "same" (ceil(size / stride) outputs, an odd element goes
            right).
        right: Padding after the last element, or -1 for "same".
    """

    extent: int
    stride: int
    left: int
    right: int

    def pads(self, size: int) -> tuple[int, int]:
        """Return the left and right padding for an input of ``size``."""
        if self.left >= 0:
            return self.left, self.right
        # extent - 1 - (size - 1) % stride, at least 0; written without comparisons so that sizes may be symbolic.
        total = self.extent - self.stride + -size % self.stride
        if self.extent < self.stride:
            total = sum((total - step) // self.stride + 1 for step in range(1, self.extent))
        return total // 2, total - total // 2


@dataclass(frozen=True)
class Geometry:
    """A convolution without its weights. Every tuple has one entry per spatial axis.

    Attributes:
        in_channels: Number of input channels.
        out_channels: Number of output channels.
        kernel: Kernel size.
        stride: Stride.
        dilation: Dilation.
        groups: Number of groups.
        padding: (left, right) of each axis; (0, 0) where ``stages`` determine it.
        mode: Padding mode: ``zeros``, ``reflect``, ``replicate`` or ``circular``.
        stages: For each axis the convolutions from which its padding is computed, or () where the padding is fixed;
            () if it is fixed along all axes.
        bounded: For each axis, whether there is a constant that exists only within the input map, because a later
            convolution pads it with zeros (see ``Affine.border``); () if there is none.
        bias: Whether there is a constant that does not end at the border.
        crop: (left, right) of each axis: elements of the padded input that the kernel skips; () if there are none.
        pooled: Whether all weights within a kernel are equal, so that an average pool of the input (``kernel`` and
            ``stride``) followed by a 1x1 convolution computes the same.
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
        """Extent of the dilated kernel along each axis."""
        return tuple(gap * (size - 1) + 1 for size, gap in zip(self.kernel, self.dilation, strict=True))

    @property
    def weights(self) -> int:
        """Number of weights without biases, which is the number of multiply-adds per output position."""
        taps = 1 if self.pooled else math.prod(self.kernel)
        return self.out_channels * (self.in_channels // self.groups) * taps

    @property
    def pointwise(self) -> bool:
        """Whether it maps each input position to one output position, so that it commutes with an average pool."""
        plain = not (self.stages or self.bounded or self.crop or self.pooled or any(map(any, self.padding)))
        return plain and all(size == 1 for size in (*self.kernel, *self.stride))

    @property
    def border_kernel(self) -> tuple[int, ...]:
        """Kernel size of the border term: 1 along axes where the constant does not end; () without a border term."""
        return tuple(size if inside else 1 for size, inside in zip(self.kernel, self.bounded, strict=False))

    def axis_stages(self, axis: int) -> tuple[Stage, ...]:
        """Return the stages that determine the padding of an axis; a single one where the padding is fixed."""
        if self.stages and self.stages[axis]:
            return self.stages[axis]
        outside = sum(self.crop[axis]) if self.crop else 0
        return (Stage(self.extent[axis] + outside, self.stride[axis], *self.padding[axis]),)

    def taps(self, axis: int, left: int) -> range:
        """Return the positions of the kernel's elements on a map padded by ``left``, at least the own padding."""
        start = left - self.padding[axis][0]
        return range(start, start + self.extent[axis], self.dilation[axis])

    def is_padded(self, axis: int) -> bool:
        """Whether an axis is padded at any input size."""
        return self.padding[axis] != (0, 0) or bool(self.stages and self.stages[axis])

    def pads(self, sizes: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """Return (left, right) of each axis for an input of these sizes; negative where the input is cropped."""
        pairs: list[tuple[int, int]] = []
        for axis, size in enumerate(sizes):
            if not (self.stages and self.stages[axis]):
                pairs.append(self.padding[axis])
                continue
            left = right = 0
            scale = 1
            for stage in self.stages[axis]:
                before, behind = stage.pads(size)
                left, right = left + scale * before, right + scale * behind
                size = (size + before + behind - stage.extent) // stage.stride + 1
                scale *= stage.stride
            pairs.append((left, right))
        if self.crop:
            pairs = [(left - a, right - b) for (left, right), (a, b) in zip(pairs, self.crop, strict=True)]
        return tuple(pairs)


def diagonal(channels: int, rank: int, bias: bool = True) -> Geometry:
    """Return the geometry of a norm in eval mode: one factor and one constant per channel."""
    ones = (1,) * rank
    return Geometry(channels, channels, ones, ones, ones, channels, ((0, 0),) * rank, bias=bias)


def identity_geometry(channels: int, rank: int) -> Geometry:
    """Return the geometry of an identity."""
    return diagonal(channels, rank, bias=False)


def padded(channels: int, padding: Sequence[tuple[int, int]], mode: str) -> Geometry:
    """Return the geometry of padding alone."""
    return replace(identity_geometry(channels, len(padding)), padding=tuple(padding), mode=mode)


def cropped(channels: int, crop: Sequence[tuple[int, int]]) -> Geometry:
    """Return the geometry of cropping alone."""
    return replace(identity_geometry(channels, len(crop)), crop=tuple(crop))


def center_slices(geometry: Geometry, kernel: Sequence[int]) -> tuple[slice, ...]:
    """Return for each axis which elements of a kernel are the middle part of size ``kernel``."""
    starts = [(size - kept) // 2 for size, kept in zip(geometry.kernel, kernel, strict=True)]
    return tuple(slice(start, start + kept) for start, kept in zip(starts, kernel, strict=True))


def shrunk(geometry: Geometry, kernel: Sequence[int]) -> Geometry:
    """Return the convolution with only the middle of its kernel and with outputs at the same positions.

    Args:
        geometry: A convolution without a border term.
        kernel: New kernel size, along no axis larger than the present one.
    """
    padding: list[tuple[int, int]] = []
    crop: list[tuple[int, int]] = []
    for axis, kept in enumerate(center_slices(geometry, kernel)):
        gap = geometry.dilation[axis]
        cut_left, cut_right = gap * kept.start, gap * (geometry.kernel[axis] - kept.stop)
        crop_left, crop_right = geometry.crop[axis] if geometry.crop else (0, 0)
        left, right = geometry.padding[axis]  # (0, 0) where stages determine it
        padding.append((max(left - cut_left, 0), max(right - cut_right, 0)))
        crop.append((crop_left + max(cut_left - left, 0), crop_right + max(cut_right - right, 0)))
    return replace(
        geometry,
        kernel=tuple(kernel),
        dilation=tuple(1 if size == 1 else gap for size, gap in zip(kernel, geometry.dilation, strict=True)),
        padding=tuple(padding),
        crop=tuple(crop) if any(map(any, crop)) else (),
    )
