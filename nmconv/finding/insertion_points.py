"""Find where an activation can be inserted at a unit's end: after its last convolution, norm and residual add."""

from __future__ import annotations

from torch import nn

from nmconv.flow import Dominators, Flow, Op, ancestors, is_norm_act, is_sequential, summands
from nmconv.planning import Place

__all__ = ["InsertionPoints"]

_PART_OF_UNIT = {Op.NORM, Op.DROP, Op.PASS, Op.SCALE}


class InsertionPoints:
    """Finds insertion points after convolutions that own no activation, in one flow.

    Args:
        flow: With gates resolved and parallel branches folded.
        differing: Names of modules whose forward makes other calls in train mode than in eval mode.
    """

    def __init__(self, flow: Flow, differing: set[str]) -> None:
        self._flow = flow
        self._differing = differing
        self._paths: Dominators | None = None
        self._reaches_output = [False] * len(flow.nodes)  # with no further convolution
        for node in reversed(flow.nodes):
            continues = self._reaches_output[node.index] and node.op not in (Op.CONV, Op.DEAD)
            if node.op is Op.OUTPUT or continues:
                for source in (*node.inputs, *node.side_inputs):
                    self._reaches_output[source] = True

    def place(self, conv: int) -> tuple[Place | None, str]:
        """Return the insertion point after a convolution, or None and the reason why there is none."""
        end = self._end(conv)
        if self._reaches_output[end]:
            return None, "the unit's end reaches an output of the network with no further convolution"
        node = self._flow.nodes[end]
        frame, label, number = node.frame, node.label, node.number
        while frame is not None and frame.result == end and frame.parent is not None:
            if is_norm_act(frame.module) and isinstance(getattr(frame.module, "act", None), nn.Identity):
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
        """Return the index of the last value that belongs to a convolution's unit."""
        flow, end = self._flow, conv
        while flow.single(end):
            reader = flow.nodes[flow.readers[end][0]]
            if reader.op is Op.ADD:
                return self._end_at_sum(end, reader.index)
            if reader.op not in _PART_OF_UNIT and not (reader.op is Op.GATED and reader.inputs[0] == end):
                break
            # A dropout of the next block may return its input itself: other readers then seem to read the dropout.
            in_frame_of_end = any(reader.frame is frame for frame in ancestors(flow.nodes[end].frame))
            if reader.op in (Op.DROP, Op.PASS) and not in_frame_of_end:
                break
            end = reader.index
        return end

    def _end_at_sum(self, operand: int, add: int) -> int:
        """Return the sum if the operand is on its longest branch, else the operand."""
        flow = self._flow
        while flow.single(add) and flow.nodes[flow.readers[add][0]].op is Op.ADD:
            add = flow.readers[add][0]
        self._paths = self._paths or Dominators(flow)
        operands = summands(flow, add)
        fork = self._paths.fork(operands)
        lengths = {each: self._paths.convs_above(each, fork) for each in operands}
        return add if lengths.get(operand, -1) == max(lengths.values()) else operand
