"""Put models into eval mode temporarily."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["eval_mode"]


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Put models into eval mode; on exit, restore the mode of every module.

    A module that has replaced another one in the meantime gets the mode of the replaced one.
    """
    before = [(model, name, module, module.training) for model in models for name, module in model.named_modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for model in models:
            modes = {name: training for owner, name, _, training in before if owner is model}
            for name, module in model.named_modules():
                module.training = modes.get(name, module.training)
        for _, _, module, training in before:
            module.training = training
