"""Where a unit ends: the value behind its last convolution, its norm and its residual add."""

from __future__ import annotations

from torch import nn

from nmconv.flow import Dominators, Flow, Op, ancestors, is_sequential, summands, zoo
from nmconv.planning import Place

__all__ = ["InsertionPoints"]

_ALONG = {Op.NORM, Op.DROP, Op.PASS, Op.SCALE}


class InsertionPoints:
    """Finds the place behind convolutions that own no activation, in one flow.

    Args:
        flow: With gates resolved and parallel branches folded.
        differing: Names of modules whose forward makes other calls in train mode than in eval mode.
    """

    def __init__(self, flow: Flow, differing: set[str]) -> None:
        self._flow = flow
        self._differing = differing
        self._paths: Dominators | None = None
        self._exposed = [False] * len(flow.nodes)
        for node in reversed(flow.nodes):  # what reaches an output with no further convolution
            if node.op is Op.OUTPUT or (self._exposed[node.index] and node.op not in (Op.CONV, Op.DEAD)):
                for source in (*node.inputs, *node.sides):
                    self._exposed[source] = True

    def place(self, conv: int) -> tuple[Place | None, str]:
        """The place, or None and why there is none."""
        at = self._end(conv)
        if self._exposed[at]:
            return None, "the unit's end reaches an output of the network with no further convolution"
        node = self._flow.nodes[at]
        frame, label, number = node.frame, node.label, node.number
        while frame is not None and frame.result == at and frame.parent is not None:
            if zoo.is_norm_act(frame.module) and isinstance(getattr(frame.module, "act", None), nn.Identity):
                return Place(frame.path, "forward", "act", 1, "slot"), ""
            if not is_sequential(frame.module):
                break
            frame, label, number = frame.parent, frame.label, frame.number
        if frame is None or label.startswith("/"):
            return None, "the unit's end cannot be named"
        if frame.path in self._differing:
            return None, f"the forward of {frame.path or 'the model'} differs between eval and train mode"
        if is_sequential(frame.module):
            return Place(frame.path, "forward", label, number, "insert"), ""
        if node.frame is not None and node.frame.parent is None and node.method != "forward":
            return None, "the unit's end lies in another method than forward, which others may call on its own"
        return Place(frame.path, "forward", label, number, "rewrite"), ""

    def _end(self, conv: int) -> int:
        flow, at = self._flow, conv
        while flow.single(at):
            reader = flow.readers[at][0]
            node = flow.nodes[reader]
            if node.op is Op.ADD:
                return self._join(conv, at, reader)
            if node.op not in _ALONG and not (node.op is Op.GATED and node.inputs[0] == at):
                break
            # A dropout of the next block may hand on the very tensor: others that read it seem to read that.
            around = [*ancestors(flow.nodes[at].frame)]
            if node.op in (Op.DROP, Op.PASS) and node.frame not in around:
                break
            at = reader
        return at

    def _join(self, conv: int, at: int, add: int) -> int:
        """The sum, if the convolution is on its longest branch; else the value before it."""
        flow = self._flow
        while flow.single(add) and flow.nodes[flow.readers[add][0]].op is Op.ADD:
            add = flow.readers[add][0]
        self._paths = self._paths or Dominators(flow)
        operands = summands(flow, add)
        fork = self._paths.fork(operands)
        lengths = {operand: self._paths.convs_above(operand, fork) for operand in operands}
        return add if lengths.get(at, -1) == max(lengths.values()) else at
