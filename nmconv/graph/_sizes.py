"""Which nodes of a trace are shapes, which are numbers made of them, and which of these depend on sizes."""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Node

from nmconv.graph._ops import FUNCTIONS, METHODS, Op

__all__ = ["Sizes"]


class Sizes:
    """Shapes and numbers of one graph, noted node by node as it grows."""

    def __init__(self) -> None:
        self._numbers: set[Node] = set()
        self._shapes: set[Node] = set()

    def note(self, node: Node) -> None:
        """Remember the node if it is a shape, or a number computed from shapes."""
        sources = node.all_input_nodes
        if node.op == "call_method" and node.target in ("size", "dim", "numel", "stride"):
            (self._shapes if node.target in ("size", "stride") and len(node.args) == 1 else self._numbers).add(node)
        elif node.target is getattr:
            if node.args[1] == "shape":
                self._shapes.add(node)
            elif node.args[1] == "ndim":
                self._numbers.add(node)
        elif node.target is operator.getitem and sources and sources[0] in self._shapes:
            (self._shapes if isinstance(node.args[1], slice) else self._numbers).add(node)
        elif (
            node.op == "call_function"
            and sources
            and getattr(node.target, "__module__", "") in ("_operator", "math")
            and all(source in self._numbers for source in sources)
        ):
            self._numbers.add(node)

    def is_shape(self, node: Node) -> bool:
        """Whether the node is a tensor's shape, or a part of one."""
        return node in self._shapes

    def is_number(self, node: Node) -> bool:
        """Whether the node is a number computed from shapes."""
        return node in self._numbers

    def is_sized(self, node: Node) -> bool:
        """Whether a value depends on sizes: more than the number of channels (axis 1) and of axes, which layers fix."""
        todo, seen = [node], {node}
        while todo:
            at = todo.pop()
            axis = at.args[1] if len(at.args) > 1 else None
            if (at.target is operator.getitem and at.all_input_nodes[0] in self._shapes) or at.target == "size":
                if axis != 1 or _is_laid_out_anew(at.all_input_nodes[0]):
                    return True
            elif not (at.target == "dim" or (at.target is getattr and axis == "ndim")):
                if at in self._shapes or not at.all_input_nodes:
                    return True
                todo += [source for source in at.all_input_nodes if source not in seen]
                seen.update(at.all_input_nodes)
        return False


def _is_laid_out_anew(node: Node | None) -> bool:
    """Whether what is in axis 1 of a tensor, or of one whose shape this is, may have been in another."""
    while node is not None and node.op in ("call_function", "call_method"):
        table: Any = FUNCTIONS if node.op == "call_function" else METHODS
        if table.get(node.target) is Op.LAYOUT or node.target is operator.getitem:
            return True
        node = next(iter(node.all_input_nodes), None)
    return False
