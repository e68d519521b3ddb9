"""Numbers to time with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["drawn", "noise"]


def noise(shape: Sequence[int], like: Tensor, deviation: float = 1.0) -> Tensor:
    """Normal numbers, always the same, in the dtype and on the device of ``like``; torch's random state stays."""
    drawn = torch.Generator("cpu").manual_seed(0)
    made = torch.randn(tuple(shape), generator=drawn, device="cpu", dtype=torch.float32)
    return made.mul_(deviation).to(like)


def drawn(module: nn.Module) -> nn.Module:
    """The module itself, in eval mode, with weights that keep about the size of what it is given; none is learnt."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        parameter.copy_(noise(parameter.shape, parameter, 1 / math.sqrt(max(parameter[0].numel(), 1))))
    return module.eval()
