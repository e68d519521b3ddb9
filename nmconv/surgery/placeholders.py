"""Modules that take the place of activations, and the copies of activations that are put elsewhere."""

from __future__ import annotations

import copy

import torch
from torch import nn

from nmconv.flow import hooks_of
from nmconv.surgery.rewritten_classes import RewrittenMethod, rewritten_class

__all__ = [
    "ADDED",
    "REPLACED",
    "CopyingIdentity",
    "has_state",
    "identity_class",
    "identity_for",
    "is_identity",
    "shallow_copy",
]

REPLACED = "_nmconv_was"  # on a module put into an existing slot: the module that was there before
ADDED = "_nmconv_added"  # on a module for which a new slot was made


class CopyingIdentity(nn.Identity):
    """An identity that returns new memory, for where the activation's output is overwritten later."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return a copy of ``input``, any shape."""
        return input.clone()


_RETURN_INPUT = RewrittenMethod("forward", "def forward(self, input):\n    return input\n")
_RETURN_COPY = RewrittenMethod("forward", "def forward(self, input):\n    return input.clone()\n")


def has_state(act: nn.Module) -> bool:
    """Return whether an activation has parameters, buffers, hooks or children, which must stay (a PReLU's weight)."""
    return any(True for _ in act.state_dict()) or bool(hooks_of(act) or act._modules)


def identity_class(cls: type[nn.Module], *, copies: bool) -> type[nn.Module]:
    """Return the class with a forward that returns its input, or a copy of it."""
    return rewritten_class(cls, (_RETURN_COPY if copies else _RETURN_INPUT,))


def is_identity(module: nn.Module) -> bool:
    """Return whether a module has a class made by :func:`identity_class`."""
    methods = getattr(type(module), "_nmconv_methods", ())
    return any(method in methods for method in (_RETURN_COPY, _RETURN_INPUT))


def shallow_copy(act: nn.Module) -> nn.Module:
    """Return a copy that shares everything but the dicts of hooks, so that hooks are registered on one of them only."""
    twin = copy.copy(act)
    for name, value in list(vars(twin).items()):
        if name.endswith("_hooks") or "_hooks_" in name:
            vars(twin)[name] = copy.copy(value)
    return twin


def identity_for(act: nn.Module, *, copies: bool) -> nn.Module:
    """Return a module to replace an activation with: an ``nn.Identity``, or one of its class that shares its state."""
    if has_state(act):
        twin = shallow_copy(act)
        twin.__class__ = identity_class(type(act), copies=copies)
        vars(twin)[REPLACED] = act
        return twin
    identity = CopyingIdentity() if copies else nn.Identity()
    identity.training = act.training
    vars(identity)[REPLACED] = act
    return identity
