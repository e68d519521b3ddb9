"""A model that is looked at: in eval mode meanwhile, and afterwards as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from nmconv.fitting import eval_mode
from nmconv.recording import rng_restored

__all__ = ["untouched"]


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put back modes, buffers and random states on the way out, whatever happens in between."""
    held = [(module, dict(module._buffers)) for module in model.modules()]
    before = [
        (value, value._version, value.detach().clone())
        for value in {
            id(value): value for _, buffers in held for value in buffers.values() if value is not None
        }.values()
        if not value.is_inference()
    ]
    try:
        with rng_restored(model), eval_mode(model):
            yield
    finally:
        for module, buffers in held:
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            for value, version, had in before:
                if value._version != version:
                    value.copy_(had)
