"""What a trace notes down besides its graph, and ways through nested arguments."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.fx import Node, Proxy

from nmconv.graph._exits import Lines

__all__ = [
    "ATOMS",
    "ActCall",
    "Arguments",
    "Frame",
    "UnknownTensor",
    "ancestors",
    "collect",
    "containers",
    "map_proxies",
]

# What holds nothing that could matter.
ATOMS = frozenset((bool, int, float, str, bytes, type(None), torch.Tensor, torch.dtype, torch.device, torch.Size))


class UnknownTensor(torch.Tensor):
    """Stands for a tensor argument of unknown shape."""


@dataclass(eq=False)
class Frame:
    """One call of one module's forward during a trace.

    Attributes:
        module: The module.
        path: Its qualified name, the first it is registered under.
        parent: The frame it was called from, None for the root's.
        label: What it is called in the parent: its name relative to the parent's module.
        number: Which call of that label in the parent it is, from 1.
        start: How many nodes the graph had when the call began.
        result: The node it returned, where it returned just one.
        asks: Whether its own code has asked for a number or a truth that depends on sizes, or may have been given one.
        lines: Of the parent's methods, where the call is made.
    """

    module: nn.Module
    path: str
    parent: Frame | None = None
    label: str = ""
    number: int = 0
    start: int = 0
    result: Node | None = None
    asks: bool = False
    lines: Lines = ()
    labels: Counter[str] = field(default_factory=Counter)
    acts: Counter[Any] = field(default_factory=Counter)


def ancestors(frame: Frame | None) -> Iterator[Frame]:
    """The frame, and those that it was called from, innermost first."""
    while frame is not None:
        yield frame
        frame = frame.parent


@dataclass(frozen=True)
class ActCall:
    """What identifies one activation call: see :class:`nmconv.Site`, whose attributes these are."""

    frame: Frame
    method: str
    module: nn.Module | None
    name: str
    function: str | None
    call: int
    step: int


@dataclass(frozen=True)
class Arguments:
    """The structure of a call's arguments, with tensors as proxies, placeholders' names or fake tensors."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def map_proxies(value: Any, function: Callable[[Any], Any]) -> Any:
    """A copy of nested tuples, lists and dicts with ``function`` of every tensor and proxy in it."""
    if isinstance(value, (Proxy, torch.Tensor)):
        return function(value)
    if isinstance(value, tuple):
        parts = [map_proxies(part, function) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, list):
        return [map_proxies(part, function) for part in value]
    if isinstance(value, dict):
        return type(value)((key, map_proxies(part, function)) for key, part in value.items())
    return value


def collect(value: Any, found: list[Any], seen: set[int]) -> None:
    """All proxies in a value, looking into containers and plain objects."""
    if type(value) in ATOMS:
        return
    if isinstance(value, Proxy):
        found.append(value)
    elif id(value) in seen or isinstance(value, (str, bytes, type, nn.Module, ModuleType)):
        return
    elif isinstance(value, dict):
        seen.add(id(value))
        for part in value.values():
            collect(part, found, seen)
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        seen.add(id(value))
        for part in value:
            collect(part, found, seen)
    elif hasattr(value, "__dict__"):
        seen.add(id(value))
        collect(vars(value), found, seen)


def containers(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every list and dict in a value, with a copy of it."""
    if isinstance(value, (list, dict)):
        yield value, value.copy()
    if isinstance(value, (list, tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from containers(part)
