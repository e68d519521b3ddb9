"""The merged form: a unit becomes one convolution, of the exact merge's size or a smaller one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nmconv.algebra import Affine, Geometry, Refusal, filled, is_channels_last, laid_out, shrunk, taps_kept
from nmconv.errors import OptionError
from nmconv.finding import steps_of, takes_in
from nmconv.fitting.norm_statistics import is_kept, pass_through
from nmconv.fitting.normal_equations import Line, Rows
from nmconv.fitting.tasks import FitTask
from nmconv.flow import hooks_of
from nmconv.merging import (
    Merge,
    Segment,
    install,
    interior_affine,
    nodes_of,
    norms_behind,
    record,
    trains,
    with_flags,
    write_methods,
)
from nmconv.planning import Kernel

__all__ = ["MergedForm", "sizes_asked"]


class MergedForm:
    """A unit as one convolution: what it is composed to, smaller kernels of it, and putting one into the model.

    Args:
        model: Read only until :meth:`install`.
        unit: Of it.
        kernel: Its size.
        training: Whether its parameters are to require gradients.

    Raises:
        Refusal: If it cannot be one convolution, and why.
        OptionError: If the size is for another number of axes.
    """

    def __init__(self, model: nn.Module, unit: FitTask, kernel: Kernel) -> None:
        self._model = model
        self._unit = unit
        for step in steps_of(unit.elements):
            if step.kind == "conv" and ":" in step.name:
                raise Refusal(f"{step.name}: {step.why}")
            if step.why and not step.quiet:
                raise Refusal(f"{step.name}: {step.why}")
            if hooks_of(model.get_submodule(step.name)):
                raise Refusal(f"{step.name} has a hook, which would not run any more: remove it first")
        first: Any = model.get_submodule(unit.convs[0])
        size = getattr(first, "kernel_size", None)
        rank = len(size) if isinstance(size, tuple) else 2
        self._like: Tensor = first.weight
        self._last = is_channels_last(model)
        like = torch.empty(0, dtype=torch.float64, device="cpu")
        self._nodes = nodes_of(
            model.get_submodule, unit.elements, None, (256,) * rank, lambda name, geometry: geometry, {}
        )
        channels = getattr(first, "in_channels", 0)
        with torch.no_grad():
            affine = interior_affine(self._nodes, model.get_submodule, channels, rank, like).dense()
        if kernel.dense and affine.geometry.groups > 1:
            affine = _dense(affine)
        geometry = replace(affine.geometry, bias=True, bounded=())
        self.inputs = (unit.head,)
        self.geometry: Geometry = geometry
        self.has_intercept = True
        self.sizes = sizes_asked(kernel, geometry)
        bias = affine.bias if affine.bias is not None else affine.weight.new_zeros(geometry.out_channels)
        behind = norms_behind(Segment(self._nodes, geometry))
        kept = [name for name in behind if is_kept(model.get_submodule(name), geometry.out_channels)]
        self._norm = kept[-1] if kept else ""
        self._composed = Affine(geometry, affine.weight.detach(), bias.detach())
        self._takes = takes_in(unit.elements)
        _, self._failed = write_methods(model, [self._record(geometry)], self._takes)
        for error in self._failed.values():
            raise Refusal(str(error))

    def start(self, size: Sequence[int]) -> Line:
        """The composed kernel's middle, as a line."""
        groups = self.geometry.groups
        kept = taps_kept(self.geometry, size)
        weight = self._composed.weight[(slice(None), slice(None), *kept)]
        assert self._composed.bias is not None
        rows = weight.reshape(groups, weight.shape[0] // groups, -1).transpose(1, 2)
        device = self._like.device
        return Line(rows.to(device), self._composed.bias.reshape(groups, -1).to(device))

    def install(self, size: Sequence[int], line: Line, rows: Rows | None, flags: Iterable[tuple[str, str]]) -> Merge:
        """Put the convolution into the model.

        Args:
            size: Of its kernel.
            line: What it computes.
            rows: What it is given: the unit's last norm stays behind it, with the statistics of its output, which it
                passes on as it is in eval mode. None: no norm stays.
            flags: That must stay as they are, see :class:`nmconv.finding.LinearRun`.

        Returns:
            What was done.
        """
        made = self._record(shrunk(self.geometry, size))
        if rows is not None and self._norm:
            mean, variance = rows.spread(line.weight)
            mean = (mean + line.constant).flatten()
            if pass_through(self._model.get_submodule(self._norm), mean, variance.flatten()):
                removed = tuple(name for name in made.removed if name != self._norm)
                made = replace(made, norm=self._norm, removed=removed)
        (made,) = with_flags(self._model, [made], flags)
        methods, _ = write_methods(self._model, [made], self._takes)
        install(self._model, [made], {made.head: self.conv(size, line, made.trainable)}, methods)
        return made

    def conv(self, size: Sequence[int], line: Line, requires_grad: bool) -> nn.Module:
        """The convolution by itself, in the model's dtype."""
        geometry = shrunk(self.geometry, size)
        weight = line.weight.transpose(1, 2).reshape(geometry.out_channels, -1, *geometry.kernel)
        made = filled(Affine(geometry, weight, line.constant.flatten()), self._like, requires_grad)
        return laid_out(made, self._last)

    def _record(self, geometry: Geometry) -> Merge:
        trainable = trains(self._model.get_submodule, (step.name for step in steps_of(self._unit.elements)))
        return record(Segment(self._nodes, geometry), trainable, False)


def sizes_asked(kernel: Kernel, geometry: Geometry) -> list[tuple[int, ...]]:
    """Kernel sizes to try, smallest first: none larger than the exact merge's.

    Raises:
        OptionError: If the size is for another number of axes.
    """
    full = geometry.kernel
    if kernel.size == "exact":
        return [full]
    if kernel.size == "auto":
        steps = range(max(full) // 2, -1, -1)
        return list(dict.fromkeys(tuple(max(size - 2 * step, 1) for size in full) for step in steps))
    parts = [int(part) for part in kernel.size.split("x")]
    if len(parts) == 1:
        parts *= len(full)
    if len(parts) != len(full):
        name = f" for {kernel.convs[0]}" if kernel.convs else ""
        raise OptionError(f"kernel={kernel.size!r}{name}, where there are {len(full)} spatial axes")
    return [tuple(min(part, size) for part, size in zip(parts, full, strict=True))]


def _dense(affine: Affine) -> Affine:
    groups = affine.geometry.groups
    outputs, inputs = affine.weight.shape[:2]
    wide = affine.weight.new_zeros(groups, outputs // groups, groups, inputs, *affine.weight.shape[2:])
    at = torch.arange(groups)
    wide[at, :, at] = affine.weight.reshape(groups, outputs // groups, inputs, *affine.weight.shape[2:])
    weight = wide.reshape(outputs, groups * inputs, *affine.weight.shape[2:])
    return Affine(replace(affine.geometry, groups=1), weight, affine.bias)
