"""Numbers to time with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["noise"]


def noise(shape: Sequence[int], like: Tensor, deviation: float = 1.0) -> Tensor:
    """Normal numbers, always the same, in the dtype and on the device of ``like``; torch's random state stays."""
    drawn = torch.Generator("cpu").manual_seed(0)
    made = torch.randn(tuple(shape), generator=drawn, device="cpu", dtype=torch.float32)
    return made.mul_(deviation).to(like)
