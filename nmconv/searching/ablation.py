"""Ablation: make one segment linear, leave everything else, and measure how far the model's output moves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nmconv.algebra import Refusal, center_slices, columns_of, patches, shrunk
from nmconv.finding import ValueLocation
from nmconv.fitting import (
    RIDGES,
    Divergence,
    Loss,
    MergedForm,
    Moments,
    divergence,
    fit_units,
    outputs_by_batch,
    select_ridge,
)
from nmconv.observing import Capture, Images, check_finite
from nmconv.planning import Kernel
from nmconv.searching.search_space import SearchSpace
from nmconv.searching.segments import CandidateSegment

__all__ = ["Ablation", "MeasuredSegment"]


@dataclass(frozen=True)
class MeasuredSegment:
    """A segment made linear in one way, measured.

    Attributes:
        size: Kernel size of the one convolution; () where there is none.
        error: Error of the segment's output on held-out images; NaN where nothing was fitted.
        divergence: Divergence of the model's output.
    """

    size: tuple[int, ...]
    error: float
    divergence: Divergence


class Ablation:
    """Measure segments of a model one by one, mostly by running the original with one value replaced.

    Args:
        space: The search space of the model, in eval mode.
        images: The images, some of them held out.
        loss: Measures the divergence, or None for the default.

    Attributes:
        unchanged_loss: The loss of the original against itself.
    """

    def __init__(self, space: SearchSpace, images: Images, loss: Loss | None) -> None:
        self._space = space
        self._images = images
        self._loss = loss
        self._held = True if images.held else None
        self._original_outputs = outputs_by_batch(space.model, images, self._held)
        self.unchanged_loss = divergence(self._original_outputs, self._original_outputs, loss).loss

    def measure_merged(self, segment: CandidateSegment, sizes: Sequence[tuple[int, ...]]) -> Iterator[MeasuredSegment]:
        """Replace the segment by one fitted convolution of each size.

        Raises:
            Refusal: If it cannot be one convolution, with the reason.
        """
        task = segment.task
        assert task is not None
        first_module = task.first_module
        form = MergedForm(self._space.linear, task, Kernel(segment.convs, "auto"))
        largest = shrunk(form.geometry, max(sizes))
        moments = (Moments(), Moments())  # fitted, held out
        with Capture(self._space.model, [task.output], [first_module]) as capture:
            for batch, held in self._images.batches():
                values = capture.run(batch)
                input, output = values[first_module], values[task.output]
                check_finite(input, f"{segment.convs[0]}'s input")
                check_finite(output, f"{segment.convs[-1]}'s output")
                for rows, targets in patches(input, output, largest):
                    moments[held].add(rows, targets)
        for size in sizes:
            columns = columns_of(largest, center_slices(largest, size), moments[0].square.device)
            fitted, held_out = (part.of_columns(columns) for part in moments)
            solution = select_ridge(fitted, held_out, form.initial(size), size, RIDGES, fit_intercept=True)
            conv = form.conv(size, solution.coefficients, False)

            def replaced(value: Tensor, values: Mapping[Any, Tensor], conv: Any = conv) -> Any:
                return conv(values[first_module])

            measured = self._divergence_with(task.output, replaced, inputs=[first_module])
            yield MeasuredSegment(size, solution.selection_error, measured)

    def measure_removed(self, segment: CandidateSegment) -> MeasuredSegment:
        """Remove the residual branch: its sum becomes the value that it is added to."""
        residual = segment.residual
        assert residual is not None
        location, kept = residual.location, residual.branch.sum.keep

        def shortcut(value: Tensor, values: Mapping[Any, Tensor]) -> Tensor:
            return values[location, kept].to(value.dtype).expand_as(value).contiguous()

        return MeasuredSegment((), math.nan, self._divergence_with(location, shortcut, operands={location: kept}))

    def measure_refitted(self, segment: CandidateSegment) -> MeasuredSegment:
        """Drop the segment's activations and refit its last convolution, by surgery on a copy.

        Raises:
            Refusal: If it cannot be refitted, with the reason.
        """
        model = self._space.converted(self._space.plan_of([(segment, "")]))
        units = fit_units(model, self._space.model, self._images)
        refused = [unit.why for unit in units if not unit.form]
        if refused:
            raise Refusal(refused[0])
        outputs = outputs_by_batch(model, self._images, self._held)
        error = max((unit.held_after for unit in units), default=math.nan)
        return MeasuredSegment((), error, divergence(outputs, self._original_outputs, self._loss))

    def _divergence_with(
        self,
        location: ValueLocation,
        replaced: Any,
        *,
        inputs: Sequence[str] = (),
        operands: Mapping[ValueLocation, int] | None = None,
    ) -> Divergence:
        """Return the divergence of the original with the value at one location replaced."""
        outputs = []
        capture = Capture(
            self._space.model, [location], inputs,
            full_forward=True, replace={location: replaced}, operands=operands,
        )  # fmt: skip
        with capture, torch.no_grad():
            for batch, _ in self._images.batches(self._held):
                capture.run(batch)
                outputs.append((len(batch), capture.output))
        return divergence(outputs, self._original_outputs, self._loss)
