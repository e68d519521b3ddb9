"""What stands for a sum of two branches where a run is timed."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["Summed"]


class Summed(nn.Module):
    """Two branches of one value, added."""

    def __init__(self, one: nn.Module, two: nn.Module) -> None:
        super().__init__()
        self.one, self.two = one, two

    def forward(self, x: Tensor) -> Tensor:
        """Any shape that both take."""
        return self.one(x) + self.two(x)
