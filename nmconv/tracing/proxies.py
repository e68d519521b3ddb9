"""Proxies for fx that record in-place operators as such, and get known values from the tracer."""

from __future__ import annotations

import dis
import operator
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx.proxy import Attribute, Proxy, TraceError

__all__ = ["AttributeProxy", "TensorProxy"]


class _KnownValues:
    """Mixin: conversions to plain values go to the tracer, which knows the values of settings only."""

    node: Any
    tracer: Any

    def __iter__(self) -> Iterator[Any]:
        """Unpack any value, as fx does; else iterate over a known value."""
        caller = sys._getframe(1)
        instructions = dis.get_instructions(caller.f_code)
        current = next((each for each in instructions if each.offset == caller.f_lasti), None)
        if current is not None and current.opname == "UNPACK_SEQUENCE":
            return iter([self[index] for index in range(current.argval)])  # type: ignore[index]
        return iter(self.tracer.value_of(self.node))

    def __len__(self) -> int:
        return len(self.tracer.value_of(self.node))

    def __index__(self) -> int:
        return operator.index(self.tracer.value_of(self.node))

    def __int__(self) -> int:
        return int(self.tracer.value_of(self.node))

    def __float__(self) -> float:
        return float(self.tracer.value_of(self.node))

    def __hash__(self) -> int:
        return hash(self.tracer.value_of(self.node)) if self.node in self.tracer.known else id(self)

    def __str__(self) -> str:
        return str(self.tracer.value_of(self.node))

    def __format__(self, spec: str) -> str:
        return format(self.tracer.value_of(self.node), spec)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


class AttributeProxy(_KnownValues, Attribute):
    """A proxy of an attribute, such as ``x.shape``; when called, it becomes a method call."""


class TensorProxy(_KnownValues, Proxy):
    """A proxy of a value; fx's own records ``x += y`` as ``x = x + y``, which loses the aliasing."""

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(torch.Tensor, name):
            raise TraceError(f"it sets the attribute {name!r} of a tensor, which tracing would lose")
        super().__setattr__(name, value)

    def __getattr__(self, k: str) -> Any:
        if sys._getframe(1).f_globals.get("__name__", "").startswith("numpy."):
            raise TraceError("it passes a size or a tensor to numpy, which tracing cannot follow")
        return AttributeProxy(self, k)


def _inplace(name: str) -> Any:
    target = getattr(operator, name)

    def method(self: TensorProxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    method.__name__ = f"__{name}__"
    return method


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul"):
    setattr(TensorProxy, f"__{_name}__", _inplace(_name))
