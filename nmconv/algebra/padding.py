"""Padding tensors by any number of elements on each side."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

__all__ = ["is_known", "pad"]


def is_known(pads: Sequence[tuple[int, int]]) -> bool:
    """Return whether all are plain ints; during an export they may be symbolic, and comparing would fix the sizes."""
    return all(type(extent) is int for pair in pads for extent in pair)


def pad(input: Tensor, pads: Sequence[tuple[int, int]], mode: str) -> Tensor:
    """Pad the last axes of a tensor; return the tensor itself if there is nothing to pad.

    Args:
        input: ``[..., *sizes]``.
        pads: (left, right) of each axis; negative numbers crop.
        mode: ``zeros``, ``reflect``, ``replicate`` or ``circular``.
    """
    if is_known(pads) and not any(map(any, pads)):
        return input
    flat = [extent for pair in reversed(pads) for extent in pair]  # F.pad begins with the last axis
    if mode != "zeros" and min(flat) < 0:
        input = F.pad(input, [min(extent, 0) for extent in flat])
        flat = [max(extent, 0) for extent in flat]
    return F.pad(input, flat, mode="constant" if mode == "zeros" else mode)
