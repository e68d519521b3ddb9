"""How much a network computes, counted while it does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nmconv.bench.results import NetworkSize
from nmconv.errors import NoSitesError
from nmconv.surgery import get_plan, make_plan

__all__ = ["activations_of", "network"]


class _Convolutions(TorchDispatchMode):
    """Counts convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


def network(model: nn.Module, image: Tensor, activations: int) -> NetworkSize:
    """Convolutions and multiply-adds of one forward.

    Args:
        model: In eval mode.
        image: A batch of one.
        activations: As :func:`activations_of` counts them.
    """
    from torch.utils.flop_counter import FlopCounterMode  # here, since it imports triton

    with torch.no_grad(), FlopCounterMode(display=False) as flops, _Convolutions() as convs:
        model(image)
    return NetworkSize(activations, convs.calls, flops.get_total_flops() // 2)


def activations_of(model: nn.Module) -> int:
    """Activations that own a convolution, of a model that is not merged."""
    try:
        plan = get_plan(model)
        return make_plan(model, "1:1").counts.activations_before if plan is None else plan.counts.activations_after
    except NoSitesError:
        return 0
