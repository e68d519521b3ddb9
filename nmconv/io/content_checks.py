"""Whether what a file says can be true at all: pure checks, made before anything is built from it."""

from __future__ import annotations

from dataclasses import replace

from nmconv.algebra import Geometry, Stage
from nmconv.io.content import Content
from nmconv.io.problems import DamagedFile
from nmconv.merging import Merge

__all__ = ["check_content", "check_geometry"]

_LARGEST = 2**31 - 1  # of any extent
_WEIGHTS = 2**60  # of one convolution: bytes stay within 64 bits
_STAGES = 1000  # on one axis
_MODES = ("zeros", "reflect", "replicate", "circular")
_FACTORS = 2**16  # characters


def check_content(content: Content) -> None:
    """Check all of it.

    Raises:
        Damaged: At the first thing that no file of ours says.
    """
    for site, slope in content.slopes:
        _hold(0 <= slope <= 1, f"slopes says {slope} of {site!r}")
    sites = set() if content.plan is None else {site.id for site in content.plan.changes}
    _hold(not content.slopes or {site for site, _ in content.slopes} == sites, "slopes has other sites than the plan")
    plan = content.plan
    at_once = content.merges or (plan is not None and (plan.branches or any(not each.why for each in plan.hoists)))
    _hold(not (content.slopes and at_once), "it has slopes, and what happens at once")
    for number, merges in enumerate(content.merges):
        for merge in merges:
            _check_merge(merge, f"merges[{number}], {merge.head!r}")


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
    most = _FACTORS if merge.live else 0
    _hold(len(merge.factors) <= most, f"{where} has factors of {len(merge.factors)} characters")
    for addition in merge.sums:
        _hold(addition.keep in (0, 1), f"{where} keeps operand {addition.keep} of a sum")
        _hold(addition.number >= 1, f"{where} has the sum number {addition.number}")


def _hold(condition: bool, otherwise: str) -> None:
    if not condition:
        raise DamagedFile(otherwise)
