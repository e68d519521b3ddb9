"""Forks and joins: dominators, post-dominators, and the longest path of convolutions between two points."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

from nmconv.flow.flow_graph import Flow
from nmconv.flow.ops import Op

__all__ = ["Dominators"]

_Tree = dict[int, tuple[int, int]]  # from a node to its immediate dominator and its depth


class Dominators:
    """Dominators and post-dominators of a flow's main path.

    Node -1 is the common source of all inputs, node ``len(flow.nodes)`` the common exit.
    """

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        count = len(flow.nodes)
        live = [flow.main[index] and flow.nodes[index].op not in (Op.DEAD, Op.PARAM) for index in range(count)]
        order = [index for index in range(count) if live[index]]
        self._inputs = [
            [source for source in flow.nodes[index].inputs if live[source]] if live[index] else []
            for index in range(count)
        ]
        self._dominators = _dominator_tree(order, self._inputs, -1)
        self._post_dominators = _dominator_tree(order[::-1], flow.readers, count)

    def fork(self, operands: Sequence[int]) -> int:
        """Return the last value that all paths to all of ``operands`` pass through."""
        return reduce(lambda one, other: _common_ancestor(self._dominators, one, other), operands)

    def join(self, index: int) -> int:
        """Return the first value that all paths from ``index`` to an output pass through."""
        return self._post_dominators[index][0] if index in self._post_dominators else len(self._flow.nodes)

    def meeting(self, indices: Sequence[int]) -> int:
        """Return the first value after all of ``indices`` that all paths from them to an output pass through."""
        return reduce(lambda one, other: _common_ancestor(self._post_dominators, one, other), map(self.join, indices))

    def convs_above(self, operand: int, fork: int) -> int:
        """Return the most convolutions on a path from ``fork`` (exclusive) to ``operand`` (inclusive)."""
        if operand == fork:
            return 0
        return self._longest(operand, fork, self._inputs, range(fork + 1, operand + 1))

    def convs_below(self, index: int, join: int) -> int:
        """Return the most convolutions on a path from ``index`` (inclusive) to ``join`` (exclusive)."""
        end = min(join, len(self._flow.nodes))
        return self._longest(index, join, self._flow.readers, range(end - 1, index - 1, -1))

    def _longest(self, start: int, stop: int, edges: Sequence[Sequence[int]], order: range) -> int:
        """Return the longest path from ``start`` that does not enter ``stop``.

        ``order`` visits each node after all nodes that its edges lead to.
        """
        longest: dict[int, int] = {}
        for index in order:
            rest = [longest[other] for other in edges[index] if other in longest and other != stop]
            longest[index] = (self._flow.nodes[index].op is Op.CONV) + max(rest, default=0)
        return longest[start]


def _dominator_tree(order: Sequence[int], predecessors: Sequence[Sequence[int]], root: int) -> _Tree:
    """Return the dominator tree of nodes in topological order."""
    tree: _Tree = {root: (root, 0)}
    for index in order:
        parents = [parent for parent in predecessors[index] if parent in tree] or [root]
        parent = reduce(lambda one, other: _common_ancestor(tree, one, other), parents)
        tree[index] = (parent, tree[parent][1] + 1)
    return tree


def _common_ancestor(tree: _Tree, one: int, other: int) -> int:
    while one != other:
        if tree[one][1] >= tree[other][1]:
            one = tree[one][0]
        else:
            other = tree[other][0]
    return one
