"""Hoisting padding: moving it to the first convolution of a linear run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from nmconv.algebra import (
    PADDED_GEOMETRY,
    PADDING_BEFORE_HOIST,
    Geometry,
    Padding,
    Refusal,
    check_hooks,
    geometry_of,
    hoisted,
    pad,
)
from nmconv.errors import PlanError
from nmconv.finding import Element, ParallelSum, Step, linear_runs
from nmconv.flow import LEAF, pads_same, record_model
from nmconv.planning import Hoist, Signature
from nmconv.surgery.rewritten_classes import RewrittenMethod, rewritten_class

__all__ = ["OWN_FORWARD", "SETTINGS", "UNPADDED", "find_hoists", "hoist_padding", "padded_forward"]

UNPADDED = "_nmconv_unpadded"  # on a convolution whose padding was moved: its settings before
OWN_FORWARD = "_nmconv_own"  # on a convolution with a rewritten forward: whether that calls the forward of its class
SETTINGS = ("padding", "padding_mode", "_reversed_padding_repeated_twice", "same_pad")  # attributes about padding


def find_hoists(model: nn.Module, example_inputs: Any, call: Signature | None = None) -> tuple[Hoist, ...]:
    """Return the hoists that are possible, and those that are not, in a model whose activations are already dropped."""
    recordings = record_model(model, example_inputs, both_sizes=False, call=call)
    runs = linear_runs(model, recordings=recordings, sizes=False)
    sequences = [sequence for run in runs for sequence in _sequences(run.elements)]
    return tuple(hoist for sequence in sequences for hoist in _hoists_in(model, sequence))


def _sequences(elements: Iterable[Element]) -> Iterator[list[Step]]:
    """Yield the sequences of steps between sums, and those in the branches of sums."""
    sequence: list[Step] = []
    for element in elements:
        if isinstance(element, ParallelSum):
            yield sequence
            sequence = []
            for branch in element.branches:
                yield from _sequences(branch)
        else:
            sequence.append(element)
    yield sequence


def _hoists_in(model: nn.Module, sequence: list[Step]) -> Iterator[Hoist]:
    """Yield the hoists of one sequence; steps other than plain convolutions and norms divide it."""
    convs: list[tuple[str, Geometry]] = []
    for step in sequence:
        if step.is_identity:
            continue
        try:
            if step.why or step.kind == "pad":
                raise Refusal(step.why or "it is a padding module")
            module = model.get_submodule(step.name)
            geometry = geometry_of(module, step.kind, 0, 0)
            check_hooks(module, step.name)
        except Refusal:
            yield from _hoist_to_first(convs)
            convs = []
            continue
        if step.kind == "conv":
            convs.append((step.name, geometry))
    yield from _hoist_to_first(convs)


def _hoist_to_first(convs: list[tuple[str, Geometry]]) -> Iterator[Hoist]:
    """Yield the hoist of these convolutions, if there is padding after the first one."""
    names = tuple(name for name, _ in convs)
    geometries = [geometry for _, geometry in convs]
    if not any(geometry.is_padded(axis) for geometry in geometries[1:] for axis in range(geometry.rank)):
        return
    try:
        hoisted(geometries)
    except Refusal as refusal:
        yield Hoist(names, str(refusal))
    else:
        yield Hoist(names)


def hoist_padding(model: nn.Module, convs: Sequence[str]) -> None:
    """Move the padding of consecutive convolutions to the first one.

    Raises:
        PlanError: If the model has no such convolutions, or their padding cannot move.
    """
    modules: list[Any] = []
    try:
        modules += [model.get_submodule(name) for name in convs]
        current = [geometry_of(module, "conv", 0, 0) for module in modules]
        new = hoisted(current)
    except (AttributeError, Refusal) as error:
        raise PlanError(f"the padding of {', '.join(convs)} cannot move to the first of them: {error}") from error
    for module, before, geometry in zip(modules, current, new, strict=True):
        module.__dict__[PADDING_BEFORE_HOIST] = Padding(before.padding, before.mode, before.stages)
        module.__dict__[UNPADDED] = {name: vars(module)[name] for name in SETTINGS if name in vars(module)}
        _set_padding(module, geometry)


def _set_padding(module: Any, geometry: Geometry) -> None:
    """Let a convolution pad as a geometry says: by torch's own settings if they can express it."""
    is_symmetric = all(left == right for left, right in geometry.padding) and not geometry.stages
    has_torch_forward = type(module).forward.__module__.startswith("torch.nn.")
    if is_symmetric and has_torch_forward:
        _set_attributes(module, tuple(left for left, _ in geometry.padding), geometry.mode)
        return
    cls = rewritten_class(type(module), (_PADDED_FORWARD,))
    _set_attributes(module, (0,) * geometry.rank, "zeros")
    if getattr(module, "same_pad", False):
        module.same_pad = False
    module.__dict__[PADDED_GEOMETRY] = geometry
    module.__dict__[LEAF] = True
    module.__dict__[OWN_FORWARD] = not pads_same(module) and not has_torch_forward
    module.__class__ = cls


def _set_attributes(module: Any, padding: tuple[int, ...], mode: str) -> None:
    module.padding = padding
    module.padding_mode = mode
    module._reversed_padding_repeated_twice = [extent for extent in reversed(padding) for _ in range(2)]


_PADDED_FORWARD = RewrittenMethod(
    "forward",
    "def forward(self, input):\n    return _padded(self, input)\n",
    names=(("_padded", f"{__name__}:padded_forward"),),
)


def padded_forward(module: Any, input: Tensor) -> Tensor:
    """Run a convolution after padding that torch's settings cannot express; ``input`` has any shape it accepts."""
    geometry: Geometry = module.__dict__[PADDED_GEOMETRY]
    input = pad(input, geometry.pads(input.shape[-geometry.rank :]), geometry.mode)
    if module.__dict__[OWN_FORWARD]:
        result: Tensor = type(module)._nmconv_base.forward(module, input)
        return result
    result = module._conv_forward(input, module.weight, module.bias)
    return result
