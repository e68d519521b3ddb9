"""Modules of a copy that tell when they are called, and modules in disguise, which show nothing but their result."""

from __future__ import annotations

import sys
from collections.abc import Callable, Container
from types import FrameType
from typing import Any

import torch
from torch import nn

__all__ = ["disguise", "is_wrapped_call", "wrap"]


class Disguise(nn.Module):
    """Calls a module, and shows nothing of it: neither its class nor its settings and parameters."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.training = module.training

        def forward(*args: Any, **kwargs: Any) -> Any:
            return module(*args, **kwargs)

        self.__dict__["forward"] = forward


def disguise(model: nn.Module, names: Container[str]) -> None:
    """Put disguises in the place of some modules of a copy, wherever they are registered."""
    hidden = {id(module): Disguise(module) for name, module in model.named_modules() if name in names}
    for module in list(model.modules()):
        for slot, child in module._modules.items():
            module._modules[slot] = hidden.get(id(child), child)


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
