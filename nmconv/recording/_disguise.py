"""Modules in disguise: whoever does more than call them sees something else, and does something else."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from torch import nn

__all__ = ["disguise"]


class Disguise(nn.Module):
    """Calls a module, and shows nothing of it: neither its class nor its settings and parameters."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.training = module.training

        def forward(*args: Any, **kwargs: Any) -> Any:
            return module(*args, **kwargs)

        self.__dict__["forward"] = forward


def disguise(model: nn.Module, names: Container[str]) -> None:
    """Put disguises in the place of some modules of a copy, wherever they are registered."""
    hidden = {id(module): Disguise(module) for name, module in model.named_modules() if name in names}
    for module in list(model.modules()):
        for slot, child in module._modules.items():
            module._modules[slot] = hidden.get(id(child), child)
