"""Count a model's activations, convolutions and multiply-adds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nmconv.bench.results import NetworkSize
from nmconv.errors import NoSitesError
from nmconv.surgery import get_plan, make_plan

__all__ = ["count_activations", "network_size"]


class _ConvolutionCounter(TorchDispatchMode):
    """Counts calls of aten.convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


def network_size(model: nn.Module, image: Tensor, activations: int) -> NetworkSize:
    """Count the convolutions and multiply-adds of one forward.

    Args:
        model: A model in eval mode.
        image: A batch of one image.
        activations: Number of activations, as :func:`count_activations` returns it.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imported here, as it imports triton

    with torch.no_grad(), FlopCounterMode(display=False) as flops, _ConvolutionCounter() as convs:
        model(image)
    return NetworkSize(activations, convs.calls, flops.get_total_flops() // 2)


def count_activations(model: nn.Module) -> int:
    """Return how many activations of a model own a convolution; the model must not be merged."""
    try:
        plan = get_plan(model)
        return make_plan(model, "1:1").counts.activations_before if plan is None else plan.counts.activations_after
    except NoSitesError:
        return 0
