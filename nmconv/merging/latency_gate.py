"""The latency gate: a run as it is beside its merged form, timed on the model's device, dtype and backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from nmconv.algebra import Geometry, Refusal, channels_last, composed, conv_module, laid_out
from nmconv.copying import copy_of
from nmconv.finding import Join, Step
from nmconv.merging.partitioning import Node, Segment
from nmconv.merging.report import called
from nmconv.recording import rng_restored
from nmconv.timing import Summed, drawn, interleaved, noise, ratios, runner

__all__ = ["LatencyGate", "is_slower"]

_HOPELESS = 0.6  # multiply-adds before over after below which nothing was ever faster (docs/merging.md)
_SAME = 0.99  # of a whole model, before over after: what is lower is slower, however much the timings vary
_AVERAGES = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
_ROUNDS = (7, 15)  # what passes is timed again, and only that counts: of many candidates some are lucky once


class LatencyGate:
    """Prices segments by measured time; the same geometry and shape are measured once.

    Only extents matter to time, so both sides are built from geometries with weights of their own, norms folded. A
    convolution whose padding was hoisted is timed as it was before.

    Args:
        like: A weight of the model: gives dtype and device.
        batch: Of the example inputs.
        backend: ``eager``, ``compile``, ``frozen`` or ``onnxruntime``.
        min_gain: What time before over time after must reach.
        before: From a module's name and geometry to the geometry before its padding was hoisted.
        last: Whether the model's weights, and what it is called with, are ``channels_last`` in memory.
    """

    def __init__(self, like: Tensor, batch: int, backend: str, min_gain: float, before: Any, last: bool) -> None:
        self._like, self._batch, self._backend, self._min_gain = like, batch, backend, min_gain
        self._before, self._last = before, last
        self._known: dict[Any, tuple[float, float]] = {}

    def price(self, segment: Segment) -> float | None:
        """Its multiply-adds less what it saves, time by far outweighing them; None if it is not faster."""
        if segment.cost < _HOPELESS * segment.merged_cost:
            return None
        saved, gain = self._measured(segment)
        return segment.cost - saved * 1e18 if gain >= self._min_gain else None

    def _measured(self, segment: Segment) -> tuple[float, float]:
        """Seconds saved, and time before over time after."""
        sizes = segment.nodes[0].sizes
        key = (_shape(segment.nodes, self._before), segment.geometry, sizes)
        if key not in self._known:
            x = noise((self._batch, segment.geometry.in_channels, *sizes), self._like)
            sides = (_sequence(segment.nodes, self._like, self._before), _conv(segment.geometry, self._like))
            if self._last:
                x = channels_last(x)
                for part in (module for side in sides for module in side.modules() if isinstance(module, _ConvNd)):
                    laid_out(part, True)
            runners = [runner(side.eval(), (x,), self._backend) for side in sides]
            for rounds in _ROUNDS:
                times = interleaved(runners, rounds=rounds, seconds=0.02)
                gain = ratios(times[0], times[1]).median
                if gain < self._min_gain:
                    break
            self._known[key] = (times[0].median - times[1].median, gain)
        return self._known[key]


def is_slower(before: nn.Module, after: nn.Module, example_inputs: Any, backend: str) -> bool:
    """Whether a whole model is slower than another: surely, or by more than a hundredth in the median.

    What makes runs faster one by one may cost the rest of the network its memory layout or its cache.

    Args:
        before: A model, which no one needs afterwards: it is called some dozens of times.
        after: Another; a copy of it is called.
        example_inputs: As of ``merge``; left alone.
        backend: As of ``merge``. Where it cannot run ``before`` as a whole, nothing is known, and the answer is no.
    """
    with rng_restored(before):
        return _is_slower(before, copy_of(after), example_inputs, backend)


def _is_slower(before: nn.Module, after: nn.Module, example_inputs: Any, backend: str) -> bool:
    runners = []
    for model in (before, after):
        for module in model.modules():  # a user's hook is none of timing's business
            module._forward_hooks.clear()
        try:
            call = _Call(model, example_inputs)
            runners.append(runner(call, call.values, backend))
        except Exception:  # whatever a backend, or a forward that is called more than once, may raise
            return bool(runners)
    try:
        # Not just below 1: a network of which little was merged is as fast as before, and would be refused at random.
        for rounds in _ROUNDS:
            found = ratios(*interleaved(runners, rounds=rounds, seconds=0.02))
            if found.upper < 1:
                return True
        return found.median < _SAME
    except Exception:
        return False


class _Call(nn.Module):
    """A model called on example inputs, as positional arguments only."""

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        super().__init__()
        self.model = model
        self.training = model.training  # and not of its parts, which may have modes of their own
        self.names = tuple(example_inputs) if isinstance(example_inputs, dict) else ()
        given = tuple(example_inputs.values()) if self.names else example_inputs
        self.values: tuple[Any, ...] = given if isinstance(given, tuple) else (given,)

    def forward(self, *values: Any) -> Any:
        return called(self.model, dict(zip(self.names, values, strict=True)) if self.names else values)


def _shape(nodes: Sequence[Node], before: Any) -> Any:
    return tuple(
        tuple(_shape(branch, before) for branch in node.branches)
        if isinstance(node.element, Join)
        else _was(node, before)
        for node in nodes
    )


def _was(node: Node, before: Any) -> Geometry:
    assert isinstance(node.element, Step)
    return before(node.element.name, node.geometry)


def _sequence(nodes: Sequence[Node], like: Tensor, before: Any) -> nn.Sequential:
    """Modules that take as long as the nodes do with their norms and padding folded in."""
    found: list[nn.Module] = []
    held: Geometry | None = None

    def flush() -> None:
        nonlocal held
        if held is not None:
            found.append(_conv(held, like))
        held = None

    for node in nodes:
        if isinstance(node.element, Join):
            flush()
            found.append(Summed(*(_sequence(branch, like, before) for branch in node.branches)))
        elif node.element.kind == "conv":
            if held is not None and held.weights > held.in_channels:
                flush()
            held = _joined(held, _was(node, before), flush)
        elif node.element.kind == "pool":
            flush()
            assert isinstance(node.geometry, Geometry)
            pool: Any = _AVERAGES[node.geometry.rank]
            found.append(pool(node.geometry.kernel, node.geometry.stride))
        elif node.element.kind in ("norm", "pad"):
            held = _joined(held, _was(node, before), flush)
    flush()
    return nn.Sequential(*found)


def _joined(held: Geometry | None, geometry: Geometry, flush: Any) -> Geometry:
    if held is None:
        return geometry
    try:
        return composed(held, geometry)
    except Refusal:
        flush()
        return geometry


def _conv(geometry: Geometry, like: Tensor) -> nn.Module:
    return drawn(conv_module(geometry, like))
