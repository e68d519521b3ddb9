"""The merged form: a unit becomes one convolution, of the exact merge's size or a smaller one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nmconv.algebra import (
    Affine,
    Geometry,
    Refusal,
    center_slices,
    conv_from_affine,
    in_memory_format,
    is_channels_last,
    shrunk,
)
from nmconv.errors import OptionError
from nmconv.finding import argument_structures, steps_of
from nmconv.fitting.norm_statistics import can_be_identity, make_identity
from nmconv.fitting.ridge_regression import Coefficients, Regression
from nmconv.fitting.tasks import FitTask
from nmconv.flow import hooks_of
from nmconv.merging import (
    Merge,
    Segment,
    any_requires_grad,
    install,
    interior_affine,
    merge_of_segment,
    nodes_of,
    norms_after,
    rewrite_forwards,
    with_attribute_guards,
)
from nmconv.planning import Kernel

__all__ = ["MergedForm", "kernel_sizes"]


class MergedForm:
    """A unit as one convolution: the composed kernel, smaller kernels at its center, and their installation.

    Args:
        model: Only read until :meth:`install`.
        task: A fit of this model.
        kernel: The kernel's size.

    Attributes:
        geometry: The composed convolution's geometry, away from the border.
        input_module: Qualified name of the module whose input is the regression's input.
        sizes: Kernel sizes to try, smallest first.

    Raises:
        Refusal: If the unit cannot be one convolution, with the reason.
        OptionError: If the size has another number of spatial axes.
    """

    def __init__(self, model: nn.Module, task: FitTask, kernel: Kernel) -> None:
        self._model = model
        self._task = task
        self._check_steps()
        first: Any = model.get_submodule(task.convs[0])
        kernel_size = getattr(first, "kernel_size", None)
        rank = len(kernel_size) if isinstance(kernel_size, tuple) else 2
        self._like: Tensor = first.weight
        self._channels_last = is_channels_last(model)
        self._nodes = nodes_of(model.get_submodule, task.elements, None, (256,) * rank)
        affine = self._composed_affine(getattr(first, "in_channels", 0), rank)
        if kernel.dense and affine.geometry.groups > 1:
            affine = _without_groups(affine)
        geometry = replace(affine.geometry, bias=True, bounded=())
        self.input_module = task.first_module
        self.geometry: Geometry = geometry
        self.sizes = kernel_sizes(kernel, geometry)
        bias = affine.bias if affine.bias is not None else affine.weight.new_zeros(geometry.out_channels)
        norms = norms_after(Segment(self._nodes, geometry))
        kept = [name for name in norms if can_be_identity(model.get_submodule(name), geometry.out_channels)]
        self._norm = kept[-1] if kept else ""
        self._composed = Affine(geometry, affine.weight.detach(), bias.detach())
        self._argument_structures = argument_structures(task.elements)
        _, failed = rewrite_forwards(model, [self._record(geometry)], self._argument_structures)
        for error in failed.values():
            raise Refusal(str(error))

    def initial(self, size: Sequence[int]) -> Coefficients:
        """Return the center of the composed kernel, cut to a size."""
        groups = self.geometry.groups
        kept = center_slices(self.geometry, size)
        weight = self._composed.weight[(slice(None), slice(None), *kept)]
        assert self._composed.bias is not None
        weight = weight.reshape(groups, weight.shape[0] // groups, -1).transpose(1, 2)
        device = self._like.device
        return Coefficients(weight.to(device), self._composed.bias.reshape(groups, -1).to(device))

    def install(
        self,
        size: Sequence[int],
        coefficients: Coefficients,
        regression: Regression | None,
        flags: Iterable[tuple[str, str]],
    ) -> Merge:
        """Put the convolution into the model, in place of the unit.

        Args:
            size: Size of its kernel.
            coefficients: What it computes.
            regression: Gives the statistics of its output: the unit's last norm stays after it as the identity in eval
                mode. None: no norm stays.
            flags: Attributes that must keep their values, see :class:`nmconv.finding.LinearRun`.

        Returns:
            The record of what was done.
        """
        merge = self._record(shrunk(self.geometry, size))
        if regression is not None and self._norm:
            mean, variance = regression.output_statistics(coefficients.weight)
            mean = (mean + coefficients.intercept).flatten()
            if make_identity(self._model.get_submodule(self._norm), mean, variance.flatten()):
                removed = tuple(name for name in merge.removed if name != self._norm)
                merge = replace(merge, norm=self._norm, removed=removed)
        (merge,) = with_attribute_guards(self._model, [merge], flags)
        methods, _ = rewrite_forwards(self._model, [merge], self._argument_structures)
        install(self._model, [merge], {merge.head: self.conv(size, coefficients, merge.trainable)}, methods)
        return merge

    def conv(self, size: Sequence[int], coefficients: Coefficients, requires_grad: bool) -> nn.Module:
        """Return the convolution by itself, in the model's dtype."""
        geometry = shrunk(self.geometry, size)
        weight = coefficients.weight.transpose(1, 2).reshape(geometry.out_channels, -1, *geometry.kernel)
        conv = conv_from_affine(Affine(geometry, weight, coefficients.intercept.flatten()), self._like, requires_grad)
        return in_memory_format(conv, self._channels_last)

    def _check_steps(self) -> None:
        for step in steps_of(self._task.elements):
            if step.kind == "conv" and ":" in step.name:
                raise Refusal(f"{step.name}: {step.why}")
            if step.why and not step.is_identity:
                raise Refusal(f"{step.name}: {step.why}")
            if hooks_of(self._model.get_submodule(step.name)):
                raise Refusal(f"{step.name} has a hook, which would no longer run: remove the hook first")

    def _composed_affine(self, channels: int, rank: int) -> Affine:
        like = torch.empty(0, dtype=torch.float64, device="cpu")
        with torch.no_grad():
            return interior_affine(self._nodes, self._model.get_submodule, channels, rank, like).dense()

    def _record(self, geometry: Geometry) -> Merge:
        trainable = any_requires_grad(self._model.get_submodule, (step.name for step in steps_of(self._task.elements)))
        return merge_of_segment(Segment(self._nodes, geometry), trainable, False)


def kernel_sizes(kernel: Kernel, geometry: Geometry) -> list[tuple[int, ...]]:
    """Return the kernel sizes to try, smallest first, none larger than the exact merge's.

    Raises:
        OptionError: If the size has another number of spatial axes.
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
        raise OptionError(
            f"kernel={kernel.size!r}{name} has {len(parts)} extents for {len(full)} spatial axes: give one number, or "
            "one for each axis"
        )
    return [tuple(min(part, size) for part, size in zip(parts, full, strict=True))]


def _without_groups(affine: Affine) -> Affine:
    """Return the same map as a dense, block-diagonal weight."""
    groups = affine.geometry.groups
    outputs, inputs, *kernel = affine.weight.shape
    blocks = affine.weight.new_zeros(groups, outputs // groups, groups, inputs, *kernel)
    diagonal = torch.arange(groups)
    blocks[diagonal, :, diagonal] = affine.weight.reshape(groups, outputs // groups, inputs, *kernel)
    return Affine(replace(affine.geometry, groups=1), blocks.reshape(outputs, groups * inputs, *kernel), affine.bias)
