"""Proxies for fx that pass for tensors, record in-place operators, and let the tracer answer control flow."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx.proxy import Proxy

__all__ = ["TensorProxy"]


class TensorProxy(Proxy):
    """A proxy that ``isinstance`` takes for a tensor.

    fx's own proxies are no tensors to ``isinstance``, so a forward that asks would take the wrong branch without a
    word; and fx records ``x += y`` as ``x = x + y``, which loses who shares memory with whom.
    """

    _is_param = False  # what isinstance asks of tensors for nn.Parameter
    _is_buffer = False  # and for nn.Buffer

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return torch.Tensor

    def __iter__(self) -> Iterator[Any]:
        """Unpacking works as in fx; any other iteration asks the tracer for the length."""
        import dis
        import sys

        caller = sys._getframe(1)
        at = caller.f_lasti
        name = next((step for step in dis.get_instructions(caller.f_code) if step.offset == at), None)
        if name is not None and name.opname == "UNPACK_SEQUENCE":
            return (self[index] for index in range(name.argval))
        return self.tracer.iter(self)

    def __len__(self) -> int:
        return self.tracer.length_of(self)  # type: ignore[union-attr]

    def __index__(self) -> int:
        return operator.index(self.tracer.value_of(self.node))  # type: ignore[union-attr]

    def __int__(self) -> int:
        return int(self.tracer.value_of(self.node))  # type: ignore[union-attr]

    def __float__(self) -> float:
        return float(self.tracer.value_of(self.node))  # type: ignore[union-attr]

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


def _inplace(name: str) -> Any:
    target = getattr(operator, name)

    def method(self: TensorProxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    method.__name__ = f"__{name}__"
    return method


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul"):
    setattr(TensorProxy, f"__{_name}__", _inplace(_name))
