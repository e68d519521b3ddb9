"""Torch's functions: their labels, which of them need data, and which become nodes of a recording."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._device import _device_constructors

__all__ = [
    "FACTORIES",
    "FROM_VALUES",
    "NEEDS_DATA",
    "READS_VALUE",
    "SIZE_METHODS",
    "SIZE_PROPERTIES",
    "VIEW_PROPERTIES",
    "called_by_meta_kernel",
    "is_metadata_query",
    "label_of",
]

# Functions that read one tensor's value as a Python number.
READS_VALUE = frozenset(("item", "__bool__", "__int__", "__float__", "__index__", "tolist", "is_nonzero"))
# Functions whose result, or its shape, depends on the values of tensors.
NEEDS_DATA = READS_VALUE | {
    "__complex__", "numpy", "__array__", "nonzero", "unique", "unique_consecutive", "equal", "allclose",
    "masked_select", "__contains__", "bincount", "argwhere", "__format__", "nms",
}  # fmt: skip

FACTORIES = _device_constructors()
FROM_VALUES = (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, torch.scalar_tensor)

SIZE_METHODS = ("size", "stride", "numel", "nelement", "__len__")
SIZE_PROPERTIES = (Tensor.shape, Tensor.nbytes)
VIEW_PROPERTIES = frozenset(
    getattr(Tensor, name) for name in ("T", "mT", "H", "mH", "data", "real", "imag") if hasattr(Tensor, name)
)
_METADATA_QUERIES = frozenset(
    ("size", "dim", "ndimension", "__len__", "numel", "nelement", "stride", "element_size", "is_contiguous",
     "is_floating_point", "is_complex", "is_signed", "get_device", "storage_offset", "requires_grad_", "is_tensor",
     "is_inference", "is_same_size", "__hash__", "untyped_storage", "__dir__",
     "__repr__", "_set_grad_enabled")
)  # fmt: skip

_META_KERNELS = ("torch._refs", "torch._prims", "torch._meta_registrations", "torch._decomp", "torch._inductor")
_DISPATCH = ("torch", "torch._ops", "torch.overrides")


def label_of(func: Any) -> str:
    """Return a function's name; an operator's is that of the method it stands for."""
    name = getattr(func, "__name__", "") or str(func)
    if name == "__get__":
        return str(getattr(getattr(func, "__self__", None), "__name__", "?"))
    return name.strip("_") if name.startswith("__") and name not in NEEDS_DATA else name


def is_metadata_query(func: Any) -> bool:
    """Return whether a function only reads or sets a tensor's metadata, and so becomes no node."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(func, "__self__", None) not in VIEW_PROPERTIES
    return name in _METADATA_QUERIES


def called_by_meta_kernel() -> bool:
    """Return whether the caller's caller is torch's own Python code that computes a result on the meta device."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__") in _DISPATCH:
        frame = frame.f_back
    return frame is not None and (frame.f_globals.get("__name__") or "").startswith(_META_KERNELS)
