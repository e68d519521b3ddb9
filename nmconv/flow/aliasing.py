"""Aliasing: which activations cannot become a plain identity, since memory that others read would be overwritten."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from nmconv.flow.flow_graph import Flow, FlowNode
from nmconv.flow.ops import Op

__all__ = ["must_copy", "sums_must_copy"]

# Their backward pass does not need their output, so overwriting it is harmless.
_OUTPUT_UNUSED_IN_BACKWARD = {
    *(Op.CONV, Op.LINEAR, Op.NORM, Op.ADD, Op.SCALE, Op.GATED, Op.POOL, Op.LAYOUT, Op.PASS, Op.DROP),
}
# Their memory belongs to the caller or to the model.
_EXTERNAL = {Op.INPUT, Op.PARAM}


def must_copy(flow: Flow) -> set[int]:
    """Return the indices of the out-of-place activations that must be replaced by a copy when they are dropped.

    Each is decided on its own under two assumptions at once: every other activation is dropped (and passes its memory
    on), and every other one is kept (and overwrites, and needs its input or output for its gradient). So the answer is
    safe whatever a plan drops.
    """
    aliases = _AliasGraph(flow)
    return {
        node.index
        for node in flow.nodes
        if node.op is Op.ACT
        and not node.inplace
        and (
            _may_be_strided(flow, node.inputs[0])
            or aliases.is_input_read_elsewhere(node.index)
            or aliases.needs_copy(node.index)
        )
    }


def sums_must_copy(flow: Flow, kept: Mapping[int, int]) -> set[int]:
    """Return the indices of the sums that must be replaced by a copy of their remaining operand.

    Args:
        flow: The flow graph, with all nodes of the removed operands.
        kept: From each sum to the operand that replaces it.
    """
    aliases = _AliasGraph(flow, kept)
    return {index for index in kept if _may_be_strided(flow, kept[index]) or aliases.needs_copy(index)}


def _may_be_strided(flow: Flow, index: int) -> bool:
    """Return whether a value may be a slice or an expanded view, where the removed operation returned a dense copy."""
    node = flow.nodes[index]
    while node.inputs and node.op in (Op.PASS, Op.DROP, Op.ACT):
        node = flow.nodes[node.inputs[0]]
    return node.op is Op.LAYOUT or node.partial


class _AliasGraph:
    """For each value: which values it may share memory with, and who overwrites or only reads it."""

    def __init__(self, flow: Flow, kept: Mapping[int, int] | None = None) -> None:
        self._nodes = flow.nodes
        self._bases: list[list[int]] = [[] for _ in flow.nodes]  # earlier values whose memory it may share
        self._aliases: list[list[int]] = [[] for _ in flow.nodes]  # later values that may share its memory
        self._writers: list[list[int]] = [[] for _ in flow.nodes]
        self._readers: list[list[int]] = [[] for _ in flow.nodes]
        for node in flow.nodes:
            bases, shares = _possible_bases(node), node.op is Op.ACT or node.view or node.partial
            if kept and node.index in kept:
                bases, shares = [kept[node.index]], True
            for source in {*node.inputs, *node.side_inputs}:
                if shares and source in bases:
                    self._bases[node.index].append(source)
                    self._aliases[source].append(node.index)
                else:
                    self._readers[source].append(node.index)
                if node.inplace and source in bases:
                    self._writers[source].append(node.index)

    def needs_copy(self, index: int) -> bool:
        """Return whether the results depend on the node's output not sharing memory with its input."""
        output, source = self._output_and_source(index)
        if self._overwritten_after(source, index):
            return True  # the output is read later, or kept for a gradient
        if self._overwritten_after(output, index):
            read = any(self._readers[value] for value in source)
            if read or self._ops(source) - _OUTPUT_UNUSED_IN_BACKWARD:
                return True
        return self._returned(output) and (self._returned(source) or bool(self._ops(source) & _EXTERNAL))

    def is_input_read_elsewhere(self, index: int) -> bool:
        """Return whether something else reads the node's input, which a path that was not recorded may overwrite."""
        _, source = self._output_and_source(index)
        return any(self._readers[value] or self._nodes[value].hooked for value in source)

    def _output_and_source(self, index: int) -> tuple[set[int], set[int]]:
        """Return the values that may share memory with a node's output, and the others that may with its input."""
        output = _reachable({index}, self._aliases)
        return output, _reachable(_reachable({index}, self._bases), self._aliases) - output

    def _overwritten_after(self, values: set[int], index: int) -> bool:
        return any(writer > index for value in values for writer in self._writers[value])

    def _returned(self, values: set[int]) -> bool:
        return Op.OUTPUT in self._ops(reader for value in values for reader in self._readers[value])

    def _ops(self, values: Iterable[int]) -> set[Op]:
        return {self._nodes[value].op for value in values}


def _possible_bases(node: FlowNode) -> list[int]:
    """Return the values that may be the call's first operand; gate resolution has lost the order of a product's."""
    return [*node.inputs, *node.side_inputs] if node.op is Op.GATED else node.inputs[:1]


def _reachable(start: set[int], edges: list[list[int]]) -> set[int]:
    reached, todo = set(start), list(start)
    while todo:
        for other in edges[todo.pop()]:
            if other not in reached:
                reached.add(other)
                todo.append(other)
    return reached
