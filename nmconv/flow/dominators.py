"""Forks and joins: dominators, and the longest run of convolutions between two points."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

from nmconv.flow.flow_graph import Flow
from nmconv.flow.ops import Op

__all__ = ["Dominators"]


class Dominators:
    """Dominators of a flow's main path, both ways. Node -1 is the source of everything, ``len`` the common exit."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        count = len(flow.nodes)
        live = [flow.main[index] and flow.nodes[index].op not in (Op.DEAD, Op.PARAM) for index in range(count)]
        self._inputs = [
            [source for source in flow.nodes[index].inputs if live[source]] if live[index] else []
            for index in range(count)
        ]
        self._above = self._tree([index for index in range(count) if live[index]], self._inputs, -1)
        self._below = self._tree([index for index in reversed(range(count)) if live[index]], flow.readers, count)

    @staticmethod
    def _tree(order: Sequence[int], before: Sequence[Sequence[int]], root: int) -> dict[int, tuple[int, int]]:
        """Immediate dominator and depth of every node, for an order in which ``before`` comes first."""
        tree: dict[int, tuple[int, int]] = {root: (root, 0)}
        for index in order:
            parents = [parent for parent in before[index] if parent in tree] or [root]
            parent = reduce(lambda one, other: Dominators._meet(tree, one, other), parents)
            tree[index] = (parent, tree[parent][1] + 1)
        return tree

    @staticmethod
    def _meet(tree: dict[int, tuple[int, int]], one: int, other: int) -> int:
        while one != other:
            if tree[one][1] >= tree[other][1]:
                one = tree[one][0]
            else:
                other = tree[other][0]
        return one

    def fork(self, operands: Sequence[int]) -> int:
        """The last value that all paths to all of ``operands`` pass through."""
        return reduce(lambda one, other: self._meet(self._above, one, other), operands)

    def join(self, index: int) -> int:
        """The first value that all paths from ``index`` to an output pass through."""
        return self._below[index][0] if index in self._below else len(self._flow.nodes)

    def meeting(self, indices: Sequence[int]) -> int:
        """The first value behind all of ``indices`` that all paths from them to an output pass through."""
        return reduce(lambda one, other: self._meet(self._below, one, other), map(self.join, indices))

    def convs_above(self, operand: int, fork: int) -> int:
        """The most convolutions on a path from behind ``fork`` up to and including ``operand``."""
        if operand == fork:
            return 0
        return self._longest(operand, fork, self._inputs, range(fork + 1, operand + 1))

    def convs_below(self, index: int, join: int) -> int:
        """The most convolutions on a path from ``index``, included, to before ``join``."""
        end = min(join, len(self._flow.nodes))
        return self._longest(index, join, self._flow.readers, range(end - 1, index - 1, -1))

    def _longest(self, start: int, stop: int, onward: Sequence[Sequence[int]], order: range) -> int:
        """Longest path from ``start`` onwards, not into ``stop``; ``order`` visits a node after all it leads to."""
        best: dict[int, int] = {}
        for index in order:
            further = [best[other] for other in onward[index] if other in best and other != stop]
            best[index] = (self._flow.nodes[index].op is Op.CONV) + max(further, default=0)
        return best[start]
