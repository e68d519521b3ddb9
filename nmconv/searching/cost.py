"""What a network and its segments cost: counted, or timed on the device at hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nmconv.algebra import Geometry, conv_module
from nmconv.finding import Join
from nmconv.merging import Node, fold_norms
from nmconv.searching.candidates import CandidateSegment, SearchSpace
from nmconv.timing import Summed, Timing, drawn, interleaved, noise, ratios, runner

__all__ = ["Stopwatch", "multiply_adds_of"]

_ROUNDS, _SECONDS = 7, 0.02


def multiply_adds_of(model: nn.Module, image: Tensor) -> int:
    """Of one forward of one image, in the mode it is in."""
    from torch.utils.flop_counter import FlopCounterMode  # here, since it imports triton

    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        model(image)
    return int(flops.get_total_flops()) // 2


class Stopwatch:
    """Times segments beside what replaces them; the same shapes are timed once.

    Args:
        network: Whose segments.
        image: One image, as a batch: gives dtype and device.
        backend: ``eager``, ``compile``, ``frozen`` or ``onnxruntime``.
    """

    def __init__(self, network: SearchSpace, image: Tensor, backend: str) -> None:
        self._network = network
        self._image = image
        self._backend = backend
        self._known: dict[Any, list[float]] = {}

    def whole(self, model: nn.Module) -> float:
        """Seconds for one image of a whole network, norms folded where they can be."""
        (found,) = self._timed(model)
        return found.median

    def faster(self, model: nn.Module, after: nn.Module) -> float:
        """The time of a whole network over that of another: the median over rounds in which both were timed."""
        return ratios(*self._timed(model, after)).median

    def _timed(self, *models: nn.Module) -> list[Timing]:
        runners = [runner(fold_norms(model), (self._image,), self._backend) for model in models]
        return interleaved(runners, rounds=15, seconds=0.1)

    def segment(self, segment: CandidateSegment, sizes: Sequence[tuple[int, ...]]) -> list[float]:
        """Seconds for one image of the segment as it is, and of one convolution of each size."""
        nodes = [node for block in segment.blocks for node in block.nodes]
        assert isinstance(segment.geometry, Geometry)
        made = [conv_module(segment.shape(size), self._image) for size in sizes]
        was = self._modules(nodes)
        key = (repr(was), nodes[0].sizes, tuple(sizes), segment.geometry)
        if key not in self._known:
            x = noise((1, segment.geometry.in_channels, *nodes[0].sizes), self._image)
            runners = [runner(drawn(side), (x,), self._backend) for side in (was, *made)]
            times = interleaved(runners, rounds=_ROUNDS, seconds=_SECONDS)
            self._known[key] = [found.median for found in times]
        return self._known[key]

    def branch(self, segment: CandidateSegment) -> float:
        """Seconds for one image of a residual branch that goes; NaN if its shapes are not known."""
        nodes = self._network.nodes_behind(segment.convs)
        if not nodes or not isinstance(nodes[0].geometry, Geometry):
            return math.nan
        was = self._modules(nodes)
        key = (repr(was), nodes[0].sizes)
        if key not in self._known:
            x = noise((1, nodes[0].geometry.in_channels, *nodes[0].sizes), self._image)
            (time,) = interleaved([runner(drawn(was), (x,), self._backend)], rounds=_ROUNDS, seconds=_SECONDS)
            self._known[key] = [time.median]
        return self._known[key][0]

    def _modules(self, nodes: Sequence[Node]) -> nn.Sequential:
        """Modules that take as long as the nodes do with their norms folded in, activations between them."""
        found: list[nn.Module] = []
        for number, node in enumerate(nodes):
            if isinstance(node.element, Join):
                found.append(Summed(*(self._modules(branch) for branch in node.branches)))
            elif node.element.kind == "conv" and isinstance(node.geometry, Geometry):
                found.append(conv_module(node.geometry, self._image))
            quiet = node.element.quiet  # where an activation was, too
            act = None if quiet or number + 1 == len(nodes) else self._network.activation_behind(node.element)
            if act is not None:
                found.append(copy.deepcopy(act))
        return nn.Sequential(*found)
