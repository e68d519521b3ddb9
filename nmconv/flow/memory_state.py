"""Which value each tensor holds at a point of a recording, through views, slices and in-place calls."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Node

from nmconv.flow.flow_graph import FlowNode
from nmconv.flow.ops import Op
from nmconv.recording import Read, Recording

__all__ = ["MemoryState"]


class MemoryState:
    """The values of a flow graph under construction, and the tensors that hold them.

    As in memory SSA, every write makes a new value: afterwards, each alias of the memory holds that one.

    Attributes:
        values: All values so far.
        results: From each node of the recording to the index of the value that it returned.
        current: From each node of the recording to the index of the value that its tensor holds now. Absent for tensors
            that depend on no data, only on numbers and shapes.
    """

    def __init__(self, recording: Recording) -> None:
        self.values: list[FlowNode] = []
        self.results: dict[Node, int] = {}
        self.current: dict[Node, int] = {}
        self._recording = recording
        self._aliases: dict[Node, list[Node]] = {}  # all nodes with the same memory, in full
        self._slices: dict[Node, list[Node]] = {}  # of a node's memory
        self._bases: dict[Node, Node] = {}  # of slices
        self._filled: dict[Read, int] = {}  # data-free tensors that data was written to since

    def add(self, value: FlowNode) -> int:
        """Append a value that its node returns, and return its index."""
        self._append(value)
        self.results[value.origin] = self.current[value.origin] = value.index
        return value.index

    def alias(self, node: Node, index: int) -> None:
        """Note that a node returns an existing value."""
        self.results[node] = self.current[node] = index

    def expose(self, node: Node) -> None:
        """Mark the value that a node returned as exposed."""
        if node in self.results:
            self.values[self.results[node]].exposed = True

    def resolve(self, reads: Iterable[Read]) -> None:
        """Let data-free tensors hold the data that was written to them."""
        for node, writer in reads:
            if node in self.results or writer not in self.results:
                continue
            if (node, writer) not in self._filled:
                shape = self._recording.facts[node].shapes[0]
                filled = FlowNode(0, Op.OTHER, [self.results[writer]], node, name="filled", shape=shape)
                self._filled[node, writer] = self._append(filled)
            self.current[node] = self._filled[node, writer]

    def note_aliasing(self, node: Node, value: FlowNode) -> None:
        """Note whose memory a node's result shares; after an in-place call, let all aliases hold the new value."""
        base = next((other for other in node.all_input_nodes if other in self.current), None)
        out = node.kwargs.get("out")
        if isinstance(out, Node) and out in self.current:
            base = out
        if base is None or not (value.view or value.partial):
            return
        if value.partial:
            self._slices.setdefault(base, []).append(node)
            self._bases[node] = base
            return
        aliases = self._aliases.setdefault(base, [base])
        aliases.append(node)
        self._aliases[node] = aliases
        if value.inplace:
            self._overwrite(aliases, value.index)

    def _append(self, value: FlowNode) -> int:
        value.index = len(self.values)
        self.values.append(value)
        return value.index

    def _overwrite(self, aliases: list[Node], index: int) -> None:
        for alias in aliases:
            self.current[alias] = index
            for part in self._slices.get(alias, ()):
                if part in self.current:
                    self._replace(part, [index])
        self._overwrite_bases(aliases, index)

    def _overwrite_bases(self, slices: list[Node], index: int) -> None:
        """Replace the values of the tensors of which a slice was written."""
        for base in dict.fromkeys(self._bases[part] for part in slices if part in self._bases):
            replaced = self._replace(base, [self.current[base], index])
            aliases = self._aliases.get(base, [base])
            self.current.update(dict.fromkeys(aliases, replaced))
            self._overwrite_bases(aliases, replaced)

    def _replace(self, node: Node, inputs: list[int]) -> int:
        index = self._append(FlowNode(0, Op.OTHER, inputs, node, name="partly overwritten"))
        self.current[node] = index
        return index
