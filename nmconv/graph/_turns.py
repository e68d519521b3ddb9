"""Whether a forward may do something else between two of its values than the trace shows."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable

from nmconv.graph._exits import may_turn_off
from nmconv.graph._flow import Flow, FlowNode
from nmconv.graph._records import Frame, ancestors
from nmconv.graph._straight import goes_straight, reaches_into
from nmconv.graph._tracer import FlowTracer

__all__ = ["Turns"]


class Turns:
    """The places where the forwards of one trace may go another way, at other sizes or asked otherwise."""

    def __init__(self, tracer: FlowTracer, flow: Flow) -> None:
        self._tracer = tracer
        self._flow = flow
        self._places = Counter(id(part) for _, part in tracer.root.named_modules(remove_duplicate=False))
        self._order = {node: at for at, node in enumerate(tracer.graph.nodes)}

    def between(self, index: int, node: FlowNode) -> bool:
        """Whether a forward may do something else between the value and the node, at other sizes or asked otherwise."""
        value = self._flow.nodes[index]
        if self._asked_between(value, node):
            return True
        ways = [[*ancestors(frame)] for frame in (value.frame, node.frame)]
        shared = {id(frame) for frame in ways[0]} & {id(frame) for frame in ways[1]}
        lines = [self._tracer.lines.get(value.origin, ()), self._tracer.lines.get(node.origin, ())]
        labels = [value.label, node.label]
        for side, way in enumerate(ways):
            for frame in way:
                if id(frame) in shared:  # the innermost that both are called from
                    if side:
                        turns = self._goes_by_sizes(frame, (value, node), *labels)
                        return turns or may_turn_off(frame.module, *lines)
                    break
                if frame.asks:
                    return True
                lines[side], labels[side] = frame.lines, frame.label
        return False

    def _goes_by_sizes(self, frame: Frame, made: Iterable[FlowNode], first: str, then: str) -> bool:
        """Whether a forward, or one that it is called from, may use one of two parts otherwise at other sizes."""
        if frame.asks and not goes_straight(frame.module, first, then, self._places):
            return True
        inner = frame
        for outer in ancestors(frame.parent):
            if outer.asks and (reaches_into(outer.module, inner.label) or any(map(self._shared, made))):
                return True
            inner = outer
        return False

    def _shared(self, node: FlowNode) -> bool:
        """Whether the module that makes the value is registered in several places."""
        origin = node.origin
        return origin.op == "call_module" and self._places[id(self._tracer.module(str(origin.target)))] > 1

    def _asked_between(self, value: FlowNode, node: FlowNode) -> bool:
        """Whether anything has asked for sizes after the value was made, and may go by that with it."""
        first, last = (bisect_right(self._tracer.questions, self._order[at.origin]) for at in (value, node))
        return first < last
