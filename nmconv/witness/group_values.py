"""The values of merged groups: each group must be one convolution in the recording, which reads one value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch.fx import Node

from nmconv.recording import Fact, Read, Recording, unknown, user_hook
from nmconv.witness.allowed import MergedGroup, by_member

__all__ = ["Content", "GroupValues", "Table", "number_of"]

# From what identifies a value to its number; shared by the recordings that are compared.
Table = dict[Any, int]
# What a tensor holds: the number of the value it was created with, and that of the last write to it since.
Content = tuple[int, "int | None"]


def number_of(table: Table, key: Any) -> int:
    """Return the number of the value that ``key`` identifies, a new one for a new key."""
    return table.setdefault(key, len(table))


class GroupValues:
    """The calls of merged groups in one recording, and the values that enter them or are inside.

    Args:
        recording: The recording.
        groups: The groups.
        sums: The additions that are in groups.
    """

    def __init__(self, recording: Recording, groups: Iterable[MergedGroup], sums: Mapping[Node, MergedGroup]) -> None:
        self._recording = recording
        self._facts = recording.facts
        self._by_module = by_member(groups)
        self._constants = _constant_nodes(recording)
        self._groups: dict[Node, MergedGroup] = {}
        self._calls: dict[str, list[Node]] = {}  # by the group's head
        self._entries: dict[str, dict[Content, Node]] = {}  # what enters each group, with the last call that reads it
        self._inside: dict[int, MergedGroup] = {}  # by the value's number
        for node, fact in self._facts.items():
            group = sums.get(node) or self._group_of(node, fact)
            if group is not None:
                self._groups[node] = group
                self._calls.setdefault(group.head, []).append(node)

    def __bool__(self) -> bool:
        return bool(self._by_module)

    def __contains__(self, node: Node) -> bool:
        return node in self._groups

    def _group_of(self, node: Node, fact: Fact) -> MergedGroup | None:
        """Return the group of a module's call, or of a call in the forward of a member (a norm)."""
        if node in self._constants or fact.passes or node.target is user_hook:
            return None
        return self._by_module.get(fact.label if node.op == "call_module" else fact.frame.path)

    def number(self, node: Node, contents: Mapping[Read, Content], table: Table) -> int:
        """Return the number of the value of a group's call; the last call's value is that of the convolution."""
        group = self._groups[node]
        entries = self._entries.setdefault(group.head, {})
        for (source, _), content in contents.items():
            if source not in self._constants and self._inside.get(content[0]) is not group:
                entries[content] = node
        if node is self._calls[group.head][-1]:
            return number_of(table, ("merged", group.head, *sorted(entries, key=str)))
        number = number_of(table, ("inside", node))
        self._inside[number] = group
        return number

    def inside(self, number: int | None) -> MergedGroup | None:
        """Return the group that a value is inside of, or None."""
        return None if number is None else self._inside.get(number)

    def owns(self, name: str) -> bool:
        """Return whether a tensor belongs to a member of a group or to a part of one: computed weights, statistics."""
        parts = name.split(".")
        return any(".".join(parts[:end]) in self._by_module for end in range(1, len(parts)))

    def malformed(self, *, complete: bool) -> dict[str, str]:
        """Return, by head, why groups are not one convolution: their calls repeat, or something enters in the middle.

        Args:
            complete: Whether all members of a group must be called.
        """
        broken: dict[str, str] = {}
        called = {fact.label for node, fact in self._facts.items() if node.op == "call_module"}
        called |= {frame.path for frame in self._recording.frames}
        readable = self._readable_by_unknown()
        for head, nodes in self._calls.items():
            missing = self._groups[nodes[0]].members - called
            if missing and complete:
                broken[head] = f"{self._facts[nodes[0]].label} is called without {min(missing)}"
                continue
            labels = [self._facts[node].label for node in nodes if node.op == "call_module"]
            repeated = next((label for label in labels if labels.count(label) > 1), None)
            if repeated is not None:
                broken[head] = f"{repeated} is called {labels.count(repeated)} times"
            elif len(self._entries[head]) != 1:
                reader = list(self._entries[head].values())[-1]
                broken[head] = f"{self._facts[reader].label} is given something other than what comes before it returns"
            elif len(nodes) > 1 and nodes[0] in readable:
                broken[head] = "unrecorded code, such as a scripted function, may read a value inside of it"
        return broken

    def _readable_by_unknown(self) -> set[Node]:
        """Return the nodes before the last tensor of unknown origin, whose maker may have read any of them."""
        order = list(self._facts)
        return set(order[: max((index for index, node in enumerate(order) if node.target is unknown), default=0)])


def _constant_nodes(recording: Recording) -> set[Node]:
    """Return parameters, buffers and constants, and what is computed from these alone."""
    constants: set[Node] = set()
    for node, fact in recording.facts.items():
        sources = [source for read in fact.reads for source in read if source is not None]
        if node.op == "get_attr" or (sources and node.target is not unknown and constants.issuperset(sources)):
            constants.add(node)
    return constants
