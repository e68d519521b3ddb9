"""Padding moved to the first convolution of a linear run: found in a converted model, and done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from nmconv.algebra import BEFORE, PADS, Geometry, Padding, Refusal, check_hooks, geometry_of, hoisted, pad
from nmconv.errors import PlanError
from nmconv.finding import Element, Join, Step, linear_runs
from nmconv.flow import LEAF, pads_same, recordings_of
from nmconv.planning import Hoist, Signature
from nmconv.surgery.rewritten_classes import RewrittenMethod, rewritten

__all__ = ["SETTINGS", "UNPADDED", "find_hoists", "hoist_padding", "padded_forward"]


UNPADDED = "_nmconv_unpadded"  # on a convolution whose padding was moved: the settings that it had
SETTINGS = ("padding", "padding_mode", "_reversed_padding_repeated_twice", "same_pad")  # in which a convolution says it


def find_hoists(model: nn.Module, example_inputs: Any, call: Signature | None = None) -> tuple[Hoist, ...]:
    """What can move in a model whose activations are dropped already, and what cannot."""
    recordings = recordings_of(model, example_inputs, both_sizes=False, call=call)
    runs = linear_runs(model, recordings=recordings, sizes=False)
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
        hoisted(geometries)
    except Refusal as refusal:
        yield Hoist(names, str(refusal))
    else:
        yield Hoist(names)


def hoist_padding(model: nn.Module, convs: Sequence[str]) -> None:
    """Move the padding of one run of convolutions to its first one.

    Raises:
        PlanError: If the model has no such convolutions, or their padding cannot move.
    """
    modules: list[Any] = []
    try:
        modules += [model.get_submodule(name) for name in convs]
        now = [geometry_of(module, "conv", 0, 0) for module in modules]
        after = hoisted(now)
    except (AttributeError, Refusal) as error:
        raise PlanError(f"the padding of {', '.join(convs)} cannot move to the first of them: {error}") from error
    for module, before, geometry in zip(modules, now, after, strict=True):
        module.__dict__[BEFORE] = Padding(before.padding, before.mode, before.stages)
        module.__dict__[UNPADDED] = {name: vars(module)[name] for name in SETTINGS if name in vars(module)}
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


_METHOD = RewrittenMethod(
    "forward",
    "def forward(self, input):\n    return _padded(self, input)\n",
    names=(("_padded", f"{__name__}:padded_forward"),),
)


def padded_forward(module: Any, input: Tensor) -> Tensor:
    """A convolution's forward behind padding that torch's attributes cannot say; any shape the class takes."""
    geometry: Geometry = module.__dict__[PADS]
    input = pad(input, geometry.pads(input.shape[-geometry.rank :]), geometry.mode)
    if module.__dict__["_nmconv_own"]:
        result: Tensor = type(module)._nmconv_base.forward(module, input)
        return result
    result = module._conv_forward(input, module.weight, module.bias)
    return result
