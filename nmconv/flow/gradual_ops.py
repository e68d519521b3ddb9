"""What a gradual site computes besides its activation: functions of torch operations, each one node of a recording."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

__all__ = ["GRADUAL", "held", "mixed", "mixed_into"]

GRADUAL = "_nmconv_gradual"  # on a module that is one activation, mixed with its input


def held(x: Tensor, slope: Tensor, off: int) -> Tensor:
    """What the activation is given: a copy of ``x``, or ones where the slope is ``off`` and nobody reads the result.

    So an activation that is not selected has a finite derivative, and its zero gradients stay zero (0 · inf is NaN).

    Args:
        x: Any shape.
        slope: A number, ``[]``.
        off: The slope at which the activation is not selected.
    """
    if _is_watched(x, slope):
        watched: Tensor = handle_torch_function(held, (x, slope), x, slope, off)
        return watched
    return torch.where(slope.to(x.device) == off, 1.0, x)


def mixed(x: Tensor, y: Tensor, slope: Tensor) -> Tensor:
    """``y`` where the slope is 0, ``x`` where it is 1, else ``lerp(y, x, slope)``; in the dtype of ``y``.

    Both ends are selected, not computed, in the backward pass, too. The slope may be set between the two passes.

    Args:
        x: Any shape.
        y: The same shape.
        slope: A number, ``[]``.
    """
    if _is_watched(x, y, slope):
        watched: Tensor = handle_torch_function(mixed, (x, y, slope), x, y, slope)
        return watched
    slope, x = slope.to(y.device, copy=True), x.to(y.dtype)
    between = torch.lerp(y, x, slope.to(y.dtype))
    return torch.where(slope == 0, y, torch.where(slope == 1, x, between))


def mixed_into(x: Tensor, y: Tensor, slope: Tensor) -> Tensor:
    """The same, written to the memory of ``x``: an in-place activation did so, and others may read it there."""
    if _is_watched(x, y, slope):
        watched: Tensor = handle_torch_function(mixed_into, (x, y, slope), x, y, slope)
        return watched
    # copy_ would give x a gradient of zeros that is contiguous, and -0 + y is y for every y, zeros included
    made = mixed(x, y, slope)
    return x.fill_(-0.0).add_(made)


def _is_watched(*tensors: Tensor) -> bool:
    """Whether a recorder, or whoever else overrides torch's functions, is to see the call."""
    return not torch.compiler.is_compiling() and has_torch_function(tensors)
