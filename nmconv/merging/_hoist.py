"""Padding moved to the first convolution of a linear run, so that the run merges exactly after training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from nmconv.merging._geometry import Geometry

__all__ = ["before_hoisting"]

_BEFORE = "_nmconv_padding"


def before_hoisting(model: nn.Module) -> Callable[[str, Geometry], Geometry]:
    """From a module's name and geometry to the geometry it had before its padding was hoisted."""

    def before(name: str, geometry: Geometry) -> Geometry:
        held = model.get_submodule(name).__dict__.get(_BEFORE)
        if held is None:
            return geometry
        padding, mode, stages = held
        return replace(geometry, padding=padding, mode=mode, stages=stages)

    return before
