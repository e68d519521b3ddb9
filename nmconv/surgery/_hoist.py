"""Padding moved to the first convolution of a linear run: found in a converted model, and done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from nmconv.errors import PlanError
from nmconv.graph import (
    BEFORE,
    LEAF,
    PADS,
    Element,
    Join,
    Padding,
    Step,
    check_hooks,
    geometry_of,
    linear_runs,
    pads_same,
)
from nmconv.planning import Geometry, Hoist, Refusal, hoisted
from nmconv.surgery._classes import Method, rewritten

__all__ = ["find_hoists", "hoist_padding", "is_known", "pad", "padded_forward"]


def find_hoists(model: nn.Module, example_inputs: Any) -> tuple[Hoist, ...]:
    """What can move in a model whose activations are dropped already, and what cannot."""
    runs = linear_runs(model, example_inputs=example_inputs, sizes=False)
    lines = [line for run in runs for line in _lines(run.elements)]
    return tuple(hoist for line in lines for hoist in _hoists(model, line))


def _lines(elements: Iterable[Element]) -> Iterator[list[Step]]:
    """Sequences without a join in them, those of branches too."""
    line: list[Step] = []
    for element in elements:
        if isinstance(element, Join):
            yield line
            line = []
            for branch in element.branches:
                yield from _lines(branch)
        else:
            line.append(element)
    yield line


def _hoists(model: nn.Module, line: list[Step]) -> Iterator[Hoist]:
    """The hoists of one sequence: what is no plain convolution or norm divides it."""
    part: list[tuple[str, Geometry]] = []
    for step in line:
        if step.quiet:
            continue
        try:
            if step.why or step.kind == "pad":
                raise Refusal(step.why or "it pads by itself")
            module = model.get_submodule(step.name)
            geometry = geometry_of(module, step.kind, 0, 0)
            check_hooks(module, step.name)
        except Refusal:
            yield from _hoist(part)
            part = []
            continue
        if step.kind == "conv":
            part.append((step.name, geometry))
    yield from _hoist(part)


def _hoist(part: list[tuple[str, Geometry]]) -> Iterator[Hoist]:
    names = tuple(name for name, _ in part)
    geometries = [geometry for _, geometry in part]
    if not any(geometry.is_padded(axis) for geometry in geometries[1:] for axis in range(geometry.rank)):
        return
    try:
        yield Hoist(names, tuple(hoisted(geometries)))
    except Refusal as refusal:
        yield Hoist(names, (), str(refusal))


def hoist_padding(model: nn.Module, hoist: Hoist) -> None:
    """Set the paddings of one run.

    Raises:
        PlanError: If the model has no such convolutions.
    """
    if hoist.why:
        return
    for name, geometry in zip(hoist.convs, hoist.geometries, strict=True):
        try:
            module: Any = model.get_submodule(name)
            now = geometry_of(module, "conv", 0, 0)
        except (AttributeError, Refusal) as error:
            raise PlanError(f"{name!r}, whose padding the plan moves, is no convolution of this model") from error
        kept = (now.in_channels, now.out_channels, now.kernel, now.stride, now.dilation, now.groups)
        told = (geometry.in_channels, geometry.out_channels, geometry.kernel, geometry.stride, geometry.dilation)
        if kept != (*told, geometry.groups):
            raise PlanError(f"{name!r} is another convolution than the one whose padding the plan moves")
        module.__dict__[BEFORE] = Padding(now.padding, now.mode, now.stages)
        _pad(module, geometry)


def _pad(module: Any, geometry: Geometry) -> None:
    """Let the convolution pad as ``geometry`` says: by torch's attributes where they can say it."""
    symmetric = all(left == right for left, right in geometry.padding) and not geometry.stages
    if symmetric and type(module).forward.__module__.startswith("torch.nn."):
        _set(module, tuple(left for left, _ in geometry.padding), geometry.mode)
        return
    cls = rewritten(type(module), (_METHOD,))
    _set(module, (0,) * geometry.rank, "zeros")
    if getattr(module, "same_pad", False):
        module.same_pad = False
    module.__dict__[PADS] = geometry
    module.__dict__[LEAF] = True
    module.__dict__["_nmconv_own"] = not pads_same(module) and not _torchs(type(module))
    module.__class__ = cls


def _torchs(cls: type) -> bool:
    return bool(cls.forward.__module__.startswith("torch.nn."))  # type: ignore[attr-defined]


def _set(module: Any, padding: tuple[int, ...], mode: str) -> None:
    module.padding = padding
    module.padding_mode = mode
    module._reversed_padding_repeated_twice = [extent for extent in reversed(padding) for _ in range(2)]


_METHOD = Method(
    "forward",
    "def forward(self, input):\n    return _padded(self, input)\n",
    names=(("_padded", f"{__name__}:padded_forward"),),
)


def is_known(pads: Sequence[tuple[int, int]]) -> bool:
    """Whether all are numbers: an export's symbols are no padding to ONNX, and asking them would fix its sizes."""
    return all(type(extent) is int for pair in pads for extent in pair)


def pad(input: Tensor, pads: Sequence[tuple[int, int]], mode: str) -> Tensor:
    """The input with (left, right) elements more along each of its last axes; as it is where none are.

    Args:
        input: ``[..., *sizes]``.
        pads: One pair an axis; negative ones cut.
        mode: ``zeros``, ``reflect``, ``replicate`` or ``circular``.
    """
    if is_known(pads) and not any(map(any, pads)):
        return input
    flat = [extent for pair in reversed(pads) for extent in pair]  # F.pad begins with the last axis
    if mode != "zeros" and min(flat) < 0:
        input = F.pad(input, [min(extent, 0) for extent in flat])
        flat = [max(extent, 0) for extent in flat]
    return F.pad(input, flat, mode="constant" if mode == "zeros" else mode)


def padded_forward(module: Any, input: Tensor) -> Tensor:
    """A convolution's forward behind padding that torch's attributes cannot say; any shape the class takes."""
    geometry: Geometry = module.__dict__[PADS]
    input = pad(input, geometry.pads(input.shape[-geometry.rank :]), geometry.mode)
    if module.__dict__["_nmconv_own"]:
        result: Tensor = type(module)._nmconv_base.forward(module, input)
        return result
    result = module._conv_forward(input, module.weight, module.bias)
    return result
