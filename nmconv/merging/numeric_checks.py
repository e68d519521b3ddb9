"""Checking merges numerically: each merged run in float64 on random inputs, and the whole model on example inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nmconv.algebra import Affine, apply_conv, copy_in_float64
from nmconv.errors import MergeError
from nmconv.finding import ParallelSum
from nmconv.flow import is_norm_act
from nmconv.merging.nodes import RunNode
from nmconv.merging.partitioning import Segment

__all__ = ["check_model_outputs", "check_segment"]

# Tolerances relative to the largest output. Measured: below 1e-14 for a run in float64, up to 1.7e-4 for a whole model
# in float32 (docs/merging.md).
_RUN_TOLERANCE = 1e-9
_MODEL_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 2e-1}
_ROUNDING_FACTOR = 8  # allowed error over the rounding error of the original


def check_segment(model: nn.Module, segment: Segment, affine: Affine) -> None:
    """Compare a merged convolution with the modules it replaces, before anything is changed.

    Args:
        model: The model that has the modules, only read.
        segment: What was merged.
        affine: The merged convolution in float64.

    Raises:
        MergeError: If they differ.
    """
    name = f"{segment.convs[0]} … {segment.convs[-1]}"
    original = _Float64Modules(model)
    generator = torch.Generator("cpu").manual_seed(len(name))
    dense = affine.dense()
    channels = segment.geometry.in_channels
    compared = 0
    with torch.no_grad():
        for sizes in _test_sizes(segment):
            x = torch.randn(2, channels, *sizes, generator=generator, dtype=torch.float64, device="cpu")
            expected, problem = _attempt(lambda x=x: original.run(segment.nodes, x))
            actual, problem2 = _attempt(
                lambda x=x: apply_conv(x, dense.geometry, dense.weight, dense.bias, dense.border)
            )
            if actual is None and (expected is None or not expected.numel()):  # an empty crop raises, too
                continue
            if expected is None or actual is None:
                which = "original" if expected is None else "merged convolution"
                raise MergeError(
                    f"{name}: at {_times(sizes)} only the {which} fails ({problem or problem2}); nothing was changed"
                )
            compared += 1
            _compare(name, f"at {_times(sizes)}", expected, actual, _RUN_TOLERANCE)
    if not compared:
        raise MergeError(f"{name}: it fails on inputs of all sizes tried, so the merge cannot be checked")


def check_model_outputs(expected: Any, actual: Any, exact: Callable[[], Any], names: Sequence[str]) -> None:
    """Compare a merged model's outputs with the original's, tensor by tensor.

    Args:
        expected: Outputs of the original.
        actual: Outputs of the merged model.
        exact: Returns outputs of the original in float64; called only if the difference exceeds the tolerance, since a
            network may amplify rounding errors by any factor.
        names: Qualified names of the merged convolutions, for messages.

    Raises:
        MergeError: If they differ by more than their dtype allows.
    """
    what = f"the whole model, after merging {', '.join(names[:5])}{', …' if len(names) > 5 else ''}"
    before, after = (_tensors(value) for value in (expected, actual))
    if len(before) != len(after):
        raise MergeError(f"{what}: it returns {len(after)} tensors instead of {len(before)}")
    reference: list[Tensor] | None = None
    for index, (one, other) in enumerate(zip(before, after, strict=True)):
        if not one.is_floating_point():  # such as the index of a class: rounding may decide a tie
            if one.shape != other.shape:
                raise MergeError(f"{what}: it returns {tuple(other.shape)} instead of {tuple(one.shape)}")
            continue
        try:
            _compare(what, "on the example inputs", one, other, _MODEL_TOLERANCE.get(one.dtype, 1e-3))
        except MergeError:
            if one.shape != other.shape or not bool(torch.isfinite(one).all()):
                raise
            if reference is None:
                reference = _tensors(exact())
            original_error, merged_error = (_distance(value, reference[index]) for value in (one, other))
            if not merged_error <= _ROUNDING_FACTOR * original_error:
                raise


def _tensors(value: Any) -> list[Tensor]:
    """Return all tensors and floats in the outputs of a model, those in dicts, data classes and plain objects too."""
    tensors: list[Tensor] = []
    seen: set[int] = set()
    pending = [value]
    while pending:
        for leaf in pytree.tree_leaves(pending.pop()):
            if isinstance(leaf, Tensor):
                leaf = leaf.detach()
                tensors.append(torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf)
            elif isinstance(leaf, float):
                tensors.append(torch.tensor(leaf, dtype=torch.float64, device="cpu"))
            elif id(leaf) not in seen and not isinstance(leaf, (type, nn.Module)):
                seen.add(id(leaf))
                pending.append(
                    list(leaf.values()) if isinstance(leaf, Mapping) else list(getattr(leaf, "__dict__", {}).values())
                )
    return tensors


def _distance(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape:
        return math.inf
    return float((one.double().cpu() - other.cpu()).abs().max())


def _compare(name: str, where: str, expected: Tensor, actual: Tensor, tolerance: float) -> None:
    if expected.shape != actual.shape:
        raise MergeError(f"{name}: {where} the merged output is {tuple(actual.shape)}, not {tuple(expected.shape)}")
    if expected.numel() == 0:
        return
    finite = torch.isfinite(expected)
    if not bool(finite.all()):  # masks contain infinities
        same = (expected == actual) | (expected.isnan() & actual.isnan())
        if not bool(finite.any()) or not bool((finite | same).all()):
            raise MergeError(
                f"{name}: {where} the original gives infinities or NaN, so that nothing can be compared: look for them "
                "in its weights and in the inputs"
            )
        expected, actual = expected[finite], actual[finite]
    difference = float((expected.double() - actual.double()).abs().max())
    largest = float(expected.double().abs().max())
    if not difference <= tolerance * largest + 1e-30:
        raise MergeError(
            f"{name}: {where} the merged output differs by {difference:.3g} where the largest is {largest:.3g} "
            f"({tolerance:.0e} of it is allowed); nothing was changed"
        )


def _times(sizes: Sequence[int]) -> str:
    return "×".join(map(str, sizes))


def _attempt(run: Any) -> tuple[Tensor | None, str]:
    """Return the result and "", or None and the message of the error."""
    try:
        return run(), ""
    except (RuntimeError, ValueError) as error:
        return None, str(error)


def _test_sizes(segment: Segment) -> list[tuple[int, ...]]:
    """Return input sizes: odd, even and unequal extents around the kernel's, and some below it."""
    rank = segment.geometry.rank
    extents, strides = segment.geometry.extent, segment.geometry.stride
    cropped = segment.geometry.crop or ((0, 0),) * rank  # must exist, though never read
    grown = [extent + 2 * step + 1 + sum(cut) for extent, step, cut in zip(extents, strides, cropped, strict=True)]
    widest = [max(pair) for pair in segment.geometry.padding]  # reflections and wraps must be shorter
    candidates = [
        tuple(grown),
        tuple(size + pad for size, pad in zip(grown, widest, strict=True)),
        tuple(size + 1 + axis for axis, size in enumerate(grown)),
        tuple(extents),
        tuple(max(extent - 1, 1) for extent in extents),
        (1,) * rank,
        (2,) * rank,
    ]
    return list(dict.fromkeys(candidates))


class _Float64Modules:
    """Copies of a model's modules in float64, each made when it is first called.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules: dict[str, nn.Module] = {}

    def run(self, nodes: Sequence[RunNode], x: Tensor) -> Tensor:
        for node in nodes:
            element = node.element
            if isinstance(element, ParallelSum):
                one, two = (self.run(branch, x) for branch in node.branches)
                if one.shape != two.shape:
                    raise MergeError(f"{element.owner or 'the model'}: summed branches differ in their shapes")
                x = one + two
            elif not element.is_identity:
                x = self._call(element.name, x)
        return x

    def _call(self, name: str, x: Tensor) -> Tensor:
        if name not in self._modules:
            self._modules[name] = copy_in_float64(self._model.get_submodule(name))
        module: Any = self._modules[name]
        if not is_norm_act(module):
            result: Tensor = module(x)
            return result
        return F.batch_norm(
            x, module.running_mean, module.running_var, module.weight, module.bias, False, 0.0, module.eps
        )
