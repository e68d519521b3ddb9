"""The factors form: only a unit's last convolution and its norms change; keys, shapes and classes stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nmconv.algebra import Geometry, Refusal, geometry_of, has_plain_parameter, scale_and_shift_of
from nmconv.finding import Element, ParallelSum
from nmconv.fitting.norm_statistics import assign, has_bias, set_input_statistics
from nmconv.fitting.ridge_regression import Coefficients, Regression
from nmconv.fitting.tasks import FitTask

__all__ = ["FactorsForm"]


@dataclass(frozen=True, eq=False)
class _Norms:
    """The norms after a convolution combined: ``out = scale · in + shift``, each ``[channels]``, in float64."""

    modules: tuple[Any, ...]
    scale: Tensor
    shift: Tensor


class FactorsForm:
    """The last convolution of a unit, refitted through the norms after it.

    Args:
        model: Only read until :meth:`install`.
        task: A fit of this model.

    Attributes:
        geometry: The last convolution's geometry.
        has_intercept: Whether the convolution or its last norm has a bias that can be fitted.
        input_module: Qualified name of the last convolution, whose input is the regression's input.
        initial: What convolution and norms compute now; errors are measured after the norms.

    Raises:
        Refusal: If the last convolution cannot be refitted, with the reason.
    """

    def __init__(self, model: nn.Module, task: FitTask) -> None:
        steps = _last_convolution(task.elements)
        name: str = steps[0].name
        conv: Any = model.get_submodule(name)
        self._conv = conv
        rank = len(conv.kernel_size) if isinstance(getattr(conv, "kernel_size", None), tuple) else 2
        geometry = geometry_of(conv, "conv", 0, rank)
        self.geometry: Geometry = geometry
        if not has_plain_parameter(conv) or hasattr(conv, "parametrizations"):
            raise Refusal(
                f"{name}: its kernel is computed from its weight, which cannot be refitted (name a kernel instead)"
            )
        norm_names = [step.name for step in steps if step.kind == "norm"]
        norms = [model.get_submodule(norm) for norm in norm_names]
        self._norms = _combined(norms, norm_names, geometry.out_channels, conv.weight.device)
        self._last_name = norm_names[-1] if norm_names else name
        self._bias = None if conv.bias is None else conv.bias.detach().double()
        scale, shift = self._norms.scale, self._norms.shift
        intercept = shift if self._bias is None else shift + scale * self._bias
        self.has_intercept = self._bias is not None or bool(norms and has_bias(norms[-1]))
        self.input_module = name
        groups = geometry.groups
        self._shape = conv.weight.shape
        weight = conv.weight.detach().double().reshape(groups, self._shape[0] // groups, -1).transpose(1, 2)
        self.initial = Coefficients(weight * scale.reshape(groups, 1, -1), intercept.reshape(groups, -1))

    def install(self, coefficients: Coefficients, regression: Regression) -> None:
        """Write the coefficients into the convolution and its norms.

        Args:
            coefficients: What convolution and norms are to compute.
            regression: Gives the statistics of the norms' new input.

        Raises:
            Refusal: If the dtype cannot represent the weights; nothing is changed then.
        """
        with torch.no_grad():
            scale, shift, norms = self._norms.scale, self._norms.shift, self._norms.modules
            weight = coefficients.weight / scale.reshape(self.geometry.groups, 1, -1)
            self._check_range(weight)
            assign(self._conv.weight, weight.transpose(1, 2).reshape(self._shape))
            if not self.has_intercept:
                return
            intercept = coefficients.intercept.flatten()
            if not (norms and has_bias(norms[-1])):
                assert self._bias is not None
                assign(self._conv.bias, (intercept - shift) / scale)
                return
            bias = torch.zeros_like(intercept) if self._bias is None else self._bias
            new_shift = intercept - scale * bias
            assign(norms[-1].bias, norms[-1].bias.double() + new_shift - shift)
            mean, variance = regression.output_statistics(weight)
            set_input_statistics(norms[0], mean.flatten() + bias, variance.flatten())

    def _check_range(self, weight: Tensor) -> None:
        dtype = self._conv.weight.dtype
        too_large = ~(weight.abs().amax(1) <= torch.finfo(dtype).max)
        if bool(too_large.any()):
            least = float(self._norms.scale[too_large.flatten()].abs().min())
            raise Refusal(
                f"{self._last_name} multiplies {int(too_large.sum())} of {too_large.numel()} channels by almost "
                f"zero ({least:.1g}): the weights before it would exceed the range of {dtype}"
            )


def _last_convolution(elements: tuple[Element, ...]) -> Any:
    """Return the last convolution with the steps after it."""
    last = max(at for at, element in enumerate(elements) if isinstance(element, ParallelSum) or element.kind == "conv")
    if isinstance(elements[last], ParallelSum):
        raise Refusal("it ends in a sum of convolutions, so that it has no single last convolution")
    steps: Any = elements[last:]
    for step in steps:
        if step.kind == "pad":
            raise Refusal(f"{step.name} pads after its last convolution")
        if step.why and not step.is_identity:
            raise Refusal(f"{step.name}: {step.why}")
    return steps


def _combined(norms: list[Any], names: list[str], channels: int, device: torch.device) -> _Norms:
    scale = torch.ones(channels, dtype=torch.float64, device=device)
    shift = torch.zeros(channels, dtype=torch.float64, device=device)
    for norm, name in zip(norms, names, strict=True):
        try:
            norm_scale, norm_shift = scale_and_shift_of(norm, torch.float64)
        except Refusal as refusal:
            raise Refusal(f"{name}: {refusal}") from refusal
        scale, shift = scale * norm_scale.detach(), shift * norm_scale.detach() + norm_shift.detach()
    if not bool((scale != 0).all()):
        dead = int((scale == 0).sum())
        raise Refusal(f"{names[-1]} multiplies {dead} of {channels} channels by zero")
    if not bool(torch.isfinite(scale).all() and torch.isfinite(shift).all()):
        raise Refusal(f"{names[-1]} has values that are not finite")
    return _Norms(tuple(norms), scale, shift)
