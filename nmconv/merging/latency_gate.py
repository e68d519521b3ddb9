"""The latency gate: runs and their merged forms timed on the model's device and dtype and on a backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from nmconv.algebra import Geometry, Refusal, channels_last, compose_geometries, conv_module, in_memory_format
from nmconv.copying import copy_model
from nmconv.finding import ParallelSum, Step
from nmconv.merging.example_outputs import call_model
from nmconv.merging.nodes import RunNode
from nmconv.merging.partitioning import Segment
from nmconv.recording import rng_restored
from nmconv.timing import Summed, fixed_normal, make_runner, quotients, randomize_weights, time_interleaved

__all__ = ["LatencyGate", "is_slower"]

_HOPELESS = 0.6  # multiply-adds before over after, below which no merge was ever faster (docs/merging.md)
_BREAK_EVEN = 0.99  # time before over after of a whole model, below which it counts as slower despite the spread
_SECOND = 1e18  # in multiply-adds: seconds saved outweigh all multiply-adds
_AVERAGES = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
_ROUNDS = (7, 15)  # what passes is timed again, and only the second timing counts: of many candidates some pass by luck

Unhoisted = Callable[[str, Any], Any]  # from a module's name and geometry to its geometry before hoisting


class LatencyGate:
    """Price segments by measured time; measure equal geometries and shapes once.

    Values do not affect time, so both sides are built from geometries with random weights, norms folded. A convolution
    whose padding was hoisted is timed as before hoisting.

    Args:
        like: A weight of the model, with its dtype and device.
        batch: Batch size of the example inputs.
        backend: ``eager``, ``compile``, ``frozen`` or ``onnxruntime``.
        min_gain: Least time before over time after.
        unhoisted: Returns a module's geometry before its padding was hoisted, from its name and geometry.
        is_channels_last: Whether the model's weights and inputs are ``channels_last`` in memory.
    """

    def __init__(
        self, like: Tensor, batch: int, backend: str, min_gain: float, unhoisted: Unhoisted, is_channels_last: bool
    ) -> None:
        self._like, self._batch, self._backend, self._min_gain = like, batch, backend, min_gain
        self._unhoisted, self._is_channels_last = unhoisted, is_channels_last
        self._cache: dict[Any, tuple[float, float]] = {}

    def price(self, segment: Segment) -> float | None:
        """Return the cost as one convolution, its measured time included, or None if it is not faster."""
        if segment.cost < _HOPELESS * segment.merged_cost:
            return None
        saved, gain = self._measured(segment)
        return segment.cost - saved * _SECOND if gain >= self._min_gain else None

    def _measured(self, segment: Segment) -> tuple[float, float]:
        """Return the seconds saved, and time before over time after."""
        sizes = segment.nodes[0].input_sizes
        key = (_geometries(segment.nodes, self._unhoisted), segment.geometry, sizes)
        if key not in self._cache:
            x = fixed_normal((self._batch, segment.geometry.in_channels, *sizes), self._like)
            before = _unmerged_modules(segment.nodes, self._like, self._unhoisted)
            after = _random_conv(segment.geometry, self._like)
            if self._is_channels_last:
                x = channels_last(x)
                for conv in (each for side in (before, after) for each in side.modules() if isinstance(each, _ConvNd)):
                    in_memory_format(conv, True)
            runners = [make_runner(side.eval(), (x,), self._backend) for side in (before, after)]
            for rounds in _ROUNDS:
                times = time_interleaved(runners, rounds=rounds, seconds=0.02)
                gain = quotients(times[0], times[1]).median
                if gain < self._min_gain:
                    break
            self._cache[key] = (times[0].median - times[1].median, gain)
        return self._cache[key]


def is_slower(before: nn.Module, after: nn.Module, example_inputs: Any, backend: str) -> bool:
    """Return whether a whole model is slower than another: significantly, or by more than 1 % in the median.

    Merges that are faster one by one may cost the rest of the network its memory layout or its cache.

    Args:
        before: A model that is not used afterwards; it is called some dozens of times.
        after: Another model; a copy of it is called.
        example_inputs: As for ``merge``; they are not changed.
        backend: As for ``merge``. If it cannot run ``before`` as a whole, the result is False.
    """
    with rng_restored(before):
        return _is_slower(before, copy_model(after), example_inputs, backend)


def _is_slower(before: nn.Module, after: nn.Module, example_inputs: Any, backend: str) -> bool:
    runners = []
    for model in (before, after):
        for module in model.modules():  # do not time the user's hooks
            module._forward_hooks.clear()
        try:
            call = _Call(model, example_inputs)
            runners.append(make_runner(call, call.values, backend))
        except Exception:  # a backend, or a forward that is called more than once, can raise anything
            return bool(runners)
    try:
        # With a threshold just below 1, noise would decide where little was merged and the speed is the same.
        for rounds in _ROUNDS:
            gain = quotients(*time_interleaved(runners, rounds=rounds, seconds=0.02))
            if gain.upper < 1:
                return True
        return gain.median < _BREAK_EVEN
    except Exception:
        return False


class _Call(nn.Module):
    """A model that is called on example inputs as positional arguments only."""

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        super().__init__()
        self.model = model
        self.training = model.training  # without changing the modes of its parts
        self.names = tuple(example_inputs) if isinstance(example_inputs, dict) else ()
        values = tuple(example_inputs.values()) if self.names else example_inputs
        self.values: tuple[Any, ...] = values if isinstance(values, tuple) else (values,)

    def forward(self, *values: Any) -> Any:
        return call_model(self.model, dict(zip(self.names, values, strict=True)) if self.names else values)


def _geometries(nodes: Sequence[RunNode], unhoisted: Unhoisted) -> Any:
    """Return the nested geometries of nodes, as a key."""
    return tuple(
        tuple(_geometries(branch, unhoisted) for branch in node.branches)
        if isinstance(node.element, ParallelSum)
        else _unhoisted_geometry(node, unhoisted)
        for node in nodes
    )


def _unhoisted_geometry(node: RunNode, unhoisted: Unhoisted) -> Geometry:
    assert isinstance(node.element, Step)
    geometry: Geometry = unhoisted(node.element.name, node.geometry)
    return geometry


def _unmerged_modules(nodes: Sequence[RunNode], like: Tensor, unhoisted: Unhoisted) -> nn.Sequential:
    """Return modules that take as long as the nodes do with their norms and padding folded in."""
    modules: list[nn.Module] = []
    open_conv: Geometry | None = None  # what norms and padding can still be folded into

    def close() -> None:
        nonlocal open_conv
        if open_conv is not None:
            modules.append(_random_conv(open_conv, like))
        open_conv = None

    def fold(geometry: Geometry) -> None:
        nonlocal open_conv
        try:
            open_conv = geometry if open_conv is None else compose_geometries(open_conv, geometry)
        except Refusal:
            close()
            open_conv = geometry

    for node in nodes:
        if isinstance(node.element, ParallelSum):
            close()
            modules.append(Summed(*(_unmerged_modules(branch, like, unhoisted) for branch in node.branches)))
        elif node.element.kind == "conv":
            if open_conv is not None and open_conv.weights > open_conv.in_channels:
                close()
            fold(_unhoisted_geometry(node, unhoisted))
        elif node.element.kind == "pool":
            close()
            assert isinstance(node.geometry, Geometry)
            pool: Any = _AVERAGES[node.geometry.rank]
            modules.append(pool(node.geometry.kernel, node.geometry.stride))
        elif node.element.kind in ("norm", "pad"):
            fold(_unhoisted_geometry(node, unhoisted))
    close()
    return nn.Sequential(*modules)


def _random_conv(geometry: Geometry, like: Tensor) -> nn.Module:
    return randomize_weights(conv_module(geometry, like))
