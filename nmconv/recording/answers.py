"""What data decide: a meta tensor holds none, so a real run on a copy is asked once, and its answers are kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["ASKS_DATA", "Answers", "ModelRaised", "NeedsData"]

# Functions that only numbers can answer.
ASKS_DATA = frozenset(
    ("item", "__bool__", "__int__", "__float__", "__index__", "__complex__", "tolist", "numpy", "__array__",
     "is_nonzero", "nonzero", "unique", "unique_consecutive", "equal", "allclose", "masked_select", "__contains__",
     "bincount", "argwhere", "__format__", "nms")
)  # fmt: skip


class ModelRaised(Exception):
    """The model's own code has raised ``error``."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class NeedsData(RuntimeError):
    """A run on meta tensors asks for numbers."""


class Answers:
    """What each call has returned in a real run, as meta tensors and plain values."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str, int], Any] = {}

    def add(self, key: tuple[str, str, int], returned: Any) -> None:
        """Keep what a call returned: ``key`` is the function's name, the module's path and the call's number."""
        self._found[key] = _without_data(returned)

    def get(self, key: tuple[str, str, int]) -> tuple[Any] | None:
        """What the call returned, in a tuple, anew each time; None where that is not known."""
        return (_without_data(self._found[key]),) if key in self._found else None

    def may_know(self, error: Exception) -> bool:
        """Whether an error may come of there being no numbers, rather than of what the model does."""
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
