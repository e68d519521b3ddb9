"""Modules of a copy that tell when they are called."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import nn

__all__ = ["is_wrapped_call", "wrap"]


def wrap(model: nn.Module, is_leaf: Callable[[nn.Module], bool], forwarded: Callable[..., Any]) -> None:
    """Let each module of a copy call ``forwarded(module, path, is a leaf, forward, args, kwargs)`` when it is called.

    A forward that is called as ``module.forward(...)`` counts as code of the caller's, as it does in fx's traces.
    """
    for path, module in list(model.named_modules()):
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
        if not isinstance(module, torch.jit.ScriptModule):
            module.__dict__["forward"] = _wrapped(module, path, is_leaf(module), module.forward, forwarded)


def _wrapped(
    module: nn.Module, path: str, leaf: bool, forward: Any, forwarded: Callable[..., Any]
) -> Callable[..., Any]:
    def nmconv_forward(*args: Any, **kwargs: Any) -> Any:
        if not is_wrapped_call(sys._getframe()):
            return forward(*args, **kwargs)
        return forwarded(module, path, leaf, forward, args, kwargs)

    return nmconv_forward


def is_wrapped_call(at: FrameType) -> bool:
    """Whether a wrapped forward runs because its module was called, and not by name."""
    return at.f_back is not None and at.f_back.f_globals.get("__name__") == "torch.nn.modules.module"
