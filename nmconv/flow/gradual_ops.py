"""What a gradual site computes besides its activation: functions of tensors, each one node of a recording."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

__all__ = ["GRADUAL", "held", "mixed", "mixed_into"]

GRADUAL = "_nmconv_gradual"  # attribute of a module that is one activation, mixed with its input


def held(x: Tensor, slope: Tensor, off: int) -> Tensor:
    """Return the activation's input: a copy of ``x``, or ones if the slope is ``off``.

    So an activation whose output is not selected has a finite derivative, and its zero gradient stays zero (0 · inf is
    NaN).

    Args:
        x: Any shape.
        slope: A scalar, ``[]``.
        off: The slope at which the activation's output is not selected.
    """
    if _is_overridden(x, slope):
        overridden: Tensor = handle_torch_function(held, (x, slope), x, slope, off)
        return overridden
    return torch.where(slope.to(x.device) == off, 1.0, x)


def mixed(x: Tensor, y: Tensor, slope: Tensor) -> Tensor:
    """Return ``y`` if the slope is 0, ``x`` if it is 1, else ``lerp(y, x, slope)``; in the dtype of ``y``.

    Both ends are selected rather than computed, in the backward pass, too. The slope may change between the two passes.

    Args:
        x: Any shape.
        y: The same shape.
        slope: A scalar, ``[]``.
    """
    if _is_overridden(x, y, slope):
        overridden: Tensor = handle_torch_function(mixed, (x, y, slope), x, y, slope)
        return overridden
    slope, x = slope.to(y.device, copy=True), x.to(y.dtype)
    between = torch.lerp(y, x, slope.to(y.dtype))
    return torch.where(slope == 0, y, torch.where(slope == 1, x, between))


def mixed_into(x: Tensor, y: Tensor, slope: Tensor) -> Tensor:
    """Do the same as :func:`mixed`, in the memory of ``x``: for in-place activations, whose input others may read."""
    if _is_overridden(x, y, slope):
        overridden: Tensor = handle_torch_function(mixed_into, (x, y, slope), x, y, slope)
        return overridden
    # not copy_, which would give x a contiguous gradient of zeros; and -0 + y is y for every y, zeros included
    result = mixed(x, y, slope)
    return x.fill_(-0.0).add_(result)


def _is_overridden(*tensors: Tensor) -> bool:
    """Return whether a recorder, or any other override of torch's functions, must see the call."""
    return not torch.compiler.is_compiling() and has_torch_function(tensors)
