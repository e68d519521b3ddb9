"""Which activations must leave a copy when they go: where readers would come to share memory that is overwritten."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from nmconv.flow.flow_graph import Flow, FlowNode
from nmconv.flow.ops import Op

__all__ = ["must_copy", "sums_must_copy"]

# Their output is not needed for their own gradient, so overwriting it harms nobody.
_FREE = {Op.CONV, Op.LINEAR, Op.NORM, Op.ADD, Op.SCALE, Op.GATED, Op.POOL, Op.LAYOUT, Op.PASS, Op.DROP}
# Their memory belongs to the caller or to the model.
_FOREIGN = {Op.INPUT, Op.PARAM}


def must_copy(flow: Flow) -> set[int]:
    """Indices of out-of-place activations whose identity must copy.

    Decided for each alone, as if every other one went too (a dropped activation hands its memory on) and as if every
    other one stayed (it overwrites, and its gradient needs what it read or made): whatever a plan drops, the answer is
    safe.
    """
    memory = _Memory(flow)
    return {
        node.index
        for node in flow.nodes
        if node.op is Op.ACT and not node.inplace and (_not_dense(flow, node.inputs[0]) or memory.hazard(node.index))
    }


def sums_must_copy(flow: Flow, kept: Mapping[int, int]) -> set[int]:
    """Indices of sums in whose place a copy of the operand that stays must be.

    Args:
        flow: With all nodes of the sums' other operands.
        kept: From sums to the operands that would take their places.
    """
    memory = _Memory(flow, kept)
    return {index for index in kept if _not_dense(flow, kept[index]) or memory.hazard(index)}


def _not_dense(flow: Flow, at: int) -> bool:
    """Whether a value may be a slice or an expansion, of which what is left out made a dense copy."""
    while flow.nodes[at].inputs and flow.nodes[at].op in (Op.PASS, Op.DROP, Op.ACT):
        at = flow.nodes[at].inputs[0]
    return flow.nodes[at].op is Op.LAYOUT or flow.nodes[at].partial


class _Memory:
    """Of each value: whose memory it may share, and who shares, overwrites or only reads its own."""

    def __init__(self, flow: Flow, kept: Mapping[int, int] | None = None) -> None:
        self.nodes = flow.nodes
        self.shared: list[list[int]] = [[] for _ in flow.nodes]
        self.sharers: list[list[int]] = [[] for _ in flow.nodes]
        self.writers: list[list[int]] = [[] for _ in flow.nodes]
        self.readers: list[list[int]] = [[] for _ in flow.nodes]
        for node in flow.nodes:
            first, shares = _first(node), node.op is Op.ACT or node.view or node.partial
            if kept and node.index in kept:
                first, shares = [kept[node.index]], True
            for source in {*node.inputs, *node.sides}:
                if shares and source in first:
                    self.shared[node.index].append(source)
                    self.sharers[source].append(node.index)
                else:
                    self.readers[source].append(node.index)
                if node.inplace and source in first:
                    self.writers[source].append(node.index)

    def hazard(self, act: int) -> bool:
        """Whether it matters that what a node gives (below) be other memory than what it reads (above)."""
        below = _closure({act}, self.sharers)
        above = _closure(_closure({act}, self.shared), self.sharers) - below
        if self._overwritten(above, act):
            return True  # the output is there to be read, or kept for a gradient
        if self._overwritten(below, act) and (any(self.readers[at] for at in above) or self._ops(above) - _FREE):
            return True
        return self._returned(below) and (self._returned(above) or bool(self._ops(above) & _FOREIGN))

    def _overwritten(self, values: set[int], act: int) -> bool:
        return any(writer > act for at in values for writer in self.writers[at])

    def _returned(self, values: set[int]) -> bool:
        return Op.OUTPUT in self._ops(reader for at in values for reader in self.readers[at])

    def _ops(self, values: Iterable[int]) -> set[Op]:
        return {self.nodes[at].op for at in values}


def _first(node: FlowNode) -> list[int]:
    """What may be the first operand: any, where gates were sorted from the main path."""
    return [*node.inputs, *node.sides] if node.op is Op.GATED else node.inputs[:1]


def _closure(start: set[int], step: list[list[int]]) -> set[int]:
    found, todo = set(start), list(start)
    while todo:
        for other in step[todo.pop()]:
            if other not in found:
                found.add(other)
                todo.append(other)
    return found
