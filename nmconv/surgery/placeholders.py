"""What stands where an activation was."""

from __future__ import annotations

import copy

import torch
from torch import nn

from nmconv.flow import hooks_of
from nmconv.surgery.rewritten_classes import RewrittenMethod, rewritten

__all__ = [
    "ADDED",
    "WAS",
    "CopyingIdentity",
    "hooked_apart",
    "identity_for",
    "is_passing",
    "keeps_something",
    "passing",
]

WAS = "_nmconv_was"  # on what stands in a slot: the module that stood there
ADDED = "_nmconv_added"  # on a module for which there was no slot


class CopyingIdentity(nn.Identity):
    """An identity that returns new memory: the activation it replaces did, and somebody overwrites what it returned."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return a copy of ``input``, any shape."""
        return input.clone()


_KEEPS = RewrittenMethod("forward", "def forward(self, input):\n    return input\n")
_COPIES = RewrittenMethod("forward", "def forward(self, input):\n    return input.clone()\n")


def keeps_something(act: nn.Module) -> bool:
    """Whether an activation has parameters, buffers, hooks or children, which are to stay (a PReLU's weight)."""
    return any(True for _ in act.state_dict()) or bool(hooks_of(act) or act._modules)


def passing(cls: type[nn.Module], *, copies: bool) -> type[nn.Module]:
    """The class with a forward that does nothing, or copies."""
    return rewritten(cls, (_COPIES if copies else _KEEPS,))


def is_passing(module: nn.Module) -> bool:
    """Whether it is an activation with such a forward."""
    methods = getattr(type(module), "_nmconv_methods", ())
    return any(method in methods for method in (_COPIES, _KEEPS))


def hooked_apart(act: nn.Module) -> nn.Module:
    """A shallow copy that shares all but the sets of hooks: a hook that is put on one of them is not on the other."""
    made = copy.copy(act)
    for name, value in list(vars(made).items()):
        if name.endswith("_hooks") or "_hooks_" in name:
            vars(made)[name] = copy.copy(value)
    return made


def identity_for(act: nn.Module, *, copies: bool) -> nn.Module:
    """A module to put in an activation's place: ``nn.Identity``, or one of its class that shares all that it has."""
    if keeps_something(act):
        still = hooked_apart(act)
        still.__class__ = passing(type(act), copies=copies)
        vars(still)[WAS] = act
        return still
    identity = CopyingIdentity() if copies else nn.Identity()
    identity.training = act.training
    vars(identity)[WAS] = act
    return identity
