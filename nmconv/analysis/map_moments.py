"""Moments of one activation's maps, accumulated over batches and, with torch.distributed, over processes.

Two sets of n and m positions with means a and b and scatter matrices A and B have together the mean
a + (b - a)·m/(n + m) and the scatter matrix A + B + (b - a)(b - a)ᵀ·n·m/(n + m) (Chan, Golub and LeVeque 1979).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nmconv.errors import FitError

__all__ = ["MapMoments", "all_reduce_moments"]

_CHUNK_SIZE = 2**22  # numbers converted to float64 at a time


class MapMoments:
    """Running sums over one activation's inputs and outputs, in float64 on the device of the first map.

    Args:
        name: The activation's id, for error messages.
        axis: The channel axis of its maps. A tensor with fewer than two axes has one channel.

    Attributes:
        input_positions: Number of input positions, that is, of values per channel.
        positive_inputs: ``[channels]``, number of inputs above 0; None before the first input.
        output_positions: Number of output positions.
        output_zeros: Number of output values that are exactly 0, over all channels.
        mean: ``[channels]``, mean of the outputs; None before the first output.
        scatter: ``[channels, channels]``, sum of (y - mean)(y - mean)ᵀ over positions; None before the first output.
        gradient_norms: Sum over images of the gradient's L2 norm.
        gradient_images: Number of images whose gradient was requested.
    """

    def __init__(self, name: str, axis: int) -> None:
        self.name = name
        self.axis = axis
        self.input_positions = 0
        self.positive_inputs: Tensor | None = None
        self.output_positions = 0
        self.output_zeros = 0
        self.mean: Tensor | None = None
        self.scatter: Tensor | None = None
        self.gradient_norms = 0.0
        self.gradient_images = 0

    def add_input(self, value: Tensor) -> None:
        """Add an input of any shape."""
        if not value.numel():
            return
        rows = self._as_rows(value)
        positive = (rows > 0).sum(0)
        if self.positive_inputs is not None:
            self._check_channels(self.positive_inputs, positive)
            positive = self.positive_inputs + positive
        self.positive_inputs = positive
        self.input_positions += len(rows)

    def add_output(self, value: Tensor) -> None:
        """Add an output of any shape."""
        if not value.numel():
            return
        rows = self._as_rows(value)
        self.output_zeros += int((rows == 0).sum())
        for chunk in rows.split(max(1, _CHUNK_SIZE // max(1, rows.shape[1]))):
            chunk = chunk.double()
            mean = chunk.mean(0)
            centered = chunk - mean
            self._add_moments(len(chunk), mean, centered.T @ centered)

    def add_gradient(self, gradient: Tensor, scale: float) -> None:
        """Add the L2 norm of each image's gradient times ``scale``; the first axis counts images."""
        if gradient.numel():
            norms = gradient.double().reshape(len(gradient), -1).norm(dim=1)
            self.gradient_norms += scale * float(norms.sum())

    def _add_moments(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        """Combine the moments so far with those of ``count`` more positions, by Chan's formula."""
        if self.mean is None or self.scatter is None:
            self.output_positions, self.mean, self.scatter = count, mean, scatter
            return
        self._check_channels(self.mean, mean)
        shift = mean - self.mean
        total = self.output_positions + count
        self.mean = self.mean + shift * (count / total)
        self.scatter += scatter
        self.scatter += torch.outer(shift, shift) * (self.output_positions * count / total)
        self.output_positions = total

    def _as_rows(self, value: Tensor) -> Tensor:
        """Return the value as ``[positions, channels]``."""
        if value.dim() < 2:
            return value.reshape(-1, 1)
        channels_last = value.movedim(self.axis, -1)
        return channels_last.reshape(-1, channels_last.shape[-1])

    def _check_channels(self, before: Tensor, now: Tensor) -> None:
        if before.shape != now.shape:
            raise FitError(
                f"{self.name} is called with {len(now)} channels, after a call with {len(before)}: statistics need one "
                "number of channels; give images of one kind, or a model that does not share the module around it"
            )


def all_reduce_moments(all_moments: Sequence[MapMoments], images: int, device: torch.device) -> int:
    """Sum the moments over all processes of torch.distributed's default group, in place.

    Every process must call this with the moments of the same activations in the same order. Without an initialized
    process group, nothing changes.

    Args:
        all_moments: This process's moments; replaced by those of all processes.
        images: Number of images that this process has seen.
        device: A device on which the group's backend can reduce.

    Returns:
        The number of images that all processes have seen.

    Raises:
        FitError: In all processes, if an activation's number of channels differs between processes.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return images
    channels = _common_channels(all_moments, device)
    image_count = torch.tensor([images], dtype=torch.float64, device=device)
    vectors = [_pack(moments, count, device) for moments, count in zip(all_moments, channels, strict=True)]
    packed = torch.cat([image_count, *vectors])
    dist.all_reduce(packed)
    parts = packed[1:].split([len(vector) for vector in vectors])
    for moments, count, part in zip(all_moments, channels, parts, strict=True):
        if count:
            moments.scatter = _unpack(moments, count, part)
            dist.all_reduce(moments.scatter)
    return int(packed[0])


def _common_channels(all_moments: Sequence[MapMoments], device: torch.device) -> list[int]:
    """Return each activation's number of channels, 0 where no process has seen an output.

    Raises:
        FitError: If it differs between processes that have seen outputs.
    """
    import torch.distributed as dist

    channels = [0 if moments.mean is None else len(moments.mean) for moments in all_moments]
    # The maximum of the negated numbers is the minimum; a process without outputs must not count in it.
    bounds = torch.tensor([channels, [-count if count else -(2**31) for count in channels]], device=device)
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
    largest, smallest = bounds[0].tolist(), (-bounds[1]).tolist()
    for moments, high, low in zip(all_moments, largest, smallest, strict=True):
        if high and high != low:
            raise FitError(
                f"{moments.name} has {low} channels in one process and {high} in another: give them the same model"
            )
    return largest


def _pack(moments: MapMoments, channels: int, device: torch.device) -> Tensor:
    """Return the additive part: the counts, then per channel the positive inputs and the sum of outputs."""
    counts = [
        moments.input_positions,
        moments.output_positions,
        moments.output_zeros,
        moments.gradient_norms,
        moments.gradient_images,
    ]
    head = torch.tensor(counts, dtype=torch.float64, device=device)
    if moments.mean is None or moments.positive_inputs is None:
        return torch.cat([head, head.new_zeros(2 * channels)])
    return torch.cat([head, moments.positive_inputs.to(head), moments.mean.to(head) * moments.output_positions])


def _unpack(moments: MapMoments, channels: int, packed: Tensor) -> Tensor:
    """Store the sums of all processes; return this process's scatter matrix about the mean of all processes."""
    head, positive, total = packed.split([5, channels, channels])
    positions = int(head[1])
    mean = total / positions
    scatter = packed.new_zeros(channels, channels)
    if moments.mean is not None and moments.scatter is not None:
        shift = moments.mean.to(mean) - mean
        scatter = moments.scatter.to(mean) + torch.outer(shift, shift) * moments.output_positions
    moments.input_positions, moments.output_positions, moments.output_zeros = int(head[0]), positions, int(head[2])
    moments.gradient_norms, moments.gradient_images = float(head[3]), int(head[4])
    moments.positive_inputs, moments.mean = positive, mean
    return scatter
