"""Divide linear runs where a recording contradicts them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from nmconv.algebra import Refusal
from nmconv.finding import Element, ParallelSum, Step, steps_of
from nmconv.merging.nodes import RunNode
from nmconv.merging.report import Merge
from nmconv.planning import ReplacedSum
from nmconv.surgery import Witness
from nmconv.witness import MergedGroup

__all__ = ["RunDivider", "merged_groups"]

_Key = tuple[str, ...]


def merged_groups(*rounds: Iterable[Merge]) -> list[MergedGroup]:
    """Return merges as groups of modules for the witness.

    Args:
        rounds: The merges of each call of merge, in order.
    """
    groups: list[MergedGroup] = []
    for number, merges in enumerate(rounds):
        for merge in merges:
            members = frozenset(filter(None, (merge.head, *merge.removed, merge.norm)))
            inner = [group for group in groups if not members.isdisjoint(group.members)]
            groups = [group for group in groups if group not in inner]
            members = members.union(*(group.members for group in inner))
            sums = tuple(numbered for group in inner for numbered in group.sums)
            groups.append(MergedGroup(merge.head, members, (*sums, *((number, addition) for addition in merge.sums))))
    return groups


class RunDivider:
    """Divides runs where a recording shows something between two elements that eval mode's recording does not.

    Args:
        witness: Recordings of the model; None: runs are never divided.
    """

    def __init__(self, witness: Witness | None) -> None:
        self._witness = witness
        self._between: dict[tuple[_Key, _Key], str] = {}  # by neighbors, the reason to divide between them, or ""
        self._sums: dict[_Key, str] = {}  # by sum, the reason why it cannot be merged, or ""

    def compare(self, runs: Sequence[Sequence[RunNode]]) -> None:
        """Compare runs with the recordings; :meth:`divided` uses the result."""
        if self._witness is None:
            return
        pieces = [piece for nodes in runs for piece in _mergeable_pieces(nodes) if _is_comparable(piece)]
        whys = self._reasons(pieces)
        broken = [piece for piece, why in zip(pieces, whys, strict=True) if why]
        sums = [[node] for piece in broken for node in piece if isinstance(node.element, ParallelSum)]
        for (node,), why in zip(sums, self._reasons(sums), strict=True):
            self._sums[_key(node)] = why
        for first in (0, 1):  # disjoint pairs, since groups must not overlap
            pairs = [list(piece[at : at + 2]) for piece in broken for at in range(first, len(piece) - 1, 2)]
            for (one, other), why in zip(pairs, self._reasons(pairs), strict=True):
                self._between[_key(one), _key(other)] = why
        for piece, why in zip(pieces, whys, strict=True):
            keys = [(_key(one), _key(other)) for one, other in pairwise(piece)]
            if why and not any(self._between.get(key) for key in keys):  # no pair explains it: divide everywhere
                self._between.update(dict.fromkeys(keys, why))

    def divided(self, nodes: Sequence[RunNode]) -> tuple[RunNode, ...]:
        """Return the nodes of a run, with a node that cannot be merged inserted wherever the run is divided."""
        result: list[RunNode] = []
        last: RunNode | None = None
        for node in nodes:
            if isinstance(node.element, ParallelSum) and self._sums.get(_key(node)):
                node.geometry = Refusal(self._sums[_key(node)])
            if not _is_pass(node):
                why = "" if last is None else self._between.get((_key(last), _key(node)), "")
                if why:
                    assert last is not None
                    result.append(
                        RunNode(_identity_step(last.element), Refusal(why), node.input_sizes, node.input_sizes, 0)
                    )
                last = node
            result.append(node)
        return tuple(result)

    def _reasons(self, pieces: Sequence[Sequence[RunNode]]) -> list[str]:
        """Return for each piece the reason why it is not one chain in every recording, or ""."""
        assert self._witness is not None
        groups = [_group(f"{index}", piece) for index, piece in enumerate(pieces)]
        broken = self._witness.broken(groups) if groups else {}
        return [broken.get(f"{index}", "") for index in range(len(pieces))]


def _mergeable_pieces(nodes: Sequence[RunNode]) -> Iterator[list[RunNode]]:
    """Yield consecutive nodes that can be merged, without identities."""
    piece: list[RunNode] = []
    for node in nodes:
        if isinstance(node.geometry, Refusal):
            yield piece
            piece = []
        elif not _is_pass(node):
            piece.append(node)
    yield piece


def _is_comparable(piece: Sequence[RunNode]) -> bool:
    return len(piece) > 1 or any(isinstance(node.element, ParallelSum) for node in piece)


def _is_pass(node: RunNode) -> bool:
    return isinstance(node.element, Step) and node.element.kind == "pass"


def _key(node: RunNode) -> _Key:
    element = node.element
    return (element.owner, element.label, str(element.number)) if isinstance(element, ParallelSum) else (element.name,)


def _identity_step(element: Element) -> Step:
    """Return a step that does nothing, named after a module of the element."""
    return Step("pass", next(steps_of([element])).name)


def _group(head: str, piece: Sequence[RunNode]) -> MergedGroup:
    elements = [node.element for node in piece]
    members = frozenset(step.name for step in steps_of(elements) if step.kind != "pass")
    return MergedGroup(head, members, tuple((0, addition) for addition in _sums_of(elements)))


def _sums_of(elements: Iterable[Element]) -> Iterator[ReplacedSum]:
    for element in elements:
        if isinstance(element, ParallelSum):
            for branch in element.branches:
                yield from _sums_of(branch)
            yield ReplacedSum(element.owner, element.label, element.number, 0)
