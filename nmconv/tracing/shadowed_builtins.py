"""Copies of functions whose ``isinstance``, ``type`` and ``math`` know what proxies stand for; nothing is patched."""

from __future__ import annotations

import builtins
import functools
import math
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch

from nmconv.tracing.proxies import AttributeProxy, TensorProxy

__all__ = ["ShadowedBuiltins"]


class ShadowedBuiltins:
    """Makes the copies, one of each function.

    A forward that asks whether its input is a tensor would take the wrong branch without a word. Python code alone sees
    other builtins: torch's C++ asks on its own, and must not be lied to. Functions that the copied ones name are copied
    as well, those of torch are not.
    """

    def __init__(self) -> None:
        self._spaces: dict[int, dict[str, Any]] = {}
        self._made: dict[FunctionType, FunctionType] = {}

    def of(self, function: FunctionType) -> FunctionType:
        """The function's copy, or itself if it is torch's."""
        if (function.__module__ or "").partition(".")[0] == "torch":
            return function
        if function not in self._made:
            space = self._space(function.__globals__)
            given = function.__code__, space, function.__name__, function.__defaults__, function.__closure__
            copy = self._made[function] = FunctionType(*given)
            copy.__kwdefaults__, copy.__dict__ = function.__kwdefaults__, function.__dict__
            copy.__qualname__, copy.__module__ = function.__qualname__, function.__module__
            for name in _names_in(function.__code__):
                if name in function.__globals__:
                    space[name] = self.in_place_of(function.__globals__[name])
        return self._made[function]

    def in_place_of(self, value: Any) -> Any:
        """What a copy finds where the function finds ``value``."""
        if type(value) is FunctionType:
            return self.of(value)
        if value is math or (type(value) is BuiltinFunctionType and value.__module__ == "math"):
            return _counts[value]
        if type(value) is ModuleType and value.__name__.partition(".")[0] != "torch":
            return _Module(value, self)
        return value

    def _space(self, found: dict[str, Any]) -> dict[str, Any]:
        if id(found) not in self._spaces:
            self._spaces[id(found)] = {**found, "__builtins__": _BUILTINS}
        return self._spaces[id(found)]


class _Module:
    """A module of which functions are copies."""

    def __init__(self, module: ModuleType, shadows: ShadowedBuiltins) -> None:
        self._module = module
        self._shadows = shadows

    def __getattr__(self, name: str) -> Any:
        return self._shadows.in_place_of(getattr(self._module, name))


def _names_in(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names_in, inner))


def _counting(function: Any) -> Any:
    """A function of math's that is put into the graph where it is given a number computed from shapes."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        proxy = next((value for value in args if type(value) is TensorProxy), None)
        return function(*args) if proxy is None else proxy.tracer.create_proxy("call_function", function, args, {})

    return call


_counts: dict[Any, Any] = {
    value: _counting(value) for value in vars(math).values() if type(value) is BuiltinFunctionType
}
_counts[math] = SimpleNamespace(
    **{name: _counts.get(value, value) for name, value in vars(math).items() if name[0] != "_"}
)


def _stands_for(value: Any) -> type:
    """The class a proxy stands for: a tensor, or a number."""
    if value.node in value.tracer.known:
        return type(value.tracer.value_of(value.node))
    return int if value.tracer.is_number(value.node) else torch.Tensor


def _isinstance(value: Any, classes: Any) -> bool:
    if builtins.type(value) is TensorProxy:
        return builtins.issubclass(_stands_for(value), _real(classes))
    return builtins.isinstance(value, _real(classes))


def _hasattr(value: Any, name: str) -> bool:
    return builtins.hasattr(_stands_for(value) if builtins.type(value) is TensorProxy else value, name)


def _callable(value: Any) -> bool:
    return builtins.type(value) not in (TensorProxy, AttributeProxy) and builtins.callable(value)


def _real(classes: Any) -> Any:
    """Classes as ``isinstance`` takes them, with our ``type`` put back to Python's."""
    if builtins.isinstance(classes, tuple):
        return tuple(map(_real, classes))
    return builtins.type if classes is _Type else classes


class _Asking(builtins.type):
    """What makes ``_Type`` do as ``type`` does."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and builtins.type(args[0]) is TensorProxy:
            return _stands_for(args[0])
        return builtins.type(*args, **kwargs)

    def __getattr__(cls, name: str) -> Any:
        return getattr(builtins.type, name)


class _Type(metaclass=_Asking):
    """``type``, which knows what proxies stand for."""


_BUILTINS = {
    **vars(builtins),
    "isinstance": _isinstance,
    "issubclass": lambda value, classes: builtins.issubclass(value, _real(classes)),
    "hasattr": _hasattr,
    "callable": _callable,
    "type": _Type,
}
