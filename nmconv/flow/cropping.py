"""Cropping calls: slices that remove the border of a map along its spatial axes, by constant amounts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["Crop", "crop_of_call"]

Crop = tuple[tuple[int, int], ...]  # (left, right) of each spatial axis


def crop_of_call(label: str, args: Sequence[Any], shape: Sequence[int]) -> Crop | None:
    """Return what a call crops from each spatial axis of its input, or None if it does anything else.

    Args:
        label: The name of the function: ``getitem``, ``narrow``, or another.
        args: Its arguments.
        shape: The input's shape: batch, channels, spatial extents.
    """
    slices = _slices(label, args, shape)
    if slices is None or len(slices) > len(shape) or not all(map(_is_constant_slice, slices)):
        return None
    crops = [_crop(part, size) for part, size in zip(slices, shape, strict=False)]
    crops += [(0, 0)] * (len(shape) - len(crops))
    if len(shape) < 3 or any(map(any, crops[:2])) or not any(map(any, crops)):
        return None
    return tuple(crops[2:])


def _slices(label: str, args: Sequence[Any], shape: Sequence[int]) -> list[Any] | None:
    """Return a slice for each of the first axes, or None if the call does not slice; other indices stay."""
    slices: list[Any]
    if label == "getitem" and len(args) == 2:
        slices = list(args[1]) if isinstance(args[1], tuple) else [args[1]]
    elif label == "narrow" and len(args) == 4 and all(type(part) is int for part in args[1:]):
        _, axis, start, length = args
        slices = [slice(None)] * len(shape)
        slices[axis] = slice(start % shape[axis], start % shape[axis] + length)
    else:
        return None
    ellipses = [axis for axis, part in enumerate(slices) if part is Ellipsis]
    if len(ellipses) == 1:
        slices[ellipses[0] : ellipses[0] + 1] = [slice(None)] * (len(shape) - len(slices) + 1)
    return slices


def _is_constant_slice(part: Any) -> bool:
    if not isinstance(part, slice):
        return False
    bounds = all(bound is None or type(bound) is int for bound in (part.start, part.stop, part.step))
    return bounds and part.step in (None, 1)


def _crop(part: slice, size: int) -> tuple[int, int]:
    start, stop, _ = part.indices(size)
    return start, size - max(start, stop)
