"""Functions that torch compiled."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

__all__ = ["uncompiled"]


def uncompiled() -> AbstractContextManager[Any]:
    """Let compiled functions run as they were written, where torch can: those of other threads, too."""
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
