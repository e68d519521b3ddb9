"""The numbers in a trace: which nodes are numbers, and which of their values are known."""

from __future__ import annotations

from typing import Any

from torch.fx import Node
from torch.fx.node import map_arg
from torch.fx.proxy import TraceError

__all__ = ["Numbers"]


class Numbers:
    """The nodes of a trace that are numbers: arguments, settings, sizes, and what is computed from these alone.

    Attributes:
        known: The values of arguments and settings, and of what is computed from these alone.
        guards: From each argument or setting whose value the trace depends on to that value.
    """

    def __init__(self) -> None:
        self.known: dict[Node, Any] = {}
        self.guards: dict[str, Any] = {}
        self._nodes: set[Node] = set()
        self._origins: dict[Node, str] = {}

    def __contains__(self, node: Node) -> bool:
        return node in self._nodes

    def add(self, node: Node, origin: str, value: Any) -> None:
        """Note that a node is an argument or a setting; its value is known unless it is an ``UnknownNumber``."""
        self._nodes.add(node)
        if type(value) in (int, float):
            self.known[node] = value
            self._origins[node] = origin

    def infer(self, node: Node) -> None:
        """Note whether a node is a number, and its value, by what it is computed from."""
        sources = node.all_input_nodes
        if _returns_sizes(node) or (sources and self._nodes.issuperset(sources)):
            self._nodes.add(node)
        if node.op == "call_function" and sources and all(source in self.known for source in sources):
            target: Any = node.target
            args, kwargs = map_arg((node.args, node.kwargs), self.known.__getitem__)
            self.known[node] = target(*args, **kwargs)

    def value_of(self, node: Node) -> Any:
        """Return the value of a known number, and guard all that it depends on.

        Raises:
            TraceError: If the value is not known.
        """
        if node not in self.known:
            raise TraceError("the forward branches on a shape or value")
        todo = [node]
        while todo:
            source = todo.pop()
            if source in self._origins:
                self.guards[self._origins[source]] = self.known[source]
            todo += source.all_input_nodes
        return self.known[node]


def _returns_sizes(node: Node) -> bool:
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel", "stride")
    return node.op == "call_function" and node.target is getattr and node.args[1] in ("shape", "ndim")
