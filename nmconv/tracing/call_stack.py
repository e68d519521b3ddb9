"""The Python call stack of the code that a tracer runs."""

from __future__ import annotations

import sys
from types import FrameType

from torch import nn

__all__ = ["in_checkpoint", "running_method"]


def running_method(root: nn.Module) -> str:
    """Return the innermost method of ``root`` that is running."""
    frame: FrameType | None = sys._getframe(3)  # skips this function, the tracer and the proxy
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and frame.f_locals.get(code.co_varnames[0]) is root:
            method = getattr(type(root), code.co_name, None)
            wrapped = getattr(method, "__wrapped__", method)
            if code.co_name == "forward" or getattr(wrapped, "__code__", None) is code:
                return code.co_name
        frame = frame.f_back
    return "forward"


def in_checkpoint() -> bool:
    """Return whether torch's activation checkpointing is among the callers."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
        frame = frame.f_back
    return False
