"""Closures of a copied model: ``copy.deepcopy`` shares functions, and with them what they close over."""

from __future__ import annotations

import copy
import functools
from collections import deque
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from nmconv.copying.held_objects import is_filled, is_opaque, parts_of
from nmconv.copying.tensor_copies import ClonedTensors

__all__ = ["rebind_closures"]


def rebind_closures(model_copy: nn.Module, tensors: ClonedTensors) -> None:
    """Give the functions that a copy holds new closures over copies of what they closed over.

    Args:
        model_copy: The copy, changed in place.
        tensors: The mode, with its memo, under which the copy was made.
    """
    rebinder = _ClosureRebinder(tensors)
    for module in model_copy.modules():
        for key, value in list(vars(module).items()):
            vars(module)[key] = rebinder.rebind(value)


class _ClosureRebinder:
    """Replaces functions by rebound ones, in place in the containers and objects that hold them."""

    def __init__(self, tensors: ClonedTensors) -> None:
        self._tensors = tensors
        self._results: dict[int, Any] = {}
        self._alive: list[Any] = []  # what the ids in _results belong to

    def rebind(self, value: Any) -> Any:
        """Return the value, or what replaces it."""
        if is_opaque(value):
            return value
        if id(value) in self._results:
            return self._results[id(value)]
        self._results[id(value)] = value
        self._alive.append(value)
        if isinstance(value, FunctionType):
            return self._rebind_function(value)
        if isinstance(value, dict):
            for key, part in list(dict.items(value)):
                dict.__setitem__(value, key, self.rebind(part))
        elif isinstance(value, list):
            value[:] = map(self.rebind, value)
        elif type(value) is tuple:
            parts = tuple(map(self.rebind, value))
            if any(new is not old for new, old in zip(parts, value, strict=True)):
                self._results[id(value)] = parts
        elif isinstance(value, functools.partial):
            self._results[id(value)] = functools.partial(self.rebind(value.func), *value.args, **value.keywords)
        elif isinstance(getattr(value, "__dict__", None), dict) and not isinstance(value, MethodType):
            for key, part in list(vars(value).items()):
                vars(value)[key] = self.rebind(part)
        return self._results[id(value)]

    def _rebind_function(self, function: FunctionType) -> FunctionType:
        cells = function.__closure__ or ()
        if not any(is_filled(cell) and _may_reach_model(cell.cell_contents) for cell in cells):
            return function
        closure = tuple(CellType() for _ in cells)
        new = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, closure)
        new.__kwdefaults__ = function.__kwdefaults__
        new.__dict__.update(vars(function))
        self._results[id(function)] = new
        for old_cell, new_cell in zip(cells, closure, strict=True):
            if is_filled(old_cell):
                with self._tensors:
                    contents = copy.deepcopy(old_cell.cell_contents, self._tensors.memo)
                new_cell.cell_contents = self.rebind(contents)
        return new


def _may_reach_model(value: Any, depth: int = 3) -> bool:
    """Return whether a module, a tensor or a mutable container can be reached from the value."""
    if isinstance(value, (torch.Tensor, nn.Module, list, dict, set, deque)):
        return True
    if is_opaque(value) or not depth:
        return False
    return any(_may_reach_model(part, depth - 1) for part in parts_of(value))
