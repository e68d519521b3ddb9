"""The thread's context (gradient mode, autocast, recording), and whether a model's code queries it."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

__all__ = ["context_queries", "context_restored", "current_context", "is_recording", "recording_marked", "uncompiled"]

# -- the context ------------------------------------------------------------------------------------------------------

_DEVICE_TYPES = ("cpu", "cuda")
_state = threading.local()


def current_context() -> tuple[bool, ...]:
    """Return whether gradients, inference mode, and autocast on the CPU and on CUDA are on in this thread."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(device_type) for device_type in _DEVICE_TYPES),
    )


@contextmanager
def context_restored() -> Iterator[None]:
    """Restore the gradient mode and autocast on exit, in case a model's code raised before it restored them itself.

    Autocast counts its nesting depth and keeps the weights it has cast until the outermost level is left. With a wrong
    count, the thread would go on training with outdated weights.
    """
    grad, cache_enabled = torch.is_grad_enabled(), torch.is_autocast_cache_enabled()
    autocast = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in _DEVICE_TYPES]
    depth = torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.set_grad_enabled(grad)
        for kind, enabled, dtype in autocast:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        torch.set_autocast_cache_enabled(cache_enabled)
        while torch.autocast_decrement_nesting() >= depth:
            torch.clear_autocast_cache()


def uncompiled() -> AbstractContextManager[Any]:
    """Run compiled functions eagerly, in all threads, where this torch can."""
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def is_recording() -> bool:
    """Return whether this thread is recording a model's run."""
    return bool(getattr(_state, "depth", 0))


@contextmanager
def recording_marked() -> Iterator[None]:
    """Make :func:`is_recording` true, while a copy is prepared or runs."""
    _state.depth = getattr(_state, "depth", 0) + 1
    try:
        yield
    finally:
        _state.depth -= 1


# -- queries ----------------------------------------------------------------------------------------------------------

_QUERIES = {
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


def context_queries(codes: Iterable[CodeType], model: nn.Module) -> frozenset[str]:
    """Return which of ``grad`` and ``autocast`` are queried by the functions that ran or by functions that these name.

    Args:
        codes: Code of the functions that ran.
        model: The model, whose classes' methods and files' globals are searched for the names.
    """
    classes = list(dict.fromkeys(type(module) for module in model.modules()))
    namespaces = list({id(space): space for cls in classes for space in _file_globals(cls)}.values())
    queries: set[str] = set()
    done: set[CodeType] = set()
    todo = list(codes)
    while todo:
        code = todo.pop()
        if code in done:
            continue
        done.add(code)
        todo += (part for part in code.co_consts if isinstance(part, CodeType))
        for name in code.co_names:
            if name in _QUERIES:
                queries.add(_QUERIES[name])
            for namespace in namespaces:
                todo += _codes_of(namespace.get(name))
            for cls in classes:
                todo += _codes_of(inspect.getattr_static(cls, name, None))
    return frozenset(queries)


def _file_globals(cls: type) -> Iterator[dict[str, Any]]:
    """Yield the globals of the files that define a class and its bases, except torch's and nmconv's."""
    for base in cls.__mro__:
        module = sys.modules.get(base.__module__)
        if module is not None and not _is_trusted(base.__module__):
            yield vars(module)


@lru_cache(maxsize=4096)
def _is_trusted(module_name: str) -> bool:
    """Return whether code of this Python module need not be searched."""
    return module_name.partition(".")[0] in ("torch", "builtins", "nmconv")


def _codes_of(value: Any) -> Iterator[CodeType]:
    for part in (value, getattr(value, "fget", None), getattr(value, "__func__", None)):
        if isinstance(part, FunctionType) and not _is_trusted(part.__module__ or "torch"):
            inner = inspect.unwrap(part)
            yield inner.__code__ if isinstance(inner, FunctionType) else part.__code__
