"""The context that a thread is in (gradients, autocast, recording), and what a model's code asks about it."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

__all__ = ["asks_for", "context_kept", "context_now", "is_recording", "noted"]


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


_KINDS = ("cpu", "cuda")


def context_now() -> tuple[bool, ...]:
    """Whether gradients, inference mode and autocast are on in this thread."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(kind) for kind in _KINDS),
    )


@contextmanager
def context_kept() -> Iterator[None]:
    """Leave what a model's code has entered by hand, and not left since it raised in between.

    Autocast counts how deep it is, and keeps the weights that it has cast until it is left: with a wrong count a thread
    would go on training with old ones.
    """
    grad, cached = torch.is_grad_enabled(), torch.is_autocast_cache_enabled()
    autocast = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in _KINDS]
    depth = torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.set_grad_enabled(grad)
        for kind, on, dtype in autocast:
            torch.set_autocast_enabled(kind, on)
            torch.set_autocast_dtype(kind, dtype)
        torch.set_autocast_cache_enabled(cached)
        while torch.autocast_decrement_nesting() >= depth:
            torch.clear_autocast_cache()


_state = threading.local()


def is_recording() -> bool:
    """Whether this thread is recording a model's run."""
    return bool(getattr(_state, "depth", 0))


@contextmanager
def noted() -> Iterator[None]:
    """While a copy is made ready and runs."""
    _state.depth = getattr(_state, "depth", 0) + 1
    try:
        yield
    finally:
        _state.depth -= 1
