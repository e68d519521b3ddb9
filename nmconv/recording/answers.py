"""Results that depend on data, taken from one real run on a copy, since meta tensors hold no data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["Answers", "CallKey", "ModelRaised", "NeedsData", "may_need_data"]

# Name of the function or module, qualified name of the calling module, and the number of the call, from 1.
CallKey = tuple[str, str, int]


class ModelRaised(Exception):
    """The model's own code has raised ``error``."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class NeedsData(RuntimeError):
    """A run on meta tensors needs a result that depends on data."""


class Answers:
    """What each call returned in a real run, as meta tensors and plain values."""

    def __init__(self) -> None:
        self._results: dict[CallKey, Any] = {}

    def add(self, key: CallKey, returned: Any) -> None:
        """Keep what a call returned."""
        self._results[key] = _without_data(returned)

    def get(self, key: CallKey) -> tuple[Any] | None:
        """Return a new copy of what the call returned, in a tuple; None if that is unknown."""
        return (_without_data(self._results[key]),) if key in self._results else None


def may_need_data(error: Exception) -> bool:
    """Return whether missing data may have caused an error, rather than the model's code."""
    text = str(error).lower()
    return isinstance(error, NotImplementedError) or "meta" in text or "data-dependent" in text


def _without_data(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, (list, tuple)):
        parts = [_without_data(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, dict):
        return {key: _without_data(part) for key, part in value.items()}
    return value
