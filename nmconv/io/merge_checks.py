"""Check that a model has the modules that a file's merges name; names are looked up, never evaluated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from nmconv.algebra import Geometry, is_average_pool
from nmconv.finding import elements_from_json, steps_of
from nmconv.flow import Op, is_norm_act, leaf_op
from nmconv.io.problems import DamagedFile, ForeignFile
from nmconv.merging import Merge
from nmconv.recording import ENTRY_POINTS

__all__ = ["check_merges"]

_REMOVABLE = (Op.CONV, Op.NORM, Op.PAD, Op.DROP)
Modules = Mapping[str, nn.Module]


def check_merges(model: nn.Module, merges: Sequence[Merge]) -> None:
    """Check that the merges of one call of merge can be made with the model's modules.

    Raises:
        ForeignFile: If they cannot.
        DamagedFile: If they cannot be made with any model.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    merged: set[int] = set()
    for merge in merges:
        for name in (merge.head, *merge.removed):
            module = _module(modules, name)
            if not (leaf_op(module) in _REMOVABLE or is_norm_act(module) or is_average_pool(module)):
                raise ForeignFile(f"it merges {name!r}, which is a {type(module).__name__} here")
            if id(module) in merged:
                raise ForeignFile(f"it merges {name!r} twice")
            merged.add(id(module))
        for name in merge.convs:
            _conv(modules, name)
        if merge.norm and not _is_norm(_module(modules, merge.norm)):
            raise ForeignFile(f"it keeps the norm {merge.norm!r}, which is a {type(modules[merge.norm]).__name__} here")
        _check_channels(modules, merge)
        for owner in (*(addition.owner for addition in merge.sums), *(guard.owner for guard in merge.guards)):
            _module(modules, owner)
        for name in merge.closed:
            if name not in ENTRY_POINTS:
                raise DamagedFile(f"the merged {merge.head!r} closes {name!r}, which no merge does")
        if merge.live:
            _check_factors(merge)


def _check_channels(modules: Modules, merge: Merge) -> None:
    """Check that the merged convolution has the inputs of its first convolution and the outputs of its last one."""
    first, last = (_conv(modules, merge.convs[index]) for index in (0, -1))
    first, last = (conv.__dict__.get("geometry", conv) for conv in (first, last))  # merged ones have a geometry
    kernel = first.kernel if isinstance(first, Geometry) else first.kernel_size
    present = (len(kernel), first.in_channels, last.out_channels)
    stated = (merge.geometry.rank, merge.geometry.in_channels, merge.geometry.out_channels)
    if present != stated:
        raise ForeignFile(
            f"the merged {merge.head!r} has (axes, channels in, channels out) {stated}, which this model's "
            f"convolutions {merge.convs[0]!r} to {merge.convs[-1]!r} do not make: {present}"
        )


def _check_factors(merge: Merge) -> None:
    """Check that a live kernel is computed only from modules that it replaces."""
    try:
        steps = list(steps_of(elements_from_json(merge.factors)))
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"the factors of {merge.head!r} cannot be read: {error}") from error
    for step in steps:
        if step.kind != "pass" and step.name not in (merge.head, *merge.removed):
            raise DamagedFile(f"{merge.head!r} is computed from {step.name!r}, which it does not replace")


def _is_norm(module: nn.Module) -> bool:
    return leaf_op(module) is Op.NORM or is_norm_act(module)


def _module(modules: Modules, name: str) -> nn.Module:
    if name not in modules:
        raise ForeignFile(f"it names {name!r}, which this model does not have")
    return modules[name]


def _conv(modules: Modules, name: str) -> Any:
    module = _module(modules, name)
    if leaf_op(module) is not Op.CONV or not isinstance(module, nn.modules.conv._ConvNd) or module.transposed:
        raise ForeignFile(f"it names {name!r} as a convolution, which is a {type(module).__name__} here")
    return module
