"""Which methods a model's forward can call: no other may run because a plan says so."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import nn

__all__ = ["callable_methods"]


def callable_methods(model: nn.Module) -> frozenset[str]:
    """Names that stand in the code of the model's forwards, or in code that is named there, and so on.

    More may be listed than is called; nn.Module's own methods never are, which change or save a model.
    """
    types = list(dict.fromkeys(type(module) for module in model.modules()))
    names: set[str] = set()
    done: set[CodeType] = set()
    todo = [function for cls in types for function in _functions(getattr(cls, "forward", None))]
    while todo:
        function = todo.pop()
        for code in _codes(function.__code__):
            if code in done:
                continue
            done.add(code)
            texts = (constant for constant in code.co_consts if isinstance(constant, str))  # getattr(self, "...")
            found = {name for name in (*code.co_names, *texts) if name.isidentifier()}
            for name in found:
                todo += _functions(function.__globals__.get(name))
            for name in found - names:
                for cls in types:
                    todo += _functions(inspect.getattr_static(cls, name, None))
            names |= found
    return frozenset(name for name in names if not hasattr(nn.Module, name)) | {"forward"}


def _codes(code: CodeType) -> Iterator[CodeType]:
    """The code, and that of functions written inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _functions(value: Any) -> Iterator[FunctionType]:
    """The function that a method, property or wrapper stands for, unless it is torch's."""
    for part in (value, getattr(value, "fget", None), getattr(value, "__func__", None)):
        function = inspect.unwrap(part) if isinstance(part, FunctionType) else None
        if isinstance(function, FunctionType) and not (function.__module__ or "").startswith("torch."):
            yield function
