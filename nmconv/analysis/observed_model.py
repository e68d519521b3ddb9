"""Run a model without changing it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from nmconv.observing import eval_mode
from nmconv.recording import rng_restored

__all__ = ["state_preserved"]


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
