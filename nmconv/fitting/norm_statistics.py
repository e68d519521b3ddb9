"""Change statistics and parameters of norms after a fit, so that the output in eval mode stays the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nmconv.algebra import scale_and_shift_of

__all__ = ["assign", "can_be_identity", "has_bias", "has_running_statistics", "make_identity", "set_input_statistics"]


def has_running_statistics(module: nn.Module) -> bool:
    """Return whether a module is a batch norm that is called and has running statistics of its own."""
    if not isinstance(module, _BatchNorm) or type(module).__module__.startswith("nmconv."):
        return False
    return module.running_mean is not None and module.num_batches_tracked is not None


def has_bias(norm: Any) -> bool:
    """Return whether a norm adds a learned bias."""
    return getattr(norm, "bias", None) is not None


def can_be_identity(norm: Any, channels: int) -> bool:
    """Return whether :func:`make_identity` applies to a norm after a convolution with ``channels`` outputs."""
    affine = all(isinstance(norm._parameters.get(name), nn.Parameter) for name in ("weight", "bias"))
    return has_running_statistics(norm) and affine and norm.num_features == channels


def make_identity(norm: Any, mean: Tensor, variance: Tensor) -> bool:
    """Make a norm the identity in eval mode; in train mode it still normalizes by its batches.

    Args:
        norm: A norm for which :func:`can_be_identity` holds.
        mean: Mean of its input, ``[channels]``.
        variance: Variance of its input, ``[channels]``.

    Returns:
        False, with nothing changed, if its dtype cannot represent the numbers or it would divide by zero.
    """
    if not bool((variance + norm.eps > 0).all()) or not _can_represent(norm, mean, variance):
        return False
    assign(norm.running_mean, mean)
    assign(norm.running_var, variance)
    assign(norm.weight, (norm.running_var.double() + norm.eps).sqrt())
    assign(norm.bias, norm.running_mean)
    return True


def set_input_statistics(norm: Any, mean: Tensor, variance: Tensor) -> None:
    """Set a norm's running statistics to those of its new input, its output unchanged.

    Training then continues where the fit left off. If the norm's dtype cannot represent the statistics, it keeps its
    own.

    Args:
        norm: The norm.
        mean: Mean of its new input, ``[channels]``.
        variance: Variance of its new input, ``[channels]``.
    """
    scale, shift = scale_and_shift_of(norm, torch.float64)
    if not has_bias(norm) or not _can_represent(norm, mean, variance):
        return
    assign(norm.running_mean, mean)
    if getattr(norm, "weight", None) is not None:
        variance = torch.where(variance > 0, variance, norm.running_var.double())
        assign(norm.running_var, variance)
        assign(norm.weight, scale * (norm.running_var.double() + norm.eps).sqrt())
    new_scale, _ = scale_and_shift_of(norm, torch.float64)
    assign(norm.bias, shift + norm.running_mean.double() * new_scale)


def _can_represent(norm: Any, mean: Tensor, variance: Tensor) -> bool:
    values = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    limit = min(torch.finfo(value.dtype).max for value in values if value is not None)
    return bool((mean.abs() <= limit).all() and (variance <= limit).all())


def assign(tensor: Tensor, value: Tensor) -> None:
    """Copy values into a tensor, reshaped to its shape."""
    with torch.no_grad():
        tensor.copy_(value.reshape(tensor.shape))
