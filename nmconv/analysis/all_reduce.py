"""Sums of several processes as if one had seen all their images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nmconv.analysis.map_moments import MapMoments
from nmconv.errors import FitError

__all__ = ["reduced"]


def reduced(all_sums: Sequence[MapMoments], images: int, device: torch.device) -> int:
    """Add up the sums of all processes of torch.distributed's default group, in place; of one process they stay.

    Every process must call this, with sums of the same activations in the same order.

    Args:
        all_sums: Changed.
        images: How many this process has seen.
        device: Where the group's backend can reduce.

    Returns:
        How many images all of them have seen.

    Raises:
        FitError: In all processes, if an activation has other channels in one than in another.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return images
    sizes = [0 if sums.mean is None else len(sums.mean) for sums in all_sums]
    bounds = torch.tensor([sizes, [-size if size else -(2**31) for size in sizes]], device=device)
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
    most, least = bounds[0].tolist(), (-bounds[1]).tolist()
    for sums, large, small in zip(all_sums, most, least, strict=True):
        if large and large != small:
            raise FitError(
                f"{sums.name} has {small} channels in one process and {large} in another: give them the same model"
            )
    seen = torch.tensor([images], dtype=torch.float64, device=device)
    vectors = [_vector(sums, size, device) for sums, size in zip(all_sums, most, strict=True)]
    whole = torch.cat([seen, *vectors])
    dist.all_reduce(whole)
    parts = whole[1:].split([len(vector) for vector in vectors])
    for sums, size, part in zip(all_sums, most, parts, strict=True):
        if size:
            sums.scatter = _taken(sums, size, part)
            dist.all_reduce(sums.scatter)
    return int(whole[0])


def _vector(sums: MapMoments, size: int, device: torch.device) -> Tensor:
    """What simply adds up: counts, then for each channel positive inputs and the sum of outputs."""
    numbers = [sums.given, sums.positions, sums.zeros, sums.norms, sums.images]
    head = torch.tensor(numbers, dtype=torch.float64, device=device)
    if sums.mean is None or sums.positive is None:
        return torch.cat([head, head.new_zeros(2 * size)])
    return torch.cat([head, sums.positive.to(head), sums.mean.to(head) * sums.positions])


def _taken(sums: MapMoments, size: int, part: Tensor) -> Tensor:
    """Let sums be those of all processes but for the scatter; gives this process's own, about the mean of all."""
    head, positive, total = part.split([5, size, size])
    positions = int(head[1])
    mean = total / positions
    scatter = part.new_zeros(size, size)
    if sums.mean is not None and sums.scatter is not None:
        shift = sums.mean.to(mean) - mean
        scatter = sums.scatter.to(mean) + torch.outer(shift, shift) * sums.positions
    sums.given, sums.positions, sums.zeros, sums.images = int(head[0]), positions, int(head[2]), int(head[4])
    sums.norms = float(head[3])
    sums.positive, sums.mean = positive, mean
    return scatter
