"""Check a file's contents without a model, before anything is built from them."""

from __future__ import annotations

from dataclasses import replace

from nmconv.algebra import Geometry, Stage
from nmconv.io.content import FileContent
from nmconv.io.problems import DamagedFile
from nmconv.merging import Merge

__all__ = ["check_content"]

_MAX_EXTENT = 2**31 - 1
_MAX_WEIGHTS = 2**60  # of one convolution, so that the number of bytes fits into 64 bits
_MAX_STAGES = 1000  # along one axis
_MAX_FACTORS = 2**16  # in characters
_MODES = ("zeros", "reflect", "replicate", "circular")


def check_content(content: FileContent) -> None:
    """Check slopes and merges; plans were checked when they were parsed.

    Raises:
        DamagedFile: If they are something that :func:`nmconv.save` never writes.
    """
    _check_slopes(content)
    for number, merges in enumerate(content.merges):
        for merge in merges:
            _check_merge(merge, f"merges[{number}], {merge.head!r}")


def _check_slopes(content: FileContent) -> None:
    for site, slope in content.slopes:
        _require(0 <= slope <= 1, f"slopes gives {site!r} the slope {slope}")
    plan = content.plan
    sites = set() if plan is None else {site.id for site in plan.changes}
    same_sites = {site for site, _ in content.slopes} == sites
    _require(not content.slopes or same_sites, "slopes has other sites than the plan")
    has_hard_changes = plan is not None and (plan.branches or any(not hoist.why for hoist in plan.hoists))
    _require(
        not (content.slopes and (content.merges or has_hard_changes)),
        "it has slopes, but also merges, hoisted padding or removed branches",
    )


def _check_merge(merge: Merge, where: str) -> None:
    _check_geometry(merge.geometry, where)
    names = (merge.head, *merge.removed)
    _require(len(set(names)) == len(names), f"{where} names a module twice")
    _require(merge.head in merge.convs, f"{where} is not one of its own convolutions")
    _require(len(set(merge.convs)) == len(merge.convs), f"{where} names a convolution twice")
    _require(set(merge.convs) <= set(names), f"{where} has convolutions that it does not remove")
    _require(not merge.norm or merge.norm not in names, f"{where} keeps the norm {merge.norm!r} that it removes")
    _require(not (merge.norm and merge.live), f"{where} is live, and keeps a norm")
    max_factors = _MAX_FACTORS if merge.live else 0
    _require(len(merge.factors) <= max_factors, f"{where} has factors of {len(merge.factors)} characters")
    for addition in merge.sums:
        _require(addition.keep in (0, 1), f"{where} keeps operand {addition.keep} of a sum")
        _require(addition.number >= 1, f"{where} has the sum number {addition.number}")


def _check_geometry(geometry: Geometry, where: str) -> None:
    """Check the values of a merged convolution's geometry; the types have been checked."""
    rank = geometry.rank
    _require(1 <= rank <= 3, f"{where} has {rank} spatial axes")
    for name in ("kernel", "stride", "dilation"):
        sizes = getattr(geometry, name)
        _require(len(sizes) == rank, f"{where} has {len(sizes)} numbers for {name} on {rank} axes")
        _require(all(1 <= size <= _MAX_EXTENT for size in sizes), f"{where} has {name}={sizes}")
    for name in ("groups", "in_channels", "out_channels"):
        count = getattr(geometry, name)
        _require(1 <= count <= _MAX_EXTENT, f"{where} has {name}={count}")
        _require(count % geometry.groups == 0, f"{where} has {name}={count} in {geometry.groups} groups")
    _require(max(geometry.extent) <= _MAX_EXTENT, f"{where} has the extent {geometry.extent}")
    _require(geometry.weights <= _MAX_WEIGHTS, f"{where} has {geometry.weights} weights")
    _check_border(geometry, where)
    inner = replace(geometry, kernel=(1,) * rank, stride=(1,) * rank, pooled=False)
    _require(not geometry.pooled or inner.pointwise, f"{where} averages, and its convolution is not pointwise")
    is_dilated = set(geometry.dilation) != {1}
    _require(not (geometry.pooled and is_dilated), f"{where} averages, with dilation={geometry.dilation}")
    for axis, stages in enumerate(geometry.stages):
        if stages:
            _check_stages(stages, geometry, axis, where)


def _check_border(geometry: Geometry, where: str) -> None:
    """Check what concerns the border: padding, crop, ``bounded`` and stages."""
    rank = geometry.rank
    bounded, stages = geometry.bounded, geometry.stages
    _require(geometry.mode in _MODES, f"{where} has mode={geometry.mode!r}")
    _require(len(geometry.padding) == rank, f"{where} has padding for {len(geometry.padding)} of {rank} axes")
    for pair in geometry.padding:
        _require(all(0 <= size <= _MAX_EXTENT for size in pair), f"{where} has padding={geometry.padding}")
    _require(len(bounded) in (0, rank), f"{where} has bounded={bounded}")
    _require(not bounded or any(bounded), f"{where} has bounded={bounded}")
    _require(not bounded or geometry.mode == "zeros", f"{where} is bounded, with mode={geometry.mode!r}")
    _require(len(stages) in (0, rank), f"{where} has stages for {len(stages)} of {rank} axes")
    _require(not stages or any(stages), f"{where} has stages for no axis")
    _require(len(geometry.crop) in (0, rank), f"{where} has crop={geometry.crop}")
    for pair in geometry.crop:
        _require(all(0 <= size <= _MAX_EXTENT for size in pair), f"{where} has crop={geometry.crop}")


def _check_stages(stages: tuple[Stage, ...], geometry: Geometry, axis: int, where: str) -> None:
    _require(len(stages) <= _MAX_STAGES, f"{where} has {len(stages)} stages")
    _require(geometry.padding[axis] == (0, 0), f"{where} has both stages and padding on axis {axis}")
    total_stride = 1
    for stage in stages:
        has_size = 1 <= stage.extent <= _MAX_EXTENT and 1 <= stage.stride <= _MAX_EXTENT
        is_fixed = 0 <= stage.left <= _MAX_EXTENT and 0 <= stage.right <= _MAX_EXTENT
        is_same = (stage.left, stage.right) == (-1, -1)
        _require(has_size and (is_fixed or is_same), f"{where} has the stage {stage}")
        total_stride *= stage.stride
        _require(total_stride <= _MAX_EXTENT, f"{where} has stages of stride {total_stride}")


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise DamagedFile(otherwise)
