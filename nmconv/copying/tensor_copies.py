"""Function modes that decide what takes the place of each tensor while a model is deep-copied."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

__all__ = ["ClonedTensors", "MetaTensors", "SharedTensors"]


class ClonedTensors(TorchFunctionMode):
    """Clones each tensor that a deep copy meets; tensors that share a storage do so in the copy, too.

    Args:
        tensors: Tensors by id, copied immediately.

    Attributes:
        memo: The memo of ``copy.deepcopy``: each copy by the id of its original.
        originals: Each original by the id of its copy.
    """

    def __init__(self, tensors: dict[int, torch.Tensor]) -> None:
        super().__init__()
        self.memo: dict[int, Any] = {}
        self.originals: dict[int, torch.Tensor] = {}
        counts = Counter(map(_storage_id, filter(_is_strided, tensors.values())))
        self._aliased = {storage for storage, count in counts.items() if count > 1}
        self._storage_copies: dict[int, Any] = {}
        for value in tensors.values():
            self.copy(value)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__deepcopy__:
            return self.copy(args[0])
        return func(*args, **(kwargs or {}))

    def copy(self, value: torch.Tensor) -> torch.Tensor:
        """Return the tensor's copy, the same one each time."""
        if id(value) not in self.memo:
            with torch.no_grad():
                new = self._new_tensor(value)
            if isinstance(value, nn.Parameter):
                new = nn.Parameter(new, requires_grad=value.requires_grad)
                new.__dict__.update(vars(value))
            else:
                new.requires_grad_(value.requires_grad)
            self.memo[id(value)] = new
            self.originals[id(new)] = value
        result: torch.Tensor = self.memo[id(value)]
        return result

    def _new_tensor(self, value: torch.Tensor) -> torch.Tensor:
        if not _is_strided(value) or _storage_id(value) not in self._aliased:
            return value.detach().clone()
        storage = _storage_id(value)
        if storage not in self._storage_copies:
            self._storage_copies[storage] = value.untyped_storage().clone()
        new = torch.empty(0, dtype=value.dtype, device=value.device)
        return new.set_(self._storage_copies[storage], value.storage_offset(), value.shape, value.stride())


class SharedTensors(ClonedTensors):
    """Puts the tensors themselves into the copy."""

    def copy(self, value: torch.Tensor) -> torch.Tensor:
        """Return the tensor itself."""
        self.memo[id(value)] = self.originals[id(value)] = value
        return value


class MetaTensors(ClonedTensors):
    """Puts a meta tensor of the same shape, strides and dtype in the place of each tensor."""

    def _new_tensor(self, value: torch.Tensor) -> torch.Tensor:
        if not _is_strided(value):
            return value.detach().to("meta")
        storage = _storage_id(value)
        if storage not in self._aliased:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        if storage not in self._storage_copies:
            size = value.untyped_storage().nbytes() // value.element_size()
            self._storage_copies[storage] = torch.empty(size, dtype=value.dtype, device="meta")
        base = self._storage_copies[storage]
        return base.view(value.dtype).as_strided(value.shape, value.stride(), value.storage_offset())


def _storage_id(value: torch.Tensor) -> int:
    return value.untyped_storage()._cdata


def _is_strided(value: torch.Tensor) -> bool:
    return value.layout == torch.strided and not value.is_quantized
