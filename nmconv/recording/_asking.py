"""What a model's code asks about the context it is called in."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

from torch import nn

__all__ = ["asks_for"]

_QUESTIONS = {
    "is_grad_enabled": "grad",
    "is_inference_mode_enabled": "grad",
    "requires_grad": "grad",
    "grad_fn": "grad",
    "is_autocast_enabled": "autocast",
    "is_autocast_cpu_enabled": "autocast",
    "get_autocast_gpu_dtype": "autocast",
    "get_autocast_cpu_dtype": "autocast",
    "get_autocast_dtype": "autocast",
}


def asks_for(codes: Iterable[CodeType], model: nn.Module) -> frozenset[str]:
    """``grad`` and ``autocast``, where functions that ran, or functions that these name, ask for it.

    Args:
        codes: Of the functions that ran.
        model: Whose classes' methods they may name.
    """
    classes = list(dict.fromkeys(type(module) for module in model.modules()))
    spaces = list({id(space): space for cls in classes for space in _spaces(cls)}.values())
    found: set[str] = set()
    done: set[CodeType] = set()
    todo = list(codes)
    while todo:
        code = todo.pop()
        if code in done:
            continue
        done.add(code)
        todo += (part for part in code.co_consts if isinstance(part, CodeType))
        for name in code.co_names:
            if name in _QUESTIONS:
                found.add(_QUESTIONS[name])
            for space in spaces:
                todo += _code_of(space.get(name))
            for cls in classes:
                todo += _code_of(inspect.getattr_static(cls, name, None))
    return frozenset(found)


def _spaces(cls: type) -> Iterator[dict[str, Any]]:
    """The globals of the files that a class and its bases are from, torch's aside."""
    for base in cls.__mro__:
        module = sys.modules.get(base.__module__)
        if module is not None and not _is_torchs(base.__module__):
            yield vars(module)


@lru_cache(maxsize=4096)
def _is_torchs(name: str) -> bool:
    return name.partition(".")[0] in ("torch", "builtins", "nmconv")


def _code_of(value: Any) -> Iterator[CodeType]:
    for part in (value, getattr(value, "fget", None), getattr(value, "__func__", None)):
        if isinstance(part, FunctionType) and not _is_torchs(part.__module__ or "torch"):
            yield inspect.unwrap(part).__code__ if isinstance(inspect.unwrap(part), FunctionType) else part.__code__
