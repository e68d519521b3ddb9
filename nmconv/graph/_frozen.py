"""Refusing what a trace would freeze or lose: values of real tensors, and classes of what is returned."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch.fx import Proxy
from torch.overrides import TorchFunctionMode

from nmconv.errors import RewriteError

__all__ = ["NoFrozenTensors", "check_returned"]

_VALUES = (
    *("item", "tolist", "numpy", "__array__", "__len__", "__contains__"),
    *("__bool__", "__int__", "__float__", "__index__"),
)
_READS = {getattr(torch.Tensor, name) for name in _VALUES if hasattr(torch.Tensor, name)} | {
    *(getattr(torch.Tensor, name).__get__ for name in ("dtype", "device")),
    torch.is_nonzero,
    torch.equal,
    torch.allclose,
}
_CHANCE = {getattr(torch, name) for name in ("rand", "randn", "randint", "randperm", "normal", "bernoulli")}


class NoFrozenTensors(TorchFunctionMode):
    """While a method is traced, no number may come out of a real tensor: it would be a constant ever after."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let every call through but those that read a value, a dtype or a device off a real tensor."""
        if func in _CHANCE:
            raise RewriteError("it draws random numbers that tracing would freeze")
        if func in _READS and not any(isinstance(value, Proxy) for value in args):
            name = getattr(getattr(func, "__self__", func), "__name__", str(func))
            raise RewriteError(
                f"it reads {name} off a tensor that is no input, which would be frozen (a random number or another)"
            )
        return func(*args, **(kwargs or {}))


def check_returned(value: Any) -> None:
    """Refuse containers that fx would rebuild as plain ones.

    Raises:
        RewriteError: For a subclass of list, tuple or dict that is no named tuple.
    """
    if isinstance(value, Proxy) or value is None:
        return
    if isinstance(value, (list, tuple, dict)):
        named = isinstance(value, tuple) and hasattr(value, "_fields")
        if type(value) not in (list, tuple, dict, torch.Size) and not named:
            raise RewriteError(f"it returns a {type(value).__name__}, which would become a plain one")
        for part in value.values() if isinstance(value, dict) else value:
            check_returned(part)
    elif is_dataclass(value):
        for field in fields(value):
            check_returned(getattr(value, field.name))
