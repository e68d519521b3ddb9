"""The memory layout of a model's convolutions: contiguous or channels last."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["channels_last", "in_memory_format", "is_channels_last"]

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by number of dimensions


def channels_last(value: Tensor) -> Tensor:
    """Return the tensor in channels-last layout if it has the 4 or 5 dimensions for it, else as it is."""
    return value.contiguous(memory_format=_CHANNELS_LAST[value.dim()]) if value.dim() in _CHANNELS_LAST else value


def is_channels_last(model: nn.Module) -> bool:
    """Return whether all convolution weights of a model whose layout is unambiguous are channels last."""
    convs = (module for module in model.modules() if isinstance(module, nn.modules.conv._ConvNd))
    layouts = set()
    for weight in (value for conv in convs for value in conv.parameters() if value.dim() in _CHANNELS_LAST):
        is_last = weight.is_contiguous(memory_format=_CHANNELS_LAST[weight.dim()])
        if is_last != weight.is_contiguous():  # a 1x1 kernel is both
            layouts.add(is_last)
    return layouts == {True}


def in_memory_format(module: nn.Module, last: bool) -> nn.Module:
    """Return the convolution with its weight channels last if ``last``; some backends would convert it in each call."""
    if last:
        weight: Any = module.weight
        weight.data = channels_last(weight.data)
    return module
