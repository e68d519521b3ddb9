"""Linear runs held against recordings: what is no single chain in every one of them is divided there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from nmconv.algebra import Refusal
from nmconv.finding import Element, Join, steps_of
from nmconv.merging.partitioning import Node
from nmconv.merging.report import Merge
from nmconv.planning import Sum
from nmconv.surgery import Witness
from nmconv.witness import MergedGroup

__all__ = ["RecordedRuns", "groups_of"]

_Key = tuple[str, ...]


def groups_of(*rounds: Iterable[Merge]) -> list[MergedGroup]:
    """What merges put together, as the witness takes it: each round of them is made of what the one before left."""
    found: list[MergedGroup] = []
    for number, merges in enumerate(rounds):
        for merge in merges:
            members = frozenset(filter(None, (merge.head, *merge.removed, merge.norm)))
            inner = [group for group in found if not members.isdisjoint(group.members)]
            found = [group for group in found if group not in inner]
            members = members.union(*(group.members for group in inner))
            sums = tuple(pair for group in inner for pair in group.sums)
            found.append(MergedGroup(merge.head, members, (*sums, *((number, addition) for addition in merge.sums))))
    return found


class RecordedRuns:
    """Divides runs where a recording shows something else between two elements than eval mode's does.

    Args:
        witness: What the model did; None: nothing is divided.
    """

    def __init__(self, witness: Witness | None) -> None:
        self._witness = witness
        self._between: dict[tuple[_Key, _Key], str] = {}  # pairs of neighbours, and why they are none; "" if they are
        self._joins: dict[_Key, str] = {}

    def look_at(self, runs: Sequence[Sequence[Node]]) -> None:
        """Find out where runs are to be divided."""
        if self._witness is None:
            return
        pieces = [piece for nodes in runs for piece in _pieces(nodes) if _tells(piece)]
        whole = self._broken(pieces)
        broken = [piece for piece, why in zip(pieces, whole, strict=True) if why]
        joins = [[node] for piece in broken for node in piece if isinstance(node.element, Join)]
        for (node,), why in zip(joins, self._broken(joins), strict=True):
            self._joins[_key(node)] = why
        for first in (0, 1):
            pairs = [list(piece[at : at + 2]) for piece in broken for at in range(first, len(piece) - 1, 2)]
            for (one, other), why in zip(pairs, self._broken(pairs), strict=True):
                self._between[_key(one), _key(other)] = why
        for piece, why in zip(pieces, whole, strict=True):
            inside = [self._between.get((_key(one), _key(other)), "") for one, other in pairwise(piece)]
            if why and not any(inside):  # no pair shows it: nothing of it is believed
                self._between.update({(_key(one), _key(other)): why for one, other in pairwise(piece)})

    def divided(self, nodes: Sequence[Node]) -> tuple[Node, ...]:
        """The nodes, with one that cannot be merged wherever the run is to be divided."""
        found: list[Node] = []
        last: Node | None = None
        for node in nodes:
            if isinstance(node.element, Join) and self._joins.get(_key(node)):
                node.geometry = Refusal(self._joins[_key(node)])
            if _is_loud(node):
                why = "" if last is None else self._between.get((_key(last), _key(node)), "")
                if why:
                    assert last is not None
                    found.append(Node(_quiet(last.element), Refusal(why), node.sizes, node.sizes, 0))
                last = node
            found.append(node)
        return tuple(found)

    def _broken(self, pieces: Sequence[Sequence[Node]]) -> list[str]:
        """For each piece why it is not one chain in every recording, or ""."""
        assert self._witness is not None
        groups = [_group(f"{at}", piece) for at, piece in enumerate(pieces)]
        broken = self._witness.broken(groups) if groups else {}
        return [broken.get(f"{at}", "") for at in range(len(pieces))]


def _pieces(nodes: Sequence[Node]) -> Iterator[list[Node]]:
    """What can merge, without what hands on its input."""
    piece: list[Node] = []
    for node in nodes:
        if isinstance(node.geometry, Refusal):
            yield piece
            piece = []
        elif _is_loud(node):
            piece.append(node)
    yield piece


def _tells(piece: Sequence[Node]) -> bool:
    return len(piece) > 1 or any(isinstance(node.element, Join) for node in piece)


def _is_loud(node: Node) -> bool:
    return isinstance(node.element, Join) or node.element.kind != "pass"


def _key(node: Node) -> _Key:
    element = node.element
    return (element.owner, element.label, str(element.number)) if isinstance(element, Join) else (element.name,)


def _quiet(element: Element) -> Element:
    """A step that does nothing, named after a module of the element's."""
    step = next(iter(steps_of([element])))
    return type(step)("pass", step.name)


def _group(head: str, piece: Sequence[Node]) -> MergedGroup:
    elements = [node.element for node in piece]
    members = frozenset(step.name for step in steps_of(elements) if step.kind != "pass")
    return MergedGroup(head, members, tuple((0, addition) for addition in _sums(elements)))


def _sums(elements: Iterable[Element]) -> Iterator[Sum]:
    for element in elements:
        if isinstance(element, Join):
            for branch in element.branches:
                yield from _sums(branch)
            yield Sum(element.owner, element.label, element.number, 0)
