"""The factors form: only a unit's last convolution changes, and its norm; keys, shapes and classes stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nmconv.algebra import Geometry, Refusal, geometry_of, has_plain_parameter, norm_of
from nmconv.finding import Join
from nmconv.fitting.norm_statistics import centre, has_shift, put
from nmconv.fitting.normal_equations import Line, Rows
from nmconv.fitting.tasks import FitTask

__all__ = ["FactorsForm"]


@dataclass(frozen=True, eq=False)
class _Norms:
    """The norms behind a convolution as one: ``out = scale · in + shift``, each ``[channels]``, in float64."""

    modules: tuple[Any, ...]
    scale: Tensor
    shift: Tensor


class FactorsForm:
    """The last convolution of a unit as a regression, and putting the answer into the model.

    Args:
        model: Read only until :meth:`install`.
        unit: Of it.

    Raises:
        Refusal: If it cannot be refitted, and why.
    """

    def __init__(self, model: nn.Module, unit: FitTask) -> None:
        at = max(number for number, step in enumerate(unit.elements) if isinstance(step, Join) or step.kind == "conv")
        if isinstance(unit.elements[at], Join):
            raise Refusal("it ends in a sum of convolutions, which have no one last convolution")
        steps: Any = unit.elements[at:]
        for step in steps:
            if step.kind == "pad":
                raise Refusal(f"{step.name} stands behind its last convolution")
            if step.why and not step.quiet:
                raise Refusal(f"{step.name}: {step.why}")
        self.name: str = steps[0].name
        conv: Any = model.get_submodule(self.name)
        self.conv = conv
        rank = len(conv.kernel_size) if isinstance(getattr(conv, "kernel_size", None), tuple) else 2
        found = geometry_of(conv, "conv", 0, rank)
        self.geometry: Geometry = found
        if not has_plain_parameter(conv) or hasattr(conv, "parametrizations"):
            raise Refusal(f"{self.name}: what it convolves with is computed from its weight (name a kernel instead)")
        self._names = [step.name for step in steps if step.kind == "norm"]
        norms = [model.get_submodule(name) for name in self._names]
        self._norms = _as_one(norms, self._names, self.geometry.out_channels, conv.weight.device)
        self._bias = None if conv.bias is None else conv.bias.detach().double()
        scale, shift = self._norms.scale, self._norms.shift
        constant = shift if self._bias is None else shift + scale * self._bias
        self.has_intercept = self._bias is not None or bool(norms and has_shift(norms[-1]))
        self.inputs = (self.name,)
        groups = self.geometry.groups
        self._shape = conv.weight.shape
        weight = conv.weight.detach().double().reshape(groups, self._shape[0] // groups, -1).transpose(1, 2)
        # Of the unit's output, behind the norms: what the error is measured on.
        self.start = Line(weight * scale.reshape(groups, 1, -1), constant.reshape(groups, -1))

    def install(self, line: Line, rows: Rows) -> None:
        """Put a line into the convolution and its norms.

        Raises:
            Refusal: If their dtype does not hold it; nothing is changed then.
        """
        with torch.no_grad():
            groups = self.geometry.groups
            before_norms = line.weight / self._norms.scale.reshape(groups, 1, -1)
            self._check_range(before_norms)
            put(self.conv.weight, before_norms.transpose(1, 2).reshape(self._shape))
            if not self.has_intercept:
                return
            total = line.constant.flatten()
            norms = self._norms.modules
            if not (norms and has_shift(norms[-1])):  # the convolution's own bias is all there is
                assert self._bias is not None
                put(self.conv.bias, (total - self._norms.shift) / self._norms.scale)
                return
            bias = torch.zeros_like(total) if self._bias is None else self._bias
            shift = total - self._norms.scale * bias
            last = norms[-1]
            put(last.bias, last.bias.double() + shift - self._norms.shift)
            mean, variance = rows.spread(before_norms)
            centre(norms[0], mean.flatten() + bias, variance.flatten())

    def _check_range(self, before_norms: Tensor) -> None:
        dtype = self.conv.weight.dtype
        over = ~(before_norms.abs().amax(1) <= torch.finfo(dtype).max)
        if bool(over.any()):
            name = self._names[-1] if self._names else self.name
            least = float(self._norms.scale[over.flatten()].abs().min())
            raise Refusal(
                f"{name} multiplies {int(over.sum())} of {over.numel()} channels by next to nothing ({least:.1g}): the "
                f"weights that it takes are beyond {dtype}"
            )


def _as_one(norms: list[Any], names: list[str], channels: int, device: torch.device) -> _Norms:
    scale = torch.ones(channels, dtype=torch.float64, device=device)
    shift = torch.zeros(channels, dtype=torch.float64, device=device)
    for norm, name in zip(norms, names, strict=True):
        try:
            own, added = norm_of(norm, torch.float64)
        except Refusal as refusal:
            raise Refusal(f"{name}: {refusal}") from refusal
        scale, shift = scale * own.detach(), shift * own.detach() + added.detach()
    if not bool((scale != 0).all()):
        dead = int((scale == 0).sum())
        raise Refusal(f"{names[-1]} multiplies {dead} of {channels} channels by zero")
    if not bool(torch.isfinite(scale).all() and torch.isfinite(shift).all()):
        raise Refusal(f"{names[-1]} has values that are not finite")
    return _Norms(tuple(norms), scale, shift)
