"""The arguments of a call, and ways through nested ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["ATOMS", "Arguments", "UnknownNumber", "UnknownTensor", "containers", "map_given"]

# What holds nothing that could matter.
ATOMS = frozenset((bool, int, float, str, bytes, type(None), torch.Tensor, torch.dtype, torch.device, torch.Size))


class UnknownTensor(torch.Tensor):
    """Stands for a tensor argument of unknown shape."""


class UnknownNumber:
    """Stands for a number that differs from call to call."""


@dataclass(frozen=True)
class Arguments:
    """The structure of a call's arguments, with tensors as proxies, specs or unknown ones."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def map_given(value: Any, function: Callable[[Any], Any]) -> Any:
    """A copy of nested tuples, lists and dicts with ``function`` of every tensor and number in it."""
    if isinstance(value, (torch.Tensor, UnknownNumber)) or type(value) in (int, float):
        return function(value)
    if isinstance(value, tuple):
        parts = [map_given(part, function) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, list):
        return [map_given(part, function) for part in value]
    if isinstance(value, dict):
        return type(value)((key, map_given(part, function)) for key, part in value.items())
    return value


def containers(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every list and dict in a value, with a copy of it."""
    if isinstance(value, (list, dict)):
        yield value, value.copy()
    if isinstance(value, (list, tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from containers(part)
