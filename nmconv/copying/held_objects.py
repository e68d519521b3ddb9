"""The tensors and objects that a model holds."""

from __future__ import annotations

import copy
import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

__all__ = [
    "MODULE_INTERNALS",
    "closure_contents",
    "held_objects",
    "is_filled",
    "is_opaque",
    "is_uncopyable",
    "module_tensors",
    "parts_of",
    "tensor_names",
    "tensors_and_modules",
    "uncopyable_objects",
]

# Attributes that nn.Module itself has, other than the hooks, which may hold anything.
MODULE_INTERNALS = frozenset(nn.Module().__dict__) - {"_forward_hooks", "_forward_pre_hooks"}
_ATOMS = frozenset(
    (bool, int, float, complex, str, bytes, type(None), type, ModuleType, CodeType, BuiltinFunctionType, torch.Tensor,
     nn.Parameter, torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format)
)  # fmt: skip
_CONTAINERS = (dict, list, tuple, set, frozenset, deque, FunctionType, MethodType, functools.partial)


def module_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a module's own parameters, buffers and other tensor attributes with their names."""
    for namespace in (module._parameters, module._buffers, vars(module)):
        for name, value in namespace.items():
            if isinstance(value, torch.Tensor):
                yield name, value


def tensor_names(model: nn.Module) -> dict[int, str]:
    """Return the first qualified name of each parameter, buffer and other tensor attribute, by the tensor's id."""
    names: dict[int, str] = {}
    for path, module in model.named_modules():
        for name, value in module_tensors(module):
            names.setdefault(id(value), f"{path}.{name}" if path else name)
    return names


def tensors_and_modules(model: nn.Module) -> dict[int, Any]:
    """Return a model's modules and their tensors by id."""
    return {
        id(value): value for module in model.modules() for value in (module, *dict(module_tensors(module)).values())
    }


def held_objects(model: nn.Module) -> Iterator[Any]:
    """Yield all objects that the modules' attributes hold, at any depth, without looking into tensors and modules."""
    seen: set[int] = set()
    todo: list[Any] = [
        value
        for module in model.modules()
        for name, value in vars(module).items()
        if name not in MODULE_INTERNALS and type(value) not in _ATOMS
    ]
    while todo:
        value = todo.pop()
        if type(value) in _ATOMS or id(value) in seen or is_opaque(value):
            continue
        seen.add(id(value))
        yield value
        todo += parts_of(value)


def is_opaque(value: Any) -> bool:
    """Return whether a search for held objects stops at this value: plain values, tensors, modules and classes."""
    return type(value) in _ATOMS or isinstance(value, (torch.Tensor, nn.Module, type))


def parts_of(value: Any) -> Iterable[Any]:
    """Return the objects that a deep copy of a value copies with it, and the contents of closures."""
    if isinstance(value, dict):
        return (*dict.keys(value), *dict.values(value))
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return tuple(value)
    if isinstance(value, functools.partial):
        return (value.func, value.args, value.keywords, vars(value))
    if isinstance(value, MethodType):
        return (value.__self__, value.__func__)
    if isinstance(value, FunctionType):
        return closure_contents(value)
    attributes = getattr(value, "__dict__", None)
    return tuple(attributes.values()) if isinstance(attributes, dict) else ()


def closure_contents(function: Any) -> list[Any]:
    """Return the contents of a function's closure, without cells that are still empty."""
    return [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if is_filled(cell)]


def is_filled(cell: CellType) -> bool:
    """Return whether a closure's cell has been assigned."""
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def uncopyable_objects(model: nn.Module) -> list[Any]:
    """Return the held objects that cannot be copied, such as locks and open files."""
    memo = tensors_and_modules(model)
    return [value for value in held_objects(model) if is_uncopyable(value, memo)]


def is_uncopyable(value: Any, memo: dict[int, Any]) -> bool:
    """Return whether copying an object raises, or would share an open file.

    Args:
        value: The object.
        memo: Objects that a trial copy shares, by id.
    """
    if isinstance(value, _CONTAINERS):
        return False
    if hasattr(type(value), "__deepcopy__"):
        return _raises(lambda: copy.deepcopy(value, dict(memo)), Exception)  # its class may raise anything
    has_default_reduce = "__reduce_ex__" not in {name for base in type(value).__mro__[:-1] for name in vars(base)}
    if has_default_reduce and isinstance(getattr(value, "__dict__", None), dict):
        return hasattr(value, "fileno")
    return _raises(lambda: value.__reduce_ex__(4), TypeError)  # as locks, files and sockets do


def _raises(call: Callable[[], object], error: type[Exception]) -> bool:
    try:
        call()
    except error:
        return True
    return False
