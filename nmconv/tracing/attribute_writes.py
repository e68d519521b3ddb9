"""Detecting the attributes that a forward has written to."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

__all__ = ["AttributeSnapshot"]

_TENSORS_AND_MODULES = ("_parameters", "_buffers", "_modules")
# The attributes that nn.Module keeps for itself and no forward writes to.
_INTERNAL = frozenset(key for key in nn.Module().__dict__ if key not in _TENSORS_AND_MODULES)
# Types whose values hold no references to anything mutable.
_ATOMS = frozenset((bool, int, float, str, bytes, type(None), torch.Tensor, nn.Parameter, torch.dtype, torch.device))
_MAX_DEPTH = 3


class AttributeSnapshot:
    """The objects that a module's attributes hold now, in nested containers and plain objects, too.

    Args:
        module: The module, with all its submodules.
    """

    def __init__(self, module: nn.Module) -> None:
        self._entries: list[tuple[Any, Any, str]] = []  # a container, a copy of its contents, and where it is
        self._seen: set[int] = set()
        for part in module.modules():
            where = f"{type(part).__name__}."
            attributes = part.__dict__
            self._entries.append((attributes, dict(attributes), where))
            for key, value in attributes.items():
                if key in _TENSORS_AND_MODULES:
                    self._entries.append((value, dict(value), where))
                elif key not in _INTERNAL and not _is_immutable(value):
                    self._add(value, where, _MAX_DEPTH)

    def changed(self) -> list[str]:
        """Return ``Class.attribute`` for everything that no longer holds the same objects."""
        changed = []
        for container, before, where in self._entries:
            if not _holds_same(container, before):
                names = [""]
                if isinstance(before, dict):
                    keys = {**before, **container}
                    names = [key for key in keys if before.get(key, before) is not container.get(key, before)]
                changed += [f"{where}{name}" for name in names]
        return changed

    def _add(self, value: Any, where: str, depth: int) -> None:
        if type(value) in _ATOMS or id(value) in self._seen or isinstance(value, (type, torch.Tensor, nn.Module)):
            return
        if isinstance(value, (dict, list, set, deque)):
            self._seen.add(id(value))
            # by the base class's methods, since a subclass may forbid or change its own
            contents: Any = dict(dict.items(value)) if isinstance(value, dict) else list(_items(value))
            self._entries.append((value, contents, where))
        elif isinstance(getattr(value, "__dict__", None), dict) and type(value).__module__ != "builtins":
            self._add(vars(value), where, depth)
            return
        elif not isinstance(value, tuple):
            return
        if depth:
            for item in dict.values(value) if isinstance(value, dict) else _items(value):
                self._add(item, where, depth - 1)


def _is_immutable(value: Any) -> bool:
    kind = type(value)
    return kind in _ATOMS or (kind is tuple and all(type(part) in _ATOMS for part in value))


def _items(value: Any) -> Iterator[Any]:
    base: Any = next(kind for kind in (list, set, deque, tuple) if isinstance(value, kind))
    return iter(base.__iter__(value))


def _holds_same(container: Any, before: Any) -> bool:
    """Return whether a container still holds the same objects; by identity, since they may be tensors."""
    if isinstance(before, dict):
        if (  # the usual case, entirely in C
            len(container) == len(before)
            and all(map(operator.is_, dict.values(container), before.values()))
            and all(map(operator.is_, dict.keys(container), before))
        ):
            return True
        items = dict.items(container)
        return len(items) == len(before) and all(key in before and before[key] is value for key, value in items)
    items_now = list(_items(container))
    if isinstance(container, set):
        return {id(item) for item in items_now} == {id(item) for item in before}
    return len(items_now) == len(before) and all(map(operator.is_, items_now, before))
