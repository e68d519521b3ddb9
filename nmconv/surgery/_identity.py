"""What stands where an activation was."""

from __future__ import annotations

import copy

import torch
from torch import nn

from nmconv.graph import hooks_of
from nmconv.surgery._classes import Method, rewritten

__all__ = ["Copy", "identity_for"]


class Copy(nn.Identity):
    """An identity that returns new memory: the activation it replaces did, and somebody overwrites what it returned."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return a copy of ``input``, any shape."""
        return input.clone()


_KEEPS = Method("forward", "def forward(self, input):\n    return input\n")
_COPIES = Method("forward", "def forward(self, input):\n    return input.clone()\n")


def identity_for(act: nn.Module, *, copies: bool) -> nn.Module:
    """A module to put in an activation's place.

    Mostly ``nn.Identity``. An activation with parameters, buffers or hooks keeps them (a PReLU's weight keeps its
    ``state_dict`` key, unused): it stays an instance of its class whose forward does nothing.
    """
    if any(True for _ in act.state_dict()) or hooks_of(act) or act._modules:
        still = copy.copy(act)
        still.__class__ = rewritten(type(act), (_COPIES if copies else _KEEPS,))
        return still
    identity = Copy() if copies else nn.Identity()
    identity.training = act.training
    return identity
