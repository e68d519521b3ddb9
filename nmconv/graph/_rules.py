"""Shapes by rule: what a call gives is known from what it takes, a hundred times as fast as by a fake tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from nmconv.graph._geometry import per_axis
from nmconv.graph._modules import leaf_op
from nmconv.graph._ops import FUNCTIONS, METHODS, Op, is_inplace
from nmconv.graph._zoo import is_norm_act

__all__ = ["Shape", "shape_of_function", "shape_of_module", "what_is_read"]

Shape = tuple[int, ...]

# What gives results shaped as its input; evaluating a norm's parts costs the most of all.
_KEEP_SHAPE = (Op.NORM, Op.ACT, Op.DROP, Op.BOUNDED, Op.PASS)
_SLIDING = (
    (nn.Conv1d, nn.MaxPool1d, nn.AvgPool1d),
    (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d),
    (nn.Conv3d, nn.MaxPool3d, nn.AvgPool3d),
)
_RANKS: dict[type, int] = {kind: rank for rank, kinds in enumerate(_SLIDING, 1) for kind in kinds}
_ADAPTIVE: dict[type, int] = {nn.AdaptiveAvgPool1d: 1, nn.AdaptiveAvgPool2d: 2, nn.AdaptiveAvgPool3d: 3}


def what_is_read(node: Node, given: Sequence[Any]) -> Any:
    """What a call reads off the shape or kind of its first argument, a tensor; None if it does anything else."""
    x = given[0]
    if node.kwargs:
        return None
    if node.target is getattr:
        asked = {"shape": torch.Size(x.shape), "ndim": len(x.shape), "dtype": x.dtype, "device": x.device}
        return asked.get(given[1])
    if node.op == "call_method" and node.target == "size" and len(given) < 3:
        axis = given[1] if len(given) > 1 else None
        known = type(axis) is int and -len(x.shape) <= axis < len(x.shape)
        return torch.Size(x.shape) if len(given) == 1 else x.shape[axis] if known else None
    return len(x.shape) if node.op == "call_method" and node.target == "dim" and len(given) == 1 else None


def shape_of_module(module: nn.Module, x: Any) -> Shape | None:
    """The shape of ``module(x)``, or None where no rule tells it.

    Args:
        module: Called with one argument.
        x: Has ``shape`` and ``dtype``.
    """
    if leaf_op(module) in _KEEP_SHAPE or is_norm_act(module):
        return tuple(x.shape)
    if "forward" in module.__dict__ or not all(type(size) is int for size in x.shape):
        return None
    made: Any = module
    if type(module) in _RANKS:
        return _slid(made, x, _RANKS[type(module)])
    if type(module) in _ADAPTIVE:
        return _adapted(made.output_size, x, _ADAPTIVE[type(module)])
    if type(module) is nn.Linear and x.dtype == made.weight.dtype:
        out, into = made.weight.shape  # not what attributes say: weights may be given anew
        return (*x.shape[:-1], out) if tuple(x.shape[-1:]) == (into,) else None
    return None


def shape_of_function(node: Node, given: Sequence[Any]) -> Shape | None:
    """The shape of what a function or method gives, in the dtype and on the device of the first tensor; or None.

    Args:
        node: The call.
        given: Its positional arguments, tensors as anything that has ``shape``, ``dtype`` and ``device``.
    """
    op = METHODS.get(str(node.target)) if node.op == "call_method" else FUNCTIONS.get(node.target)  # type: ignore[arg-type]
    rule = _OF_CALL.get(node.target) or _OF_KIND.get(op)
    return None if rule is None else rule(node, given)


def _kept(node: Node, given: Sequence[Any]) -> Shape | None:
    return tuple(given[0].shape)


def _elementwise(node: Node, given: Sequence[Any]) -> Shape | None:
    """Of two tensors, or a tensor and a number."""
    if len(given) != 2 or node.kwargs or not _plain(given[:1]):
        return None
    one, other = given
    if type(other) in (int, float):
        return tuple(one.shape)
    if not _plain(given):
        return None
    pairs = list(zip_longest(reversed(one.shape), reversed(other.shape), fillvalue=1))
    if any(left != right and 1 not in (left, right) for left, right in pairs):
        return None
    made = tuple(right if left == 1 else left for left, right in reversed(pairs))
    return None if made != tuple(one.shape) and is_inplace(node, None) else made


def _reduced(node: Node, given: Sequence[Any]) -> Shape | None:
    said = dict(zip(("input", "dim", "keepdim"), given, strict=False), **node.kwargs)
    if said.keys() - {"input", "dim", "keepdim"} or not _plain(given[:1]):
        return None
    shape, dim, keep = given[0].shape, said.get("dim"), said.get("keepdim", False)
    axes = [dim] if type(dim) is int else dim
    if not isinstance(axes, (list, tuple)) or not axes or not all(type(axis) is int for axis in axes):
        return None
    gone = {axis % len(shape) for axis in axes if -len(shape) <= axis < len(shape)}
    if len(gone) != len(axes) or type(keep) is not bool:
        return None
    return tuple(1 if at in gone else size for at, size in enumerate(shape) if keep or at not in gone)


def _joined(node: Node, given: Sequence[Any]) -> Shape | None:
    said = dict(zip(("tensors", "dim"), given, strict=False), **node.kwargs)
    parts, dim = given[0], said.get("dim", 0)
    if said.keys() - {"tensors", "dim"} or not isinstance(parts, (list, tuple)) or not _plain(parts):
        return None
    shape = tuple(parts[0].shape)
    if type(dim) is not int or not -len(shape) <= dim < len(shape):
        return None
    dim %= len(shape)
    others = {(*part.shape[:dim], *part.shape[dim + 1 :]) for part in parts}
    if len(others) != 1 or {len(part.shape) for part in parts} != {len(shape)}:
        return None
    return (*shape[:dim], sum(part.shape[dim] for part in parts), *shape[dim + 1 :])


def _plain(values: Sequence[Any]) -> bool:
    """Whether all are tensors of real numbers, of one dtype and device, whose sizes are known numbers."""
    if not values or not all(isinstance(getattr(value, "dtype", None), torch.dtype) for value in values):
        return False  # numpy's numbers have a shape, too
    if not all(value.dtype.is_floating_point for value in values):
        return False
    one_kind = len({(value.dtype, value.device) for value in values}) == 1
    return one_kind and all(type(size) is int for value in values for size in value.shape)


_Rule = Callable[[Node, Sequence[Any]], "Shape | None"]
_OF_CALL: dict[Any, _Rule] = {torch.mean: _reduced, "mean": _reduced} | dict.fromkeys(
    (torch.cat, torch.concat, torch.concatenate), _joined
)
_OF_KIND: dict[Any, _Rule] = {Op.ACT: _kept, Op.ADD: _elementwise, Op.MUL: _elementwise}


def _slid(sliding: Any, x: Any, rank: int) -> Shape | None:
    """What one of torch's own convolutions or pools gives."""
    if len(x.shape) != rank + 2:
        return None
    if isinstance(sliding, nn.modules.conv._ConvNd):
        channels = sliding.weight.shape[1] * sliding.groups
        if x.shape[1] != channels or x.dtype != sliding.weight.dtype or isinstance(sliding.padding, str):
            return None
        out = sliding.weight.shape[0]
    elif sliding.ceil_mode or getattr(sliding, "return_indices", False):
        return None
    else:
        out = x.shape[1]
    given = (sliding.kernel_size, sliding.stride, sliding.padding, getattr(sliding, "dilation", 1))
    kernel, stride, padding, dilation = (per_axis(value, rank) for value in given)
    if not len(kernel) == len(stride) == len(padding) == len(dilation) == rank:
        return None
    if hasattr(sliding, "ceil_mode") and any(2 * pad > taps for pad, taps in zip(padding, kernel, strict=True)):
        return None
    sizes = [
        (x.shape[2 + axis] + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1) // stride[axis] + 1
        for axis in range(rank)
    ]
    return (x.shape[0], out, *sizes) if min(sizes) > 0 else None


def _adapted(asked: Any, x: Any, rank: int) -> Shape | None:
    """What an adaptive average pool gives."""
    wanted = (asked,) * rank if type(asked) is int else asked
    if not isinstance(wanted, (tuple, list)) or (rank == 1 and None in wanted):  # errors
        return None
    if len(x.shape) != rank + 2 or len(wanted) != rank or min(x.shape[2:]) < 1:
        return None
    if not all(size is None or (type(size) is int and size > 0) for size in wanted):
        return None
    return (*x.shape[:2], *(old if new is None else new for new, old in zip(wanted, x.shape[2:], strict=True)))
