"""Who holds which module: in slots of its own, or in plain lists and dicts that nobody can swap it in."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

__all__ = ["Holders"]


class Holders:
    """An index of a model's modules by where they are kept."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._counts: Counter[int] = Counter()
        self._kept: set[int] = set()
        for module in model.modules():
            self._counts.update(id(child) for child in module._modules.values() if child is not None)
            for name, value in module.__dict__.items():
                if name != "_modules":
                    self._look_into(value, 2)

    def _look_into(self, value: Any, depth: int) -> None:
        if isinstance(value, nn.Module):
            self._kept.add(id(value))
        elif depth and isinstance(value, (list, tuple, set, dict)):
            for part in value.values() if isinstance(value, dict) else value:
                self._look_into(part, depth - 1)

    def count(self, module: nn.Module) -> int:
        """In how many slots of the model the module is registered."""
        return self._counts[id(module)]

    def slots(self, path: str, module: nn.Module) -> int:
        """In how many slots of the module at ``path`` it is registered."""
        return sum(child is module for child in self._model.get_submodule(path)._modules.values())

    def is_kept_elsewhere(self, module: nn.Module) -> bool:
        """Whether an attribute holds the module without registering it, alone or in a container."""
        return id(module) in self._kept
