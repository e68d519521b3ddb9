"""Before anything is touched: every merged run beside its original, in float64, on inputs of its own making."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nmconv.algebra import Affine, apply, doubled
from nmconv.errors import MergeError
from nmconv.finding import Join
from nmconv.flow import is_norm_act
from nmconv.merging.partitioning import Node, Segment

__all__ = ["check_model_outputs", "check_segment"]

_ALLOWED = 1e-9  # of the largest output, in float64; measured: below 1e-14
# Of a whole model's largest output, in its own dtype. Measured in float32: up to 1.7e-4 (docs/merging.md).
_WHOLE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 2e-1}

_NOISE = 8  # times the original's own rounding error


def check_segment(model: nn.Module, segment: Segment, affine: Affine) -> None:
    """Compare a merged convolution with the modules it stands for.

    Args:
        model: Holds the modules; nothing of it changes.
        segment: What was merged.
        affine: What it became, in float64.

    Raises:
        MergeError: If they differ, naming the run.
    """
    name = f"{segment.convs[0]} … {segment.convs[-1]}"
    parts = _Doubles(model)
    random = torch.Generator("cpu").manual_seed(len(name))
    dense, seen = affine.dense(), 0
    with torch.no_grad():
        for sizes in _sizes(segment):
            x = torch.randn(
                2, segment.geometry.in_channels, *sizes, generator=random, dtype=torch.float64, device="cpu"
            )
            expected, problem = _tried(lambda x=x: parts.run(segment.nodes, x))
            found, other = _tried(lambda x=x: apply(x, dense.geometry, dense.weight, dense.bias, dense.border))
            if found is None and (expected is None or not expected.numel()):  # a crop that leaves nothing raises, too
                continue
            if expected is None or found is None:
                raise MergeError(f"{name}: at {_times(sizes)} one of the two fails: {problem or other}")
            seen += 1
            _compare(name, f"at {_times(sizes)}", expected, found, _ALLOWED)
    if not seen:
        raise MergeError(f"{name}: no input of any size tried ran through it")


def check_model_outputs(expected: Any, found: Any, exact: Callable[[], Any], names: Sequence[str]) -> None:
    """Compare a merged model's outputs with the original's, tensor by tensor.

    Args:
        expected: The original's outputs.
        found: The merged model's.
        exact: Gives the original's in float64; asked only where the two differ by more than is usual, since a network
            may amplify what rounding does to it by any factor.
        names: Of the merged convolutions, for messages.

    Raises:
        MergeError: If they differ by more than their dtype allows.
    """
    what = f"the whole model, after merging {', '.join(names[:5])}{', …' if len(names) > 5 else ''}"
    before, after = (_tensors(value) for value in (expected, found))
    if len(before) != len(after):
        raise MergeError(f"{what}: it returns {len(after)} tensors instead of {len(before)}")
    reference: list[Tensor] | None = None
    for index, (one, other) in enumerate(zip(before, after, strict=True)):
        if not one.is_floating_point():  # a class's number: rounding may decide a tie
            if one.shape != other.shape:
                raise MergeError(f"{what}: it returns {tuple(other.shape)} instead of {tuple(one.shape)}")
            continue
        try:
            _compare(what, "on the example inputs", one, other, _WHOLE.get(one.dtype, 1e-3))
        except MergeError:
            if one.shape != other.shape or not bool(torch.isfinite(one).all()):
                raise
            if reference is None:
                reference = _tensors(exact())
            own, merged = (_distance(value, reference[index]) for value in (one, other))
            if not merged <= _NOISE * own:  # no further from the truth than rounding takes the original
                raise


def _tensors(value: Any) -> list[Tensor]:
    """All tensors and floating-point numbers in what a model returns: in dicts, data classes and plain objects too."""
    found: list[Tensor] = []
    seen: set[int] = set()
    todo = [value]
    while todo:
        for leaf in pytree.tree_leaves(todo.pop()):
            if isinstance(leaf, Tensor):
                leaf = leaf.detach()
                found.append(torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf)
            elif isinstance(leaf, float):
                found.append(torch.tensor(leaf, dtype=torch.float64, device="cpu"))
            elif id(leaf) not in seen and not isinstance(leaf, (type, nn.Module)):
                seen.add(id(leaf))
                todo.append(
                    list(leaf.values()) if isinstance(leaf, Mapping) else list(getattr(leaf, "__dict__", {}).values())
                )
    return found


def _distance(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape:
        return math.inf
    return float((one.double().cpu() - other.cpu()).abs().max())


def _compare(name: str, where: str, expected: Tensor, found: Tensor, allowed: float) -> None:
    if expected.shape != found.shape:
        raise MergeError(f"{name}: {where} the merged output is {tuple(found.shape)}, not {tuple(expected.shape)}")
    if expected.numel() == 0:
        return
    finite = torch.isfinite(expected)
    if not bool(finite.all()):  # masks are made of infinities
        same = (expected == found) | (expected.isnan() & found.isnan())
        if not bool(finite.any()) or not bool((finite | same).all()):
            raise MergeError(
                f"{name}: {where} the original gives infinities or NaN, so that nothing can be compared: look for them "
                "in its weights and in what it is called with"
            )
        expected, found = expected[finite], found[finite]
    difference = float((expected.double() - found.double()).abs().max())
    largest = float(expected.double().abs().max())
    if not difference <= allowed * largest + 1e-30:
        raise MergeError(
            f"{name}: {where} the merged output differs by {difference:.3g} where the largest is {largest:.3g} "
            f"({allowed:.0e} of it is allowed); nothing was changed"
        )


def _times(sizes: Sequence[int]) -> str:
    return "×".join(map(str, sizes))


def _tried(run: Any) -> tuple[Tensor | None, str]:
    """What it returns, or None and what it raised."""
    try:
        return run(), ""
    except (RuntimeError, ValueError) as error:
        return None, str(error)


def _sizes(segment: Segment) -> list[tuple[int, ...]]:
    """Odd, even and unequal extents around the kernel's, and some below it."""
    rank = segment.geometry.rank
    extents, strides = segment.geometry.extent, segment.geometry.stride
    cropped = segment.geometry.crop or ((0, 0),) * rank  # what the convolution never looks at, but needs to be there
    grown = [extent + 2 * step + 1 + sum(cut) for extent, step, cut in zip(extents, strides, cropped, strict=True)]
    widest = [max(pair) for pair in segment.geometry.padding]  # which reflections and wraps must stay below
    found = [
        tuple(grown),
        tuple(size + pad for size, pad in zip(grown, widest, strict=True)),
        tuple(size + 1 + axis for axis, size in enumerate(grown)),
        tuple(extents),
        tuple(max(extent - 1, 1) for extent in extents),
        (1,) * rank,
        (2,) * rank,
    ]
    return list(dict.fromkeys(found))


class _Doubles:
    """The modules of a run in float64, each made when it is called first."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._made: dict[str, nn.Module] = {}

    def run(self, nodes: Sequence[Node], x: Tensor) -> Tensor:
        for node in nodes:
            element = node.element
            if isinstance(element, Join):
                one, two = (self.run(branch, x) for branch in node.branches)
                if one.shape != two.shape:
                    raise MergeError(f"{element.owner}: summed branches differ in their shapes")
                x = one + two
            elif not element.quiet:
                x = self._call(element.name, x)
        return x

    def _call(self, name: str, x: Tensor) -> Tensor:
        if name not in self._made:
            self._made[name] = doubled(self._model.get_submodule(name))
        module: Any = self._made[name]
        if not is_norm_act(module):
            result: Tensor = module(x)
            return result
        return F.batch_norm(
            x, module.running_mean, module.running_var, module.weight, module.bias, False, 0.0, module.eps
        )
