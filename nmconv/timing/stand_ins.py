"""Stand-ins for real inputs, trained weights and residual sums, for measuring time only."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["Summed", "fixed_normal", "randomize_weights"]


def fixed_normal(shape: Sequence[int], like: Tensor, deviation: float = 1.0) -> Tensor:
    """Return normal random numbers, the same in every call, without using torch's global RNG state.

    Args:
        shape: Shape of the result.
        like: Gives the dtype and the device.
        deviation: Standard deviation.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    values = torch.randn(tuple(shape), generator=generator, device="cpu", dtype=torch.float32)
    return values.mul_(deviation).to(like)


def randomize_weights(module: nn.Module) -> nn.Module:
    """Randomize a module's parameters in place, put it in eval mode and return it.

    The weights roughly preserve the magnitude of the inputs, and no longer require gradients.
    """
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        parameter.copy_(fixed_normal(parameter.shape, parameter, 1 / math.sqrt(max(parameter[0].numel(), 1))))
    return module.eval()


class Summed(nn.Module):
    """The sum of two branches with the same input."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        """Return ``first(x) + second(x)``, for ``x`` of any shape that both accept."""
        return self.first(x) + self.second(x)
