"""Torch's functions: what each is called, and which are worth a node."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from torch import Tensor

from nmconv.recording.answers import ASKS_DATA

__all__ = ["VIEWS", "is_inside", "label_of", "not_recorded"]

VIEWS = frozenset(
    getattr(Tensor, name) for name in ("T", "mT", "H", "mH", "data", "real", "imag") if hasattr(Tensor, name)
)
_ABOUT = frozenset(
    ("size", "dim", "ndimension", "__len__", "numel", "nelement", "stride", "element_size", "is_contiguous",
     "is_floating_point", "is_complex", "is_signed", "get_device", "storage_offset", "requires_grad_", "is_tensor",
     "is_inference", "is_same_size", "__hash__", "untyped_storage", "register_hook", "retain_grad", "__dir__",
     "__repr__", "_set_grad_enabled")
)  # fmt: skip
_INSIDE = ("torch._refs", "torch._prims", "torch._meta_registrations", "torch._decomp", "torch._inductor")
_BETWEEN = ("torch", "torch._ops", "torch.overrides")  # who calls through these is behind them


def label_of(func: Any) -> str:
    """What a function is called; operators like the methods they stand for."""
    name = getattr(func, "__name__", "") or str(func)
    if name == "__get__":
        return str(getattr(getattr(func, "__self__", None), "__name__", "?"))
    return name.strip("_") if name.startswith("__") and name not in ASKS_DATA else name


def not_recorded(func: Any) -> bool:
    """Whether a function only tells about a tensor."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(func, "__self__", None) not in VIEWS
    return name in _ABOUT


def is_inside() -> bool:
    """Whether torch's own code calls, in computing what compiled code gives on the meta device."""
    at: FrameType | None = sys._getframe(2)
    while at is not None and at.f_globals.get("__name__") in _BETWEEN:
        at = at.f_back
    return at is not None and (at.f_globals.get("__name__") or "").startswith(_INSIDE)
