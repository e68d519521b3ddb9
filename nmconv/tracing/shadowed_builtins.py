"""Copies of functions whose ``isinstance``, ``type`` and ``math`` understand proxies; nothing is patched."""

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
    """Copies functions, each once, with other builtins.

    A forward that checks whether its input is a tensor would silently take the wrong branch on a proxy. Only Python
    code sees the other builtins: torch's C++ code checks types itself and must see the proxy. Functions that a copied
    function names are copied as well, except torch's.
    """

    def __init__(self) -> None:
        self._globals: dict[int, dict[str, Any]] = {}  # by the id of the original globals
        self._copies: dict[FunctionType, FunctionType] = {}

    def copy_of(self, function: FunctionType) -> FunctionType:
        """Return the function's copy, or the function itself if it is torch's."""
        if (function.__module__ or "").partition(".")[0] == "torch":
            return function
        if function not in self._copies:
            namespace = self._globals_for(function.__globals__)
            copy = FunctionType(
                function.__code__, namespace, function.__name__, function.__defaults__, function.__closure__
            )
            self._copies[function] = copy
            copy.__kwdefaults__, copy.__dict__ = function.__kwdefaults__, function.__dict__
            copy.__qualname__, copy.__module__ = function.__qualname__, function.__module__
            for name in _names_in(function.__code__):
                if name in function.__globals__:
                    namespace[name] = self.replacement(function.__globals__[name])
        return self._copies[function]

    def replacement(self, value: Any) -> Any:
        """Return what a copy sees in place of a global value."""
        if type(value) is FunctionType:
            return self.copy_of(value)
        if value is math or (type(value) is BuiltinFunctionType and value.__module__ == "math"):
            return _MATH[value]
        if type(value) is ModuleType and value.__name__.partition(".")[0] != "torch":
            return _ShadowedModule(value, self)
        return value

    def _globals_for(self, original: dict[str, Any]) -> dict[str, Any]:
        if id(original) not in self._globals:
            self._globals[id(original)] = {**original, "__builtins__": _BUILTINS}
        return self._globals[id(original)]


class _ShadowedModule:
    """A Python module whose functions are copies."""

    def __init__(self, module: ModuleType, shadows: ShadowedBuiltins) -> None:
        self._module = module
        self._shadows = shadows

    def __getattr__(self, name: str) -> Any:
        return self._shadows.replacement(getattr(self._module, name))


def _names_in(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names_in, inner))


def _traceable(function: Any) -> Any:
    """Return a function of ``math`` that becomes a node of the graph when it is called with a proxy."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        proxy = next((value for value in args if type(value) is TensorProxy), None)
        return function(*args) if proxy is None else proxy.tracer.create_proxy("call_function", function, args, {})

    return call


_MATH: dict[Any, Any] = {
    value: _traceable(value) for value in vars(math).values() if type(value) is BuiltinFunctionType
}
_MATH[math] = SimpleNamespace(**{name: _MATH.get(value, value) for name, value in vars(math).items() if name[0] != "_"})


def _represented_class(value: Any) -> type:
    """Return the class of what a proxy represents: a tensor or a number."""
    if value.node in value.tracer.known:
        return type(value.tracer.value_of(value.node))
    return int if value.tracer.is_number(value.node) else torch.Tensor


def _isinstance(value: Any, classes: Any) -> bool:
    if builtins.type(value) is TensorProxy:
        return builtins.issubclass(_represented_class(value), _unshadowed(classes))
    return builtins.isinstance(value, _unshadowed(classes))


def _hasattr(value: Any, name: str) -> bool:
    return builtins.hasattr(_represented_class(value) if builtins.type(value) is TensorProxy else value, name)


def _callable(value: Any) -> bool:
    return builtins.type(value) not in (TensorProxy, AttributeProxy) and builtins.callable(value)


def _unshadowed(classes: Any) -> Any:
    """Return the second argument of ``isinstance`` with the shadowed ``type`` replaced by Python's."""
    if builtins.isinstance(classes, tuple):
        return tuple(map(_unshadowed, classes))
    return builtins.type if classes is _Type else classes


class _TypeMeta(builtins.type):
    """Makes ``_Type`` behave like ``type``."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and builtins.type(args[0]) is TensorProxy:
            return _represented_class(args[0])
        return builtins.type(*args, **kwargs)

    def __getattr__(cls, name: str) -> Any:
        return getattr(builtins.type, name)


class _Type(metaclass=_TypeMeta):
    """``type``, which understands proxies."""


_BUILTINS = {
    **vars(builtins),
    "isinstance": _isinstance,
    "issubclass": lambda value, classes: builtins.issubclass(value, _unshadowed(classes)),
    "hasattr": _hasattr,
    "callable": _callable,
    "type": _Type,
}
