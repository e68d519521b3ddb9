"""One segment made linear, everything else as it was: how far the network's output goes astray."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nmconv.algebra import Refusal, columns_of, patches, shrunk, taps_kept
from nmconv.finding import ValueLocation
from nmconv.fitting import (
    RIDGES,
    Capture,
    Divergence,
    Images,
    Loss,
    MergedForm,
    Moments,
    RidgeSolution,
    check_finite,
    divergence,
    fit_units,
    outputs_of,
    solved,
)
from nmconv.planning import Kernel
from nmconv.searching.candidates import CandidateSegment, SearchSpace

__all__ = ["Ablation", "MeasuredSegment"]


@dataclass(frozen=True)
class MeasuredSegment:
    """A segment in one form.

    Attributes:
        size: Of the one convolution; () where there is none.
        error: Of its output on held-out images; NaN where nothing was fitted.
        divergence: Of the network's output.
    """

    size: tuple[int, ...]
    error: float
    divergence: Divergence


class Ablation:
    """Measures segments of a network one by one. The network is run as it is, with one value replaced.

    Args:
        network: In eval mode.
        images: Some of them held out.
        loss: What tells how far outputs are apart, or None.

    Attributes:
        floor: Of the loss, where nothing is changed.
    """

    def __init__(self, network: SearchSpace, images: Images, loss: Loss | None) -> None:
        self._network = network
        self._images = images
        self._loss = loss
        self._held = True if images.held else None
        self._wanted = outputs_of(network.model, images, self._held)
        self.floor = divergence(self._wanted, self._wanted, loss).loss

    def merged(self, segment: CandidateSegment, sizes: Sequence[tuple[int, ...]]) -> Iterator[MeasuredSegment]:
        """One convolution in its place, of each size, fitted.

        Raises:
            Refusal: If it cannot be one convolution, and why.
        """
        unit = segment.unit
        assert unit is not None
        form = MergedForm(self._network.linear, unit, Kernel(segment.convs, "auto"))
        base = shrunk(form.geometry, max(sizes))
        sums = (Moments(), Moments())
        with Capture(self._network.model, [unit.end], [unit.head]) as watch:
            for batch, held in self._images.batches():
                seen = watch.run(batch)
                check_finite(seen[unit.head], f"{segment.convs[0]}'s input")
                check_finite(seen[unit.end], f"{segment.convs[-1]}'s output")
                for rows, targets in patches(seen[unit.head], seen[unit.end], base):
                    sums[held].add(rows, targets)
        for size in sizes:
            columns = columns_of(base, taps_kept(base, size), sums[0].square.device)
            inner, outer = (part.of_columns(columns) for part in sums)
            answer: RidgeSolution = solved(inner, outer, form.start(size), size, RIDGES, intercept=True)
            conv = form.conv(size, answer.line, False)
            yield MeasuredSegment(size, answer.judged, self._replaced(unit.end, unit.head, conv))

    def gone(self, segment: CandidateSegment) -> MeasuredSegment:
        """The residual branch not added."""
        residual = segment.residual
        assert residual is not None

        spot, keep = residual.spot, residual.branch.sum.keep

        def without(value: Tensor, seen: Mapping[Any, Tensor]) -> Tensor:
            return seen[spot, keep].to(value.dtype).expand_as(value).contiguous()

        found = self._divergence([spot], [], {spot: without}, {spot: keep})
        return MeasuredSegment((), math.nan, found)

    def refitted(self, segment: CandidateSegment) -> MeasuredSegment:
        """Its activations dropped and its last convolution refitted, by surgery on a copy.

        Raises:
            Refusal: If it cannot be refitted, and why.
        """
        model = self._network.converted(self._network.plan_of([(segment, "")]))
        units = fit_units(model, self._network.model, self._images)
        refused = [unit.why for unit in units if not unit.form]
        if refused:
            raise Refusal(refused[0])
        outputs = outputs_of(model, self._images, self._held)
        error = max((unit.held_after for unit in units), default=math.nan)
        return MeasuredSegment((), error, divergence(outputs, self._wanted, self._loss))

    def _replaced(self, end: ValueLocation, head: str, conv: nn.Module) -> Divergence:
        def instead(value: Tensor, seen: Mapping[Any, Tensor]) -> Tensor:
            made: Tensor = conv(seen[head])
            return made

        return self._divergence([end], [head], {end: instead})

    def _divergence(
        self,
        spots: list[ValueLocation],
        inputs: list[str],
        replace: Any,
        operands: Mapping[ValueLocation, int] | None = None,
    ) -> Divergence:
        outputs = []
        watch = Capture(self._network.model, spots, inputs, whole=True, replace=replace, operands=operands)
        with watch, torch.no_grad():
            for batch, _ in self._images.batches(self._held):
                watch.run(batch)
                outputs.append((len(batch), watch.output))
        return divergence(outputs, self._wanted, self._loss)
