"""The functions behind methods: inside of decorators, and as they were before torch compiled them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

__all__ = ["enclosed", "methods_of", "uncompiled", "unwrapped"]


def uncompiled() -> AbstractContextManager[Any]:
    """Let compiled functions run as they were written, where torch can: those of other threads, too."""
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def methods_of(cls: type) -> frozenset[CodeType]:
    """The code of all methods, those of its bases and those inside decorators."""
    bases = [base for base in cls.__mro__ if base not in (object, nn.Module)]
    held = [_function(value) for base in bases for value in vars(base).values()]
    methods = [method for value in held if callable(value) for method in unwrapped(value)]
    codes = (getattr(method, "__code__", None) for method in methods if not isinstance(method, (type, nn.Module)))
    return frozenset(code for code in codes if isinstance(code, CodeType))


def _function(value: Any) -> Any:
    if isinstance(value, property):
        return value.fget
    return value.__func__ if isinstance(value, (staticmethod, classmethod)) else value


def unwrapped(method: Any) -> Iterator[Any]:
    """A method, and what its decorators wrap, outermost first; those that do not say what are looked into."""
    todo, seen = [method], set()
    while todo:
        method = todo.pop()
        if method is None or id(method) in seen:
            continue
        seen.add(id(method))
        yield method
        inner = getattr(method, "__wrapped__", None)
        todo += [inner] if inner is not None else [held for held in enclosed(method) if isinstance(held, FunctionType)]


def enclosed(function: Any) -> Iterator[Any]:
    """What the names of a function's closure stand for, as far as they stand for anything yet."""
    for cell in getattr(function, "__closure__", None) or ():
        with suppress(ValueError):  # an empty one
            yield cell.cell_contents
