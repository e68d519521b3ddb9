"""Giving norms the statistics of what they are given after a fit, what they compute unchanged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nmconv.algebra import norm_of

__all__ = ["centre", "counts", "has_shift", "is_kept", "pass_through", "put"]


def counts(module: nn.Module) -> bool:
    """Whether it is a batch norm that is called, and keeps running statistics of its own."""
    if not isinstance(module, _BatchNorm) or type(module).__module__.startswith("nmconv."):
        return False
    return module.running_mean is not None and module.num_batches_tracked is not None


def has_shift(norm: Any) -> bool:
    """Whether it adds something that is learnt."""
    return getattr(norm, "bias", None) is not None


def is_kept(norm: Any, channels: int) -> bool:
    """Whether :func:`pass_through` can be done to it, behind a convolution of so many channels."""
    affine = all(isinstance(norm._parameters.get(name), nn.Parameter) for name in ("weight", "bias"))
    return counts(norm) and affine and norm.num_features == channels


def pass_through(norm: Any, mean: Tensor, variance: Tensor) -> bool:
    """Make a norm give what it is given in eval mode, and normalise by its batches in train mode.

    Args:
        norm: One that :func:`is_kept`.
        mean: ``[channels]``, of what it is given.
        variance: The same.

    Returns:
        False, and nothing done, where its dtype cannot hold that, or it would divide by zero.
    """
    if not bool((variance + norm.eps > 0).all()) or not _hold(norm, mean, variance):
        return False
    put(norm.running_mean, mean)
    put(norm.running_var, variance)
    put(norm.weight, (norm.running_var.double() + norm.eps).sqrt())
    put(norm.bias, norm.running_mean)
    return True


def _hold(norm: Any, mean: Tensor, variance: Tensor) -> bool:
    """Whether the norm's dtypes hold such numbers."""
    limits = [
        torch.finfo(value.dtype).max
        for value in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        if value is not None
    ]
    return bool((mean.abs() <= min(limits)).all() and (variance <= min(limits)).all())


def centre(norm: Any, mean: Tensor, variance: Tensor) -> None:
    """Give a norm the statistics of its new input, its output unchanged: training goes on where the fit left off.

    Where its dtype cannot hold them it keeps those that it has.
    """
    scale, shift = norm_of(norm, torch.float64)
    if not has_shift(norm) or not _hold(norm, mean, variance):
        return
    put(norm.running_mean, mean)
    if getattr(norm, "weight", None) is not None:
        usable = variance > 0
        variance = torch.where(usable, variance, norm.running_var.double())
        put(norm.running_var, variance)
        put(norm.weight, scale * (norm.running_var.double() + norm.eps).sqrt())
    again, _ = norm_of(norm, torch.float64)
    put(norm.bias, shift + norm.running_mean.double() * again)


def put(tensor: Tensor, value: Tensor) -> None:
    """Set a tensor's numbers."""
    with torch.no_grad():
        tensor.copy_(value.reshape(tensor.shape))
