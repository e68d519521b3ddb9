"""The cost of a network: multiply-adds and latency."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nmconv.timing import make_runner, quotients, thread_count, time_interleaved


def multiply_adds(model: nn.Module, picture: Tensor) -> int:
    """Return the multiply-adds of one forward in eval mode."""
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        model.eval()(picture)
    return int(flops.get_total_flops()) // 2


def latencies(models: Sequence[nn.Module], picture: Tensor, rounds: int = 11) -> list[float]:
    """Return each model's median latency over the first model's, timed interleaved, eager, with one thread.

    The weights do not matter. Run it on a quiet machine.
    """
    with thread_count(1):
        times = time_interleaved(
            [make_runner(model, (picture,), "eager") for model in models], rounds=rounds, seconds=0.05
        )
    return [quotients(time, times[0]).median for time in times]
