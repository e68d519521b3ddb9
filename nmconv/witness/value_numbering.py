"""Recordings as numbered values: two values have the same number if the same was done to make them."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from nmconv.flow import held, mixed, mixed_into
from nmconv.planning import Sum
from nmconv.recording import TENSOR, Fact, Read, Recording, hook_sees, unknown
from nmconv.witness.allowed import (
    AllowedDifferences,
    MergedGroup,
    activations,
    by_member,
    grouped_sums,
    settings_of,
    sums_of,
)

__all__ = ["Content", "NumberedValues", "Table", "expected_values", "values_of"]

Table = dict[Any, int]  # from what makes a value to its number; shared by the recordings that are compared
Content = tuple[int, "int | None"]  # what a tensor holds: the value it was made as, and what wrote to it since

_COPIES = ("clone", "contiguous")
_ADDS_NOTHING = tuple(("tuple", ("tuple", *pair), ("dict",)) for pair in ((TENSOR, 0), (0, TENSOR)))
_MIXES = (mixed, mixed_into)
_CHANCE = ("drop", "rand", "bernoulli", "normal", "uniform", "multinomial", "exponential")


@dataclass(eq=False)
class NumberedValues:
    """What a recording comes to.

    Attributes:
        numbers: Of each node that stays.
        live: The nodes that anything returned, stored, written or shown to a hook depends on, in order.
        results: What is compared in the end, by kind and name.
        broken: From the head of a group that is not one convolution in this recording to why.
        moved: From contents that a moved activation is given to the number of what it gives.
    """

    numbers: dict[Node, int]
    live: list[Node]
    results: dict[tuple[str, str], Any]
    broken: dict[str, str] = field(default_factory=dict)
    moved: dict[Content, int] = field(default_factory=dict)


def values_of(
    recording: Recording,
    allowed: AllowedDifferences,
    table: Table,
    added: Mapping[str, frozenset[str]],
    names: Mapping[str, str],
    slope: int | None = None,
    gradual: Container[str] = (),
) -> NumberedValues:
    """The values of a result.

    Args:
        recording: Of the result.
        allowed: What was done.
        table: Shared with what it is compared with.
        added: From the names of modules that call moved activations to the classes of these.
        names: Of the original's recording: a module that was registered several times may have lost its first name.
        slope: At which a gradual result is looked at: 0 or 1.
        gradual: The modules that are gradual activations, by their names in the result.
    """
    chosen = {} if slope is None else _chosen(recording, added, slope, gradual)
    return _Numbering(recording, allowed, table, chosen, {}, {}, added, {}, names=names, slope=slope).values()


def _chosen(
    recording: Recording, added: Mapping[str, frozenset[str]], slope: int, gradual: Container[str]
) -> dict[Node, tuple[Read, ...]]:
    """The calls of a gradual result that give what they are given at a slope, each with that."""
    found: dict[Node, tuple[Read, ...]] = {}
    begun: dict[Read, Node] = {}  # from a slope to what holds the input of the activation that is mixed by it
    for node, fact in recording.facts.items():
        if node.op == "call_module":
            if _is_one_of(added, node, fact) if slope == 0 else fact.label in gradual:
                found[node] = fact.reads[:1]
        elif node.target is held:
            found[node] = fact.reads[:1]
            begun[fact.reads[1]] = node
        elif node.target in _MIXES:
            found[node] = fact.reads[1 - slope : 2 - slope]
            if slope == 1:
                value, writer = fact.reads[1]
                found[writer or value] = ((begun[fact.reads[2]], None),)
    return found


def _is_one_of(added: Mapping[str, frozenset[str]], node: Node, fact: Fact) -> bool:
    """Whether a call is one of an activation that was put there."""
    classes = added.get(fact.label) if node.op == "call_module" else None
    return classes is not None and fact.settings[1] in classes


def expected_values(
    recording: Recording, allowed: AllowedDifferences, table: Table, moved: Mapping[Content, int]
) -> NumberedValues:
    """The values of the original with the changes made.

    Args:
        recording: Of the original.
        allowed: What was to be done.
        table: Shared with the result's.
        moved: From the result's values: what activations were put behind.
    """
    dropped = {node: given for node, _, given in activations(recording, allowed.changes)}
    sums = sums_of(recording, allowed.sums)
    grouped = grouped_sums(recording, allowed.groups, sums)
    return _Numbering(recording, allowed, table, dropped, sums, grouped, {}, moved).values()


class _Numbering:
    """Numbers the values of one recording, in the order of execution."""

    def __init__(
        self,
        recording: Recording,
        allowed: AllowedDifferences,
        table: Table,
        dropped: Mapping[Node, tuple[Read, ...]],
        sums: Mapping[Node, Sum],
        grouped: Mapping[Node, MergedGroup],
        added: Mapping[str, frozenset[str]],
        moved: Mapping[Content, int],
        *,
        names: Mapping[str, str] | None = None,
        slope: int | None = None,
    ) -> None:
        self._expected = names is None
        self._slope = slope
        self._names = names or {}
        self._recording = recording
        self._facts = recording.facts
        self._allowed = allowed
        self._table = table
        self._dropped = dropped
        self._sums = sums
        self._added = added
        self._moved = moved
        self._hoisted = frozenset(name for hoist in allowed.hoists for name in hoist)
        self._fixed = _fixed_nodes(recording)
        self._groups = by_member(allowed.groups)
        self._group: dict[Node, MergedGroup] = {}
        self._members: dict[str, list[Node]] = {}
        self._entries: dict[str, dict[Content, Node]] = {}
        self._inside: dict[int, MergedGroup] = {}  # numbers of values inside of groups
        self._contents: dict[Node, Content] = {}
        self._through: set[Node] = set()  # what gives what it was given
        self._made = NumberedValues({}, [], {})
        for node, fact in self._facts.items():
            group = grouped.get(node) or self._group_of(node, fact)
            if group is not None:
                self._group[node] = group
                self._members.setdefault(group.head, []).append(node)

    def values(self) -> NumberedValues:
        """All of them."""
        for node, fact in self._facts.items():
            self._number(node, fact)
        self._note_results()
        self._find_live()
        self._check_groups()
        return self._made

    def _group_of(self, node: Node, fact: Fact) -> MergedGroup | None:
        """The group that a call of a module is in, or a call that is made in the forward of one (a norm's)."""
        if node in self._fixed or fact.passes or node.target is hook_sees:
            return None
        return self._groups.get(fact.label if node.op == "call_module" else fact.frame.path)

    # -- values -------------------------------------------------------------------------------------------------------

    def _number(self, node: Node, fact: Fact) -> None:
        if node.target in _MIXES and self._slope is not None and not self._is_selected(node, fact):
            number = self._content(fact.reads[1])[0] if self._slope == 0 else self._new_number(node, fact)
            self._made.numbers[node] = number
            self._contents[node] = (number, None)
        elif node in self._dropped or self._hands_on(node, fact):
            self._through.add(node)
            self._contents[node] = self._content(self._dropped.get(node, fact.reads)[0])
        elif node in self._sums:
            self._contents[node] = self._content(fact.reads[self._sums[node].keep])
        else:
            number = self._new_number(node, fact)
            self._made.numbers[node] = number
            self._contents[node] = (number, None)

    def _new_number(self, node: Node, fact: Fact) -> int:
        group = self._group.get(node)
        if group is not None:
            return self._group_number(node, fact, group)
        contents = tuple(map(self._content, fact.reads))
        if self._is_added(node, fact):
            number = self._numbered(("moved", fact.settings[:2], contents[0]))
            self._made.moved[contents[0]] = number
            return number
        path = fact.frame.path
        method = "" if path in self._allowed.rewritten else fact.method
        given: Any = frozenset(contents) if node.target is unknown else contents
        settings = settings_of(fact, self._hoisted)
        label, form = fact.label, fact.form
        if node.op == "call_module":
            label = self._names.get(label, label)
        elif node.op == "get_attr" and self._names:
            owner, _, name = label.rpartition(".")
            label = f"{self._names.get(owner, owner)}.{name}" if owner else name
            form = (form[0], label, *form[2:]) if form[0] == "attribute" else form
        key: tuple[Any, ...] = (node.op, label, path, method, settings, form, given, fact.context)
        name = f"{fact.label} {settings}".lower()
        if any(part in name for part in _CHANCE):
            key = (*key, fact.number)  # two draws are two values
        return self._numbered(key)

    def _is_selected(self, node: Node, fact: Fact) -> bool:
        """Whether a mix gives one of the values that it was given, as it should, and writes to nothing."""
        if self._slope == 0:
            return node.target is not mixed_into
        return self._content(fact.reads[0]) == self._content(fact.reads[1])

    def _group_number(self, node: Node, fact: Fact, group: MergedGroup) -> int:
        """That of the last node of a group is the group's."""
        entries = self._entries.setdefault(group.head, {})
        for read in fact.reads:
            content = self._content(read)
            if read[0] not in self._fixed and self._inside.get(content[0]) is not group:
                entries[content] = node
        if node is self._members[group.head][-1]:
            return self._numbered(("merged", group.head, *sorted(entries, key=str)))
        number = self._numbered(("inside", group.head, id(self), len(self._made.numbers)))
        self._inside[number] = group
        return number

    def _numbered(self, key: Any) -> int:
        return self._table.setdefault(key, len(self._table))

    def _content(self, read: Read) -> Content:
        """What a tensor holds when it is read."""
        node, writer = read
        number, written = self._contents[node]
        last = self._last_write(writer)
        written = written if last is None else last
        content = (number, None if written == number else written)
        return (self._moved[content], None) if content in self._moved else content

    def _last_write(self, node: Node | None) -> int | None:
        """The number of the last write that is still made."""
        while node is not None and (node in self._through or node in self._sums):
            before = self._facts[node].before
            node = before[0] if before else None
        return None if node is None else self._made.numbers.get(node)

    def _is_added(self, node: Node, fact: Fact) -> bool:
        return _is_one_of(self._added, node, fact)

    def _hands_on(self, node: Node, fact: Fact) -> bool:
        """Whether a call gives what it was given, or a copy of it, or adds nothing to it."""
        if len(fact.reads) < 1 or node in self._group or node.target is hook_sees or self._is_added(node, fact):
            return False
        if fact.passes or (self._groups and _drops_out(fact)):
            return True
        if node.op != "call_function" or len(fact.reads) != 1:
            return False
        return fact.label in _COPIES or (fact.label in ("add", "add_") and fact.form in _ADDS_NOTHING)

    # -- what comes of them -------------------------------------------------------------------------------------------

    def _note_results(self) -> None:
        recording, results = self._recording, self._made.results
        form, reads = recording.output
        results["returned", ""] = (form, tuple(map(self._content, reads)))
        unused = self._cut_off()
        for name, read in recording.written.items():
            writer = read[1] or read[0]
            if not self._is_members(name) and writer not in unused and self._writes(writer):
                results["written", name] = self._content(read)
        for name, read in recording.stored.items():
            if not self._is_members(name):
                results["stored", name] = self._content(read)
        for at, node in enumerate(recording.seen):
            results["seen", f"{self._facts[node].label} ({at})"] = self._made.numbers[node]

    def _is_members(self, name: str) -> bool:
        """Whether a tensor is held by a module of a group, or by a part of one: a computed weight, statistics."""
        parts = name.split(".")
        return any(".".join(parts[:end]) in self._groups for end in range(1, len(parts)))

    def _writes(self, node: Node | None) -> bool:
        return self._last_write(node) is not None

    def _cut_off(self) -> set[Node]:
        """What only removed branches were made of."""
        if not self._sums:
            return set()
        used = self._behind(self._recording.output[1])
        gone = self._behind([self._facts[node].reads[1 - each.keep] for node, each in self._sums.items()]) - used
        frames = {id(self._facts[node].frame) for node in gone} - {id(self._facts[node].frame) for node in used}
        return gone | {node for node, fact in self._facts.items() if id(fact.frame) in frames}  # counters, too

    def _behind(self, reads: Iterable[Read]) -> set[Node]:
        """All nodes that these depend on, the changes made."""
        found: set[Node] = set()
        todo = [node for read in reads for node in read if node is not None]
        while todo:
            node = todo.pop()
            if node in found:
                continue
            found.add(node)
            fact = self._facts[node]
            if node in self._sums:
                left: tuple[Read, ...] = (fact.reads[self._sums[node].keep],)
            else:
                left = self._dropped.get(node, fact.reads)
            todo += [part for read in left for part in read if part is not None]
            todo += [part for part in fact.before if part is not None]
        return found

    def _find_live(self) -> None:
        recording = self._recording
        kept = [read for name, read in recording.written.items() if ("written", name) in self._made.results]
        seen: list[Read] = [(node, None) for node in recording.seen]
        live = self._behind([*recording.output[1], *kept, *recording.stored.values(), *seen])
        numbers = self._made.numbers
        self._made.live = [
            node for node in self._facts if node in live and node in numbers and numbers[node] not in self._inside
        ]

    def _check_groups(self) -> None:
        """Note groups that are called several times, given values in the middle, or read there."""
        broken = self._made.broken
        called = {fact.label for node, fact in self._facts.items() if node.op == "call_module"}
        called |= {frame.path for frame in self._recording.frames}
        reached = set(self._made_before_unknown())
        for head, nodes in self._members.items():
            missing = self._group[nodes[0]].members - called
            if missing and self._expected:
                broken[head] = f"{self._facts[nodes[0]].label} is called without {min(missing)}"
                continue
            labels = [self._facts[node].label for node in nodes if node.op == "call_module"]
            twice = next((label for label in labels if labels.count(label) > 1), None)
            if twice is not None:
                broken[head] = f"{twice} is called {labels.count(twice)} times"
            elif len(self._entries[head]) != 1:
                at = list(self._entries[head].values())[-1]
                broken[head] = f"{self._facts[at].label} is given something else than what comes before it gives"
            elif len(nodes) > 1 and nodes[0] in reached:
                broken[head] = "something out of sight, such as a scripted function, may read a value inside of it"
        for node in self._made.live:
            if node not in self._group:
                self._check_reads(self._facts[node].reads, self._where(node))
        for (kind, name), _ in self._made.results.items():
            reads = self._recording.output[1] if kind == "returned" else ()
            reads = (self._recording.stored[name],) if kind == "stored" else reads
            self._check_reads(reads, f"what is {kind}")

    def _made_before_unknown(self) -> list[Node]:
        """Whatever a maker of an unknown tensor may have read: when that was made is not known."""
        order = list(self._facts)
        return order[: max((at for at, node in enumerate(order) if node.target is unknown), default=0)]

    def _where(self, node: Node) -> str:
        fact = self._facts[node]
        return f"{fact.label} in {fact.frame.path or 'the model'}"

    def _check_reads(self, reads: Iterable[Read], where: str) -> None:
        for read in reads:
            for number in self._content(read):
                group = None if number is None else self._inside.get(number)
                if group is not None:
                    self._made.broken.setdefault(group.head, f"{where} depends on a value inside of it")


def _drops_out(fact: Fact) -> bool:
    """Whether it is a module that drops values in train mode: what is merged drops none, as its warning says."""
    return bool(fact.settings) and ("Drop" in fact.settings[1] or fact.settings[1] == "StochasticDepth")


def _fixed_nodes(recording: Recording) -> set[Node]:
    """Parameters, buffers and constants, and what is made of them alone."""
    found: set[Node] = set()
    for node, fact in recording.facts.items():
        parts = [part for read in fact.reads for part in read if part is not None]
        if node.op == "get_attr" or (parts and node.target is not unknown and found.issuperset(parts)):
            found.add(node)
    return found
