"""Tensors inside of values, and those that modules hold."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["SIMPLE", "held_by", "own_tensors", "tensors_in", "ways_to_tensors"]

SIMPLE = frozenset((bool, int, float, complex, str, type(None), type(Ellipsis)))
_OWN = frozenset(nn.Module().__dict__) | {"forward"}


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A leaf's parameters, buffers and other tensors, those of parts of it too."""
    for part in module.modules() if module._modules else (module,):
        for space in (part._parameters, part._buffers, part.__dict__):
            for name, value in space.items():
                if isinstance(value, Tensor):
                    yield name, value


def held_by(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that the model's modules hold: in containers and plain objects too, by where it is."""
    for path, module in model.named_modules():
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            if value is not None:
                yield (f"{path}.{name}" if path else name), value
        for name, value in list(vars(module).items()):
            if name not in _OWN and type(value) not in SIMPLE:
                yield from _held_in(value, f"{path}.{name}" if path else name, set(), 4)


def _held_in(value: Any, name: str, seen: set[int], depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif depth and id(value) not in seen and type(value) not in SIMPLE and not isinstance(value, (nn.Module, type)):
        seen.add(id(value))
        parts: Mapping[Any, Any] = {}
        if isinstance(value, dict):
            parts = dict(dict.items(value))
        elif isinstance(value, (list, tuple, set, frozenset, deque)):
            parts = dict(enumerate(value))
        elif isinstance(getattr(value, "__dict__", None), dict) and not callable(value):
            parts = dict(vars(value))
        for key, part in parts.items():
            yield from _held_in(part, f"{name}.{key}", seen, depth - 1)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in the arguments of a call."""
    found: list[Tensor] = []
    todo = [value]
    while todo:
        part = todo.pop()
        if isinstance(part, Tensor):
            found.append(part)
        elif isinstance(part, (list, tuple)):
            todo += part
        elif isinstance(part, dict):
            todo += part.values()
    return found


def ways_to_tensors(value: Any, way: tuple[Any, ...] = (), depth: int = 4) -> Iterator[tuple[Tensor, tuple[Any, ...]]]:
    """The tensors in what a call returned, and how to get to each."""
    if isinstance(value, Tensor):
        yield value, way
    elif depth and isinstance(value, (list, tuple)):
        for key, part in enumerate(value):
            yield from ways_to_tensors(part, (*way, key), depth - 1)
    elif depth and isinstance(value, dict):
        for name, part in value.items():
            yield from ways_to_tensors(part, (*way, str(name)), depth - 1)
    elif depth and type(value) not in SIMPLE and isinstance(getattr(value, "__dict__", None), dict):
        for name, part in vars(value).items():
            yield from ways_to_tensors(part, (*way, name), depth - 1)
