"""The cost of a model and its segments: count multiply-adds, and time latency on the model's device."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nmconv.algebra import Geometry, conv_module
from nmconv.finding import ParallelSum
from nmconv.merging import RunNode, fold_norms
from nmconv.searching.search_space import SearchSpace
from nmconv.searching.segments import CandidateSegment
from nmconv.timing import Summed, Timing, fixed_normal, make_runner, quotients, randomize_weights, time_interleaved

__all__ = ["Stopwatch", "multiply_adds_of"]

_SEGMENT_ROUNDS, _SEGMENT_SECONDS = 7, 0.02
_MODEL_ROUNDS, _MODEL_SECONDS = 15, 0.1


def multiply_adds_of(model: nn.Module, image: Tensor) -> int:
    """Return the multiply-adds of one forward of one image, in the model's present mode."""
    from torch.utils.flop_counter import FlopCounterMode  # imported here, as it imports triton

    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        model(image)
    return int(flops.get_total_flops()) // 2


class Stopwatch:
    """Time segments side by side with their replacements; time equal shapes once.

    Args:
        space: The search space whose segments are timed.
        image: One image, as a batch: determines dtype and device.
        backend: ``eager``, ``compile``, ``frozen`` or ``onnxruntime``.
    """

    def __init__(self, space: SearchSpace, image: Tensor, backend: str) -> None:
        self._space = space
        self._image = image
        self._backend = backend
        self._cache: dict[Any, list[float]] = {}

    def model_seconds(self, model: nn.Module) -> float:
        """Return the seconds of a model for one image, norms folded where possible."""
        (timing,) = self._time_models(model)
        return timing.median

    def speedup(self, model: nn.Module, faster: nn.Module) -> float:
        """Return the time of one model over that of another: the median over rounds in which both were timed."""
        return quotients(*self._time_models(model, faster)).median

    def segment_seconds(self, segment: CandidateSegment, sizes: Sequence[tuple[int, ...]]) -> list[float]:
        """Return the seconds of the segment for one image, and of one convolution of each size."""
        nodes = [node for block in segment.blocks for node in block.nodes]
        assert isinstance(segment.geometry, Geometry)
        original = self._modules(nodes)
        replacements = [conv_module(segment.replacement(size), self._image) for size in sizes]
        key = (repr(original), nodes[0].input_sizes, tuple(sizes), segment.geometry)
        shape = (segment.geometry.in_channels, *nodes[0].input_sizes)
        return self._time_modules(key, [original, *replacements], shape)

    def branch_seconds(self, segment: CandidateSegment) -> float:
        """Return the seconds of a residual branch for one image; NaN if its shapes are unknown."""
        nodes = self._space.nodes_of(segment.convs)
        if not nodes or not isinstance(nodes[0].geometry, Geometry):
            return math.nan
        branch = self._modules(nodes)
        shape = (nodes[0].geometry.in_channels, *nodes[0].input_sizes)
        (seconds,) = self._time_modules((repr(branch), nodes[0].input_sizes), [branch], shape)
        return seconds

    def _time_models(self, *models: nn.Module) -> list[Timing]:
        runners = [make_runner(fold_norms(model), (self._image,), self._backend) for model in models]
        return time_interleaved(runners, rounds=_MODEL_ROUNDS, seconds=_MODEL_SECONDS)

    def _time_modules(self, key: Any, modules: Sequence[nn.Module], shape: tuple[int, ...]) -> list[float]:
        if key not in self._cache:
            input = fixed_normal((1, *shape), self._image)
            runners = [make_runner(randomize_weights(module), (input,), self._backend) for module in modules]
            timings = time_interleaved(runners, rounds=_SEGMENT_ROUNDS, seconds=_SEGMENT_SECONDS)
            self._cache[key] = [timing.median for timing in timings]
        return self._cache[key]

    def _modules(self, nodes: Sequence[RunNode]) -> nn.Sequential:
        """Return modules that take as long as the nodes do with norms folded, and the activations between them."""
        modules: list[nn.Module] = []
        for number, node in enumerate(nodes):
            if isinstance(node.element, ParallelSum):
                modules.append(Summed(*(self._modules(branch) for branch in node.branches)))
            elif node.element.kind == "conv" and isinstance(node.geometry, Geometry):
                modules.append(conv_module(node.geometry, self._image))
            # A dropped activation is an identity in the run: it is found after the element that precedes it.
            is_last = number + 1 == len(nodes)
            act = None if node.element.is_identity or is_last else self._space.activation_after(node.element)
            if act is not None:
                modules.append(copy.deepcopy(act))
        return nn.Sequential(*modules)
