"""Keep meta tensors out of the caches of the user's code: globals, class attributes and cached functions."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

from nmconv.copying import closure_contents, parts_of
from nmconv.recording.function_code import unwrapped

__all__ = ["caches_restored"]

_CONTAINERS = (dict, list, set, deque)
_CACHED: Any = type(cache(len))
_SKIPPED = ("torch.", "nmconv.")  # modules without caches of the user's code
_MAX_DEPTH = 3


@contextmanager
def caches_restored(model: nn.Module) -> Iterator[None]:
    """Undo, at the end of the block, what put meta tensors into caches that the model's code can reach.

    A forward may keep what it computes in a global dict, a class attribute or an ``lru_cache``. In a recording, that
    is a meta tensor, on which the next call, even one of the user's own model, would compute.

    Args:
        model: The model whose code runs in the block, or a copy of it.
    """
    caches = _Caches()
    for cls in {type(module) for module in model.modules()}:
        caches.add_class(cls)
    try:
        yield
    finally:
        caches.restore()


@dataclass
class _Caches:
    """What the functions of a model can name: variables, containers and functions with a cache, as they are now."""

    variables: list[tuple[Any, str, Any]] = field(default_factory=list)  # a namespace, a name in it, and its value
    containers: list[tuple[Any, Any]] = field(default_factory=list)  # a container and its shallow copy
    functions: list[Any] = field(default_factory=list)  # those with an ``lru_cache``
    _seen: set[int] = field(default_factory=set)

    def add_class(self, cls: type) -> None:
        for base in cls.__mro__:
            if base is not object and not f"{base.__module__}.".startswith(_SKIPPED):
                for name, value in list(vars(base).items()):
                    self._add_variable(base, name, value)

    def restore(self) -> None:
        for space, name, value in self.variables:
            now = (vars(space) if isinstance(space, type) else space).get(name)
            if now is value or not _holds_meta(now):
                continue
            if isinstance(space, type):
                setattr(space, name, value)
            else:
                space[name] = value
        for container, before in self.containers:
            _restore(container, before)
        for function in self.functions:
            if any(map(_holds_meta, gc.get_referents(function))):
                function.cache_clear()

    def _add_variable(self, space: Any, name: str, value: Any) -> None:
        self.variables.append((space, name, value))
        self._add(value)

    def _add(self, value: Any, depth: int = _MAX_DEPTH) -> None:
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, _CONTAINERS):
            self.containers.append((value, value.copy()))
            for part in parts_of(value) if depth else ():
                if isinstance(part, _CONTAINERS):
                    self._add(part, depth - 1)
        elif isinstance(value, _CACHED):
            self.functions.append(value)
            self._add(value.__wrapped__)
        elif isinstance(value, (FunctionType, staticmethod, classmethod, property)):
            value = value.fget if isinstance(value, property) else value
            for function in unwrapped(getattr(value, "__func__", value)):
                if isinstance(function, FunctionType):
                    self._add_function(function)

    def _add_function(self, function: FunctionType) -> None:
        if f"{function.__module__}.".startswith(_SKIPPED):
            return
        names = _names_in(function.__code__)
        for name in names & function.__globals__.keys():
            value = function.__globals__[name]
            self._add_variable(function.__globals__, name, value)
            if isinstance(value, ModuleType) and not f"{value.__name__}.".startswith(_SKIPPED):
                for inner in names & vars(value).keys():
                    self._add_variable(vars(value), inner, vars(value)[inner])
        for value in closure_contents(function):
            self._add(value)


def _names_in(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names_in, inner))


def _restore(container: Any, before: Any) -> None:
    """Put a container's former contents in the place of new ones that hold meta tensors."""
    if isinstance(container, dict):
        for key, value in list(container.items()):  # other threads may write to it
            if value is before.get(key) or not _holds_meta(value):
                continue
            if key in before:
                container[key] = before[key]
            else:
                del container[key]
    elif any(_holds_meta(value) and not any(value is old for old in before) for value in container):
        container.clear()
        container.update(before) if isinstance(container, set) else container.extend(before)


def _holds_meta(value: Any, depth: int = _MAX_DEPTH) -> bool:
    if isinstance(value, Tensor):
        return value.is_meta
    if depth and isinstance(value, (tuple, *_CONTAINERS)):
        return any(_holds_meta(part, depth - 1) for part in parts_of(value))
    return False
