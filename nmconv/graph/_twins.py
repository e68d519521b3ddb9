"""Whether a model's traces in both modes are the same, call by call."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from nmconv.graph._ops import FUNCTIONS, Op
from nmconv.graph._records import Frame
from nmconv.graph._tracer import FlowTracer

__all__ = ["twins"]


def twins(one: FlowTracer, other: FlowTracer) -> dict[Node, Node] | None:
    """From each node of a trace to its like in another, or None where the two differ.

    They are alike if they make the same calls with the same values in the same frames; only what a dropout is told of
    the mode may differ.
    """
    left, right = one.graph.nodes, other.graph.nodes
    if one.prefix != other.prefix or len(left) != len(right) or one.questions != other.questions:
        return None
    if one.constants or other.constants:
        return None
    pairs: dict[Node, Node] = {}
    frames: dict[int, Frame] = {}
    for mine, its in zip(left, right, strict=True):
        free = FUNCTIONS.get(mine.target) is Op.DROP
        if (
            _told(one, mine) != _told(other, its)
            or not _same_frame(one.where.get(mine), other.where.get(its), frames)
            or not _same(mine.args, its.args, pairs, free)
            or not _same(mine.kwargs, its.kwargs, pairs, free)
        ):
            return None
        pairs[mine] = its
    return pairs


def _told(tracer: FlowTracer, node: Node) -> tuple[Any, ...]:
    _, label, number = tracer.where.get(node, (None, "", 0))
    lost = node in tracer.dead, node in tracer.opaque
    return node.op, node.target, label, number, *lost, tracer.methods.get(node), tracer.lines.get(node)


def _same_frame(one: Any, other: Any, frames: dict[int, Frame]) -> bool:
    mine, its = (None if where is None else where[0] for where in (one, other))
    while mine is not None and its is not None:
        known = frames.get(id(mine))
        if known is not None:
            return known is its
        if _of(mine) != _of(its):
            return False
        frames[id(mine)] = its
        mine, its = mine.parent, its.parent
    return mine is its


def _of(frame: Frame) -> tuple[Any, ...]:
    return id(frame.module), frame.path, frame.label, frame.number, frame.start, frame.asks, frame.lines


def _same(one: Any, other: Any, pairs: dict[Node, Node], free: bool) -> bool:
    if isinstance(one, Node):
        return pairs.get(one) is other
    if type(one) is not type(other):
        return False
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(
            _same(mine, its, pairs, free) for mine, its in zip(one, other, strict=True)
        )
    if isinstance(one, dict):
        return list(one) == list(other) and all(_same(value, other[key], pairs, free) for key, value in one.items())
    if isinstance(one, slice):
        return _same((one.start, one.stop, one.step), (other.start, other.stop, other.step), pairs, free)
    return bool(one == other) or (free and type(one) is bool)
