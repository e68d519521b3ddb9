"""Proxies for fx that record in-place operators and let the tracer answer control flow, and an honest isinstance."""

from __future__ import annotations

import builtins
import dis
import operator
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.fx.proxy import Attribute, Proxy

__all__ = ["TensorProxy", "patched_isinstance"]


class _Answering:
    """What both kinds of proxy add to fx's: length, iteration and numbers are asked of the tracer."""

    node: Any
    tracer: Any

    def __iter__(self) -> Iterator[Any]:
        """Unpacking works as in fx; any other iteration asks the tracer for the length."""
        caller = sys._getframe(1)
        at = caller.f_lasti
        step = next((step for step in dis.get_instructions(caller.f_code) if step.offset == at), None)
        if step is not None and step.opname == "UNPACK_SEQUENCE":
            return iter([self[index] for index in range(step.argval)])  # type: ignore[index]
        return self.tracer.iter(self)

    def __len__(self) -> int:
        return self.tracer.length_of(self)

    def __index__(self) -> int:
        return operator.index(self.tracer.value_of(self.node))

    def __int__(self) -> int:
        return int(self.tracer.value_of(self.node))

    def __float__(self) -> float:
        return float(self.tracer.value_of(self.node))

    def __str__(self) -> str:
        self.tracer.refuse_text()
        return repr(self)

    def __format__(self, spec: str) -> str:
        self.tracer.refuse_text()
        return repr(self)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


class AttributeProxy(_Answering, Attribute):
    """A proxy of an attribute, such as ``x.shape``; one that is called becomes a method call."""


class TensorProxy(_Answering, Proxy):
    """A proxy of a value. fx's own records ``x += y`` as ``x = x + y``, which loses who shares memory with whom."""

    def __getattr__(self, k: str) -> Any:
        if k == "device":
            known = self.tracer.known_device()
            if known is not None:
                return known
        return AttributeProxy(self, k)


def _inplace(name: str) -> Any:
    target = getattr(operator, name)

    def method(self: TensorProxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    method.__name__ = f"__{name}__"
    return method


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul"):
    setattr(TensorProxy, f"__{_name}__", _inplace(_name))


def _stands_for(value: Any) -> type:
    """The class a proxy stands for: a tensor, or a number computed from shapes."""
    return int if value.tracer.is_number(value.node) else torch.Tensor


_asked: list[set[int]] = []  # ids of modules that somebody asks about; innermost last


def _note(value: Any) -> None:
    if _asked and builtins.isinstance(value, nn.Module):
        _asked[-1].add(id(value))


def _isinstance(value: Any, classes: Any) -> bool:
    _note(value)
    if builtins.type(value) is TensorProxy:
        return issubclass(_stands_for(value), _real(classes))
    return builtins.isinstance(value, _real(classes))


def _issubclass(value: Any, classes: Any) -> bool:
    return builtins.issubclass(value, _real(classes))


def _hasattr(value: Any, name: str) -> bool:
    _note(value)
    return builtins.hasattr(_stands_for(value) if builtins.type(value) is TensorProxy else value, name)


def _callable(value: Any) -> bool:
    return builtins.type(value) is not TensorProxy and builtins.callable(value)


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
        if len(args) == 1:
            _note(args[0])
        return builtins.type(*args, **kwargs)

    def __getattr__(cls, name: str) -> Any:
        return getattr(builtins.type, name)


class _Type(metaclass=_Asking):
    """``type``, which knows what proxies stand for."""


_SHADOWS: dict[str, Any] = {
    "isinstance": _isinstance,
    "issubclass": _issubclass,
    "hasattr": _hasattr,
    "callable": _callable,
    "type": _Type,
}


@lru_cache(maxsize=64)
def _spaces(package: str, loaded: int) -> list[dict[str, Any]]:
    """The globals of all loaded modules of a package; ``loaded`` only tells when to look again."""
    names = [name for name in sys.modules if name == package or name.startswith(f"{package}.")]
    return [space for name in names if (space := getattr(sys.modules[name], "__dict__", None)) is not None]


@contextmanager
def patched_isinstance(asked: set[int]) -> Iterator[Any]:
    """A function that gives a class's whole package honest answers about proxies until the end of the context.

    Gets into ``asked``: the ids of modules whose class or attributes these packages ask for in these ways.

    Without it a forward that asks whether its input is a tensor takes the wrong branch without a word. Python code
    alone sees ``isinstance``, ``type`` and their kin shadowed: torch's C++ asks on its own, and must not be lied to.
    """
    patched: list[tuple[dict[str, Any], str]] = []
    packages = {"torch", __name__.partition(".")[0]}  # never our own code, which must see proxies as proxies

    def patch(cls: type) -> None:
        package = cls.__module__.partition(".")[0]
        if package in packages:
            return
        packages.add(package)
        for space in _spaces(package, len(sys.modules)):
            for name, shadow in _SHADOWS.items():
                if name not in space:
                    space[name] = shadow
                    patched.append((space, name))

    _asked.append(asked)
    is_tensor = torch.is_tensor
    torch.is_tensor = lambda obj: _isinstance(obj, torch.Tensor)  # type: ignore[assignment]
    try:
        yield patch
    finally:
        torch.is_tensor = is_tensor
        _asked.pop()
        for space, name in patched:
            del space[name]
