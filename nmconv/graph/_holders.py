"""Who holds which module: in slots of its own, or in plain lists and dicts that nobody can swap it in."""

from __future__ import annotations

import functools
from collections import Counter, deque
from collections.abc import Iterable
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from nmconv.graph._records import ATOMS

__all__ = ["OWN", "Holders"]

OWN = frozenset(nn.Module().__dict__)  # what every module has: children, tensors and hooks


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return dict.values(value)
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return value
    if isinstance(value, functools.partial):
        return (value.func, value.args, value.keywords)
    if isinstance(value, MethodType):
        return (value.__self__,)
    if isinstance(value, (type, FunctionType, torch.Tensor, ModuleType)):
        return ()
    held = getattr(value, "__dict__", None)
    return held.values() if isinstance(held, dict) else ()


class Holders:
    """An index of a model's modules by where they are kept."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._counts: Counter[int] = Counter()
        self._kept: set[int] = set()
        for module in model.modules():
            self._counts.update(id(child) for child in module._modules.values() if child is not None)
            for name, value in module.__dict__.items():
                if name not in OWN:
                    self._look_into(value)

    def _look_into(self, value: Any) -> None:
        """Through containers and plain objects, however deep."""
        seen: set[int] = set()
        todo = [value]
        while todo:
            value = todo.pop()
            if isinstance(value, nn.Module):
                self._kept.add(id(value))
            elif type(value) not in ATOMS and id(value) not in seen:
                seen.add(id(value))
                todo += _parts(value)

    def count(self, module: nn.Module) -> int:
        """In how many slots of the model the module is registered."""
        return self._counts[id(module)]

    def slots(self, path: str, module: nn.Module) -> int:
        """In how many slots of the module at ``path`` it is registered."""
        return sum(child is module for child in self._model.get_submodule(path)._modules.values())

    def is_kept_elsewhere(self, module: nn.Module) -> bool:
        """Whether an attribute holds the module without registering it, alone or in a container."""
        return id(module) in self._kept
