"""Whether what a file says can be true at all: pure checks, made before anything is built from it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from nmconv.io._content import Content
from nmconv.io._problems import Damaged
from nmconv.merging import Merge
from nmconv.planning import Geometry, Plan, Stage

__all__ = ["check_content", "check_geometry", "check_takes"]

_LARGEST = 2**31 - 1  # of any extent
_WEIGHTS = 2**60  # of one convolution: bytes stay within 64 bits
_STAGES = 1000  # on one axis
_MODES = ("zeros", "reflect", "replicate", "circular")
_TAKES = 2**16  # characters
_DEPTH = 16  # of lists in lists
_ARGUMENT = 2**20  # no forward is called with a larger number; it might count up to it


def check_content(content: Content) -> None:
    """Check all of it.

    Raises:
        Damaged: At the first thing that no file of ours says.
    """
    for number, merges in enumerate(content.merges):
        for merge in merges:
            _check_merge(merge, f"merges[{number}], {merge.head!r}")
    if content.plan is not None:
        _check_plan(content.plan)


def check_geometry(geometry: Geometry, where: str) -> None:
    """Check what holds of every convolution.

    Args:
        geometry: Types are right already.
        where: It stands, for the message.

    Raises:
        Damaged: If it is no convolution's.
    """
    rank = geometry.rank
    _hold(1 <= rank <= 3, f"{where} has {rank} spatial axes")
    for name in ("kernel", "stride", "dilation"):
        sizes = getattr(geometry, name)
        _hold(len(sizes) == rank, f"{where} has {len(sizes)} numbers for {name} on {rank} axes")
        _hold(all(1 <= size <= _LARGEST for size in sizes), f"{where} has {name}={sizes}")
    for name in ("groups", "in_channels", "out_channels"):
        count = getattr(geometry, name)
        _hold(1 <= count <= _LARGEST, f"{where} has {name}={count}")
        _hold(count % geometry.groups == 0, f"{where} has {name}={count} in {geometry.groups} groups")
    _hold(max(geometry.extent) <= _LARGEST, f"{where} has the extent {geometry.extent}")
    _hold(geometry.weights <= _WEIGHTS, f"{where} has {geometry.weights} weights")
    _hold(geometry.mode in _MODES, f"{where} has mode={geometry.mode!r}")
    _hold(len(geometry.padding) == rank, f"{where} has padding for {len(geometry.padding)} of {rank} axes")
    for pair in geometry.padding:
        _hold(all(0 <= size <= _LARGEST for size in pair), f"{where} has padding={geometry.padding}")
    _hold(len(geometry.bounded) in (0, rank), f"{where} has bounded={geometry.bounded}")
    _hold(not geometry.bounded or any(geometry.bounded), f"{where} has bounded={geometry.bounded}")
    _hold(not geometry.bounded or geometry.mode == "zeros", f"{where} is bounded, with mode={geometry.mode!r}")
    _hold(len(geometry.stages) in (0, rank), f"{where} has stages for {len(geometry.stages)} of {rank} axes")
    _hold(not geometry.stages or any(geometry.stages), f"{where} has stages for no axis")
    _hold(len(geometry.crop) in (0, rank), f"{where} has crop={geometry.crop}")
    for pair in geometry.crop:
        _hold(all(0 <= size <= _LARGEST for size in pair), f"{where} has crop={geometry.crop}")
    inner = replace(geometry, kernel=(1,) * rank, stride=(1,) * rank, pooled=False)
    _hold(not geometry.pooled or inner.pointwise, f"{where} averages, and does more than that")
    _hold(not geometry.pooled or set(geometry.dilation) == {1}, f"{where} averages, with dilation={geometry.dilation}")
    for axis, stages in enumerate(geometry.stages):
        _check_stages(stages, geometry, axis, where)


def _check_stages(stages: tuple[Stage, ...], geometry: Geometry, axis: int, where: str) -> None:
    _hold(len(stages) <= _STAGES, f"{where} has {len(stages)} stages")
    if not stages:
        return
    _hold(geometry.padding[axis] == (0, 0), f"{where} has both stages and padding on axis {axis}")
    total = 1
    for stage in stages:
        sizes = 1 <= stage.extent <= _LARGEST and 1 <= stage.stride <= _LARGEST
        fixed = 0 <= stage.left <= _LARGEST and 0 <= stage.right <= _LARGEST
        _hold(sizes and (fixed or (stage.left, stage.right) == (-1, -1)), f"{where} has the stage {stage}")
        total *= stage.stride
        _hold(total <= _LARGEST, f"{where} has stages of stride {total}")


def _check_merge(merge: Merge, where: str) -> None:
    check_geometry(merge.geometry, where)
    names = (merge.head, *merge.removed)
    _hold(len(set(names)) == len(names), f"{where} names a module twice")
    _hold(merge.head in merge.convs, f"{where} is none of its own convolutions")
    _hold(len(set(merge.convs)) == len(merge.convs), f"{where} names a convolution twice")
    _hold(set(merge.convs) <= set(names), f"{where} has convolutions that would stay")
    _hold(not merge.norm or merge.norm not in names, f"{where} keeps the norm {merge.norm!r} that it removes")
    _hold(not (merge.norm and merge.live), f"{where} is live, and keeps a norm")
    _hold(
        len(merge.factors) <= (_TAKES if merge.live else 0), f"{where} has factors of {len(merge.factors)} characters"
    )
    for addition in merge.sums:
        _hold(addition.keep in (0, 1), f"{where} keeps operand {addition.keep} of a sum")
        _hold(addition.number >= 1, f"{where} has the sum number {addition.number}")
        check_takes(addition.takes, f"{where}, a sum")


def _check_plan(plan: Plan) -> None:
    for site in plan.sites:
        where = f"its plan, {site.name!r}"
        for count in (site.call, site.train_call, site.step, site.train_step):
            _hold(count is None or 0 <= count <= _LARGEST, f"{where} is call number {count}")
        if site.action in ("drop", "move") and site.how == "rewrite":
            check_takes(site.takes, where)
        if site.place is not None:
            _hold(1 <= site.place.call <= _LARGEST, f"{where} moves to call number {site.place.call}")
            if site.place.how == "rewrite":
                check_takes(site.place.takes, where)
    for hoist in plan.hoists:
        for name, geometry in zip(hoist.convs, hoist.geometries, strict=bool(hoist.geometries)):
            check_geometry(geometry, f"its plan, the hoisted {name!r}")
    for branch in plan.branches:
        where = f"its plan, the branch of {branch.sum.owner!r}"
        _hold(1 <= branch.sum.number <= _LARGEST, f"{where} is sum number {branch.sum.number}")
        check_takes(branch.sum.takes, where)


def check_takes(text: str, where: str) -> None:
    """Check the structure of a method's arguments, since the method will be traced with them.

    Args:
        text: As :func:`nmconv.graph._takes.takes_of` writes it.
        where: It stands, for the message.

    Raises:
        Damaged: If that function never writes it; also for numbers that no forward is called with.
    """
    _hold(len(text) <= _TAKES, f"{where} has arguments of {len(text)} characters")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{where} has arguments that are no JSON: {error}") from error
    parts = isinstance(value, list) and len(value) == 2 and isinstance(value[0], list) and isinstance(value[1], dict)
    _hold(parts, f"{where} has arguments that are no list and names")
    _hold(all(str.isidentifier(name) for name in value[1]), f"{where} has arguments whose names are no names")
    leaves = [leaf for part in (*value[0], *value[1].values()) for leaf in _leaves(part, where, 0)]
    _hold("T" in leaves, f"{where} has no tensor among its arguments")
    for leaf in leaves:
        small = not isinstance(leaf, (int, float)) or isinstance(leaf, bool) or abs(leaf) <= _ARGUMENT
        _hold(small or leaf in (math.inf, -math.inf) or leaf != leaf, f"{where} has the argument {leaf}")


def _leaves(value: Any, where: str, depth: int) -> Iterator[Any]:
    """Tensors, numbers and flags in an encoded argument; text is what it is."""
    _hold(depth <= _DEPTH, f"{where} has arguments nested too deep")
    if not isinstance(value, list):
        plain = value is None or value == "T" or type(value) in (bool, int, float)
        _hold(plain, f"{where} has an argument that is neither tensor, number nor list")
        yield value
        return
    _hold(bool(value) and value[0] in ("str", "list", "tuple"), f"{where} has an argument of no known kind")
    if value[0] == "str":
        _hold(len(value) == 2 and isinstance(value[1], str), f"{where} has an argument that is no text")
        return
    for part in value[1:]:
        yield from _leaves(part, where, depth + 1)


def _hold(condition: bool, otherwise: str) -> None:
    if not condition:
        raise Damaged(otherwise)
