"""Run a model only to observe it: without changing it, on inputs that fit it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nmconv.observing import eval_mode
from nmconv.recording import rng_restored

__all__ = ["state_preserved", "to_device_and_dtype"]


@contextmanager
def state_preserved(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode; on exit, restore its modes, its buffers and the RNG state."""
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    distinct = {id(value): value for _, named in buffers for value in named.values() if value is not None}
    saved = [(value, value._version, value.detach().clone()) for value in distinct.values() if not value.is_inference()]
    try:
        with rng_restored(model), eval_mode(model):
            yield
    finally:
        for module, named in buffers:
            module._buffers.clear()
            module._buffers.update(named)
        with torch.no_grad():
            for value, version, before in saved:
                if value._version != version:
                    value.copy_(before)


def to_device_and_dtype(
    images: Tensor, device_and_dtype: tuple[torch.device, torch.dtype], *, copy: bool = False
) -> Tensor:
    """Move images to a model's device, and floating-point images to its dtype.

    Args:
        images: ``[images, ...]``.
        device_and_dtype: The model's device and dtype, from :func:`nmconv.observing.device_and_dtype_of`.
        copy: Whether to copy them in any case, as some models overwrite their input.
    """
    device, dtype = device_and_dtype
    return images.to(device, dtype if images.is_floating_point() else images.dtype, copy=copy)
