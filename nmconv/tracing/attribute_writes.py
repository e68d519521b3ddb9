"""What a forward has stored in attributes meanwhile."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

__all__ = ["AttributeSnapshot"]

_Snapshot = list[tuple[Any, Any, str]]  # a container, what it held, and where it is

# What nn.Module keeps for itself and no forward touches, and what holds nothing that could change.
_INTERNAL = frozenset(key for key in nn.Module().__dict__ if key not in ("_parameters", "_buffers", "_modules"))
_ATOMS = frozenset((bool, int, float, str, bytes, type(None), torch.Tensor, nn.Parameter, torch.dtype, torch.device))


class AttributeSnapshot:
    """What a module's attributes hold now.

    Args:
        module: With all of its parts.
    """

    def __init__(self, module: nn.Module) -> None:
        self._before = _snapshot(module)

    def changed(self) -> list[str]:
        """``Class.attribute`` for everything that does not hold the very objects it held."""
        return _changed(self._before)


def _snapshot(model: nn.Module) -> _Snapshot:
    """Everything that attributes of the model's modules hold: dicts, lists, sets, queues and plain objects in them."""
    found: _Snapshot = []
    seen: set[int] = set()
    for module in model.modules():
        where = f"{type(module).__name__}."
        space = module.__dict__
        found.append((space, dict(space), where))
        for key, value in space.items():
            if key in ("_parameters", "_buffers", "_modules"):
                found.append((value, dict(value), where))
            elif key not in _INTERNAL and not _holds_nothing(value):
                _note(value, where, found, seen, 3)
    return found


def _holds_nothing(value: Any) -> bool:
    kind = type(value)
    return kind in _ATOMS or (kind is tuple and all(type(part) in _ATOMS for part in value))


def _note(value: Any, where: str, found: _Snapshot, seen: set[int], depth: int) -> None:
    if type(value) in _ATOMS or id(value) in seen or isinstance(value, (type, torch.Tensor, nn.Module)):
        return
    if isinstance(value, (dict, list, set, deque)):
        seen.add(id(value))
        # by the base class's own methods: subclasses may forbid, or do something else
        held: Any = dict(dict.items(value)) if isinstance(value, dict) else list(_parts(value))
        found.append((value, held, where))
    elif isinstance(getattr(value, "__dict__", None), dict) and type(value).__module__ != "builtins":
        _note(vars(value), where, found, seen, depth)
        return
    elif not isinstance(value, tuple):
        return
    if depth:
        for part in dict.values(value) if isinstance(value, dict) else _parts(value):
            _note(part, where, found, seen, depth - 1)


def _parts(value: Any) -> Iterator[Any]:
    base: Any = next(kind for kind in (list, set, deque, tuple) if isinstance(value, kind))
    return iter(base.__iter__(value))


def _changed(before: _Snapshot) -> list[str]:
    """``Class.attribute`` for everything that does not hold the very objects it held."""
    changed = []
    for value, held, where in before:
        if not _same(value, held):
            names = (
                [key for key in {**held, **value} if held.get(key, held) is not value.get(key, held)]
                if (isinstance(held, dict))
                else [""]
            )
            changed += [f"{where}{name}" for name in names]
    return changed


def _same(now: Any, before: Any) -> bool:
    """Whether a container still holds the same objects (never compares the objects: they may be tensors)."""
    if isinstance(before, dict):
        if (  # nearly always, and all of it in C
            len(now) == len(before)
            and all(map(operator.is_, dict.values(now), before.values()))
            and all(map(operator.is_, dict.keys(now), before))
        ):
            return True
        items = dict.items(now)
        return len(items) == len(before) and all(key in before and before[key] is value for key, value in items)
    parts = list(_parts(now))
    if isinstance(now, set):
        return {id(part) for part in parts} == {id(part) for part in before}
    return len(parts) == len(before) and all(one is other for one, other in zip(parts, before, strict=True))
