"""Tensors inside nested values and inside modules."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nmconv.copying import module_tensors

__all__ = [
    "PLAIN_TYPES",
    "Spec",
    "device_of",
    "held_tensors",
    "leaf_tensors",
    "map_tensors",
    "memory_of",
    "spec_of",
    "tensor_paths",
    "tensors_in",
]

PLAIN_TYPES = frozenset((bool, int, float, complex, str, type(None), type(Ellipsis)))
_MODULE_INTERNALS = frozenset(nn.Module().__dict__) | {"forward"}
_MAX_DEPTH = 4


@dataclass(frozen=True)
class Spec:
    """A tensor's shape and dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def spec_of(value: Tensor | Spec) -> Spec:
    """Return the shape and dtype of a tensor or of another Spec."""
    return Spec(tuple(value.shape), value.dtype)


def map_tensors(value: Any, function: Callable[[Any], Any]) -> Any:
    """Return a copy of nested tuples, lists and dicts with ``function`` applied to each tensor and :class:`Spec`."""
    if isinstance(value, (Tensor, Spec)):
        return function(value)
    if isinstance(value, tuple):
        parts = [map_tensors(part, function) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, list):
        return [map_tensors(part, function) for part in value]
    if isinstance(value, dict):
        return {key: map_tensors(part, function) for key, part in value.items()}
    return value


def memory_of(value: Tensor) -> int:
    """Return an id of the memory that a tensor views; inside a functorch transform, the id of the tensor."""
    try:
        return value.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return id(value)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter; the CPU if there is none."""
    return next((value.device for value in model.parameters()), torch.device("cpu"))


def leaf_tensors(module: nn.Module) -> list[Tensor]:
    """Return the parameters, buffers and other tensor attributes of a leaf module and of its submodules."""
    return [value for part in (module.modules() if module._modules else (module,)) for _, value in module_tensors(part)]


def held_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor that the modules hold, also in containers and plain objects, with its qualified name."""
    for path, module in model.named_modules():
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            if value is not None:
                yield (f"{path}.{name}" if path else name), value
        for name, value in list(vars(module).items()):
            if name not in _MODULE_INTERNALS and type(value) not in PLAIN_TYPES:
                yield from _held_in(value, f"{path}.{name}" if path else name, set(), _MAX_DEPTH)


def _held_in(value: Any, name: str, seen: set[int], depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif (
        depth and id(value) not in seen and type(value) not in PLAIN_TYPES and not isinstance(value, (nn.Module, type))
    ):
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
    """Return the tensors in the arguments of a call."""
    tensors: list[Tensor] = []
    todo = [value]
    while todo:
        part = todo.pop()
        if isinstance(part, Tensor):
            tensors.append(part)
        elif isinstance(part, (list, tuple)):
            todo += part
        elif isinstance(part, dict):
            todo += part.values()
    return tensors


def tensor_paths(
    value: Any, path: tuple[Any, ...] = (), depth: int = _MAX_DEPTH
) -> Iterator[tuple[Tensor, tuple[Any, ...]]]:
    """Yield the tensors in what a call returned, each with the keys and attribute names that lead to it."""
    if isinstance(value, Tensor):
        yield value, path
    elif depth and isinstance(value, (list, tuple)):
        for key, part in enumerate(value):
            yield from tensor_paths(part, (*path, key), depth - 1)
    elif depth and isinstance(value, dict):
        for name, part in value.items():
            yield from tensor_paths(part, (*path, str(name)), depth - 1)
    elif depth and type(value) not in PLAIN_TYPES and isinstance(getattr(value, "__dict__", None), dict):
        for name, part in vars(value).items():
            yield from tensor_paths(part, (*path, name), depth - 1)
