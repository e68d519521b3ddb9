"""Value numbering: two values of two recordings have the same number if they are computed in the same way."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from nmconv.flow import mixed_into
from nmconv.planning import ReplacedSum
from nmconv.recording import TENSOR, Fact, Read, Recording, unknown, user_hook
from nmconv.witness.allowed import (
    AllowedDifferences,
    MergedGroup,
    changed_activations,
    changed_sums,
    is_moved,
    settings_of,
    sums_in_groups,
)
from nmconv.witness.gradual_calls import MIXES, selected_inputs
from nmconv.witness.group_values import Content, GroupValues, Table, number_of

__all__ = ["NumberedValues", "expected_values", "values_of"]

_COPIES = ("clone", "contiguous")
_ADD_ZERO = tuple(("tuple", ("tuple", *pair), ("dict",)) for pair in ((TENSOR, 0), (0, TENSOR)))
_RANDOM = ("drop", "rand", "bernoulli", "normal", "uniform", "multinomial", "exponential")


@dataclass(eq=False)
class NumberedValues:
    """The values of a recording.

    Attributes:
        numbers: The number of each node's value; nodes that are removed have none.
        live: The nodes, in order, that anything returned, stored, written or shown to a hook depends on.
        results: What is compared in the end, by kind and name.
        broken: Why groups are not one convolution in this recording, by their heads.
        moved: From the input of each moved activation to the number of its result.
    """

    numbers: dict[Node, int] = field(default_factory=dict)
    live: list[Node] = field(default_factory=list)
    results: dict[tuple[str, str], Any] = field(default_factory=dict)
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
    """Return the values of a result.

    Args:
        recording: A recording of the result.
        allowed: The changes that were made to the original.
        table: The table that is shared with the other recording.
        added: From the names of modules that are moved activations to their possible classes.
        names: The aliases in the original's recording: a module that is registered several times may have lost its
            first name.
        slope: The slope at which a gradual result is read: 0 or 1.
        gradual: Names of the modules in the result that are gradual activations.
    """
    selected = {} if slope is None else selected_inputs(recording, added, slope, gradual)
    return _Numbering(recording, allowed, table, selected, added=added, names=names, slope=slope).run()


def expected_values(
    recording: Recording, allowed: AllowedDifferences, table: Table, moved: Mapping[Content, int]
) -> NumberedValues:
    """Return the values of the original with the changes applied.

    Args:
        recording: A recording of the original.
        allowed: The changes that were to be made.
        table: The table that is shared with the result's recording.
        moved: The result's moved activations, see :class:`NumberedValues`.
    """
    dropped = {node: reads for node, _, reads in changed_activations(recording, allowed.changes)}
    sums = changed_sums(recording, allowed.sums)
    grouped = sums_in_groups(recording, allowed.groups, sums)
    return _Numbering(recording, allowed, table, dropped, sums, grouped, moved=moved, is_original=True).run()


class _Numbering:
    """Numbers the values of one recording, in the order of execution.

    Args:
        recording: The recording.
        allowed: The changes that were made, or were to be made.
        table: The shared table.
        dropped: The calls that are removed, each with what replaces its result.
        sums: The additions of which one operand remains.
        grouped: The additions that are in groups.
        added: From the names of modules that are moved activations to their possible classes.
        moved: From contents that a moved activation reads to the number of its result.
        names: The modules' names in the other recording.
        slope: The slope at which a gradual result is read.
        is_original: Whether the recording is of the original.
    """

    def __init__(
        self,
        recording: Recording,
        allowed: AllowedDifferences,
        table: Table,
        dropped: Mapping[Node, tuple[Read, ...]],
        sums: Mapping[Node, ReplacedSum] | None = None,
        grouped: Mapping[Node, MergedGroup] | None = None,
        *,
        added: Mapping[str, frozenset[str]] | None = None,
        moved: Mapping[Content, int] | None = None,
        names: Mapping[str, str] | None = None,
        slope: int | None = None,
        is_original: bool = False,
    ) -> None:
        self._recording = recording
        self._facts = recording.facts
        self._rewritten = allowed.rewritten
        self._hoisted = frozenset(name for hoist in allowed.hoists for name in hoist)
        self._table = table
        self._dropped = dropped
        self._sums = sums or {}
        self._added = added or {}
        self._moved = moved or {}
        self._names = names or {}
        self._slope = slope
        self._is_original = is_original
        self._groups = GroupValues(recording, allowed.groups, grouped or {})
        self._contents: dict[Node, Content] = {}
        self._passing: set[Node] = set()  # calls that return their input
        self._values = NumberedValues()

    def run(self) -> NumberedValues:
        for node, fact in self._facts.items():
            self._contents[node] = self._content_of(node, fact)
        self._collect_results()
        self._find_live()
        self._find_broken_groups()
        return self._values

    # -- values -------------------------------------------------------------------------------------------------------

    def _content_of(self, node: Node, fact: Fact) -> Content:
        """Return what a node's result holds."""
        if node.target in MIXES and self._slope is not None and not self._selects(node, fact):
            number = self._content(fact.reads[1])[0] if self._slope == 0 else self._number(node, fact)
        elif node in self._dropped or self._passes_on(node, fact):
            self._passing.add(node)
            return self._content(self._dropped.get(node, fact.reads)[0])
        elif node in self._sums:
            return self._content(fact.reads[self._sums[node].keep])
        else:
            number = self._number(node, fact)
        self._values.numbers[node] = number
        return (number, None)

    def _number(self, node: Node, fact: Fact) -> int:
        if node in self._groups:
            return self._groups.number(node, {read: self._content(read) for read in fact.reads}, self._table)
        contents = tuple(map(self._content, fact.reads))
        if is_moved(self._added, node, fact):
            number = number_of(self._table, ("moved", fact.settings[:2], contents[0]))
            self._values.moved[contents[0]] = number
            return number
        return number_of(self._table, self._key(node, fact, contents))

    def _key(self, node: Node, fact: Fact, contents: tuple[Content, ...]) -> tuple[Any, ...]:
        """Return what identifies a call's value: what is called, where, with which settings and on which contents."""
        path = fact.frame.path
        method = "" if path in self._rewritten else fact.method
        operands: Any = frozenset(contents) if node.target is unknown else contents
        settings = settings_of(fact, self._hoisted)
        label, form = fact.label, fact.form
        if node.op == "call_module":
            label = self._names.get(label, label)
        elif node.op == "get_attr" and self._names:
            owner, _, name = label.rpartition(".")
            label = f"{self._names.get(owner, owner)}.{name}" if owner else name
            form = (form[0], label, *form[2:]) if form[0] == "attribute" else form
        key: tuple[Any, ...] = (node.op, label, path, method, settings, form, operands, fact.context)
        shown = f"{fact.label} {settings}".lower()
        if any(part in shown for part in _RANDOM):
            key = (*key, fact.number)  # two draws are two values
        return key

    def _content(self, read: Read) -> Content:
        """Return what a tensor holds when it is read."""
        node, writer = read
        number, written = self._contents[node]
        last = self._last_write(writer)
        if last is not None and not self._has_read(node, last):
            written = self._values.numbers[last]
        content = (number, None if written == number else written)
        return (self._moved[content], None) if content in self._moved else content

    def _last_write(self, node: Node | None) -> Node | None:
        """Return the last write that is not removed, among a node and the writes before it."""
        while node is not None and (node in self._passing or node in self._sums):
            before = self._facts[node].previous_writers
            node = before[0] if before else None
        return node

    def _has_read(self, node: Node, write: Node) -> bool:
        """Return whether a node has read the result of a write, as a view that is made after it does."""
        while self._facts[node].form[:1] == ("item",):  # a part of what a call returned
            node = self._facts[node].reads[0][0]
        reads = self._facts[node].reads
        return any(source is write or self._last_write(writer or source) is write for source, writer in reads)

    def _selects(self, node: Node, fact: Fact) -> bool:
        """Return whether a mix returns the right one of its inputs, and writes to nothing."""
        if self._slope == 0:
            return node.target is not mixed_into
        return self._content(fact.reads[0]) == self._content(fact.reads[1])

    def _passes_on(self, node: Node, fact: Fact) -> bool:
        """Return whether a call returns its input, a copy of it, or its sum with zero."""
        if not fact.reads or node in self._groups or node.target is user_hook:
            return False
        if is_moved(self._added, node, fact):
            return False
        if fact.passes or (self._groups and _is_dropout(fact)):
            return True
        if node.op != "call_function" or len(fact.reads) != 1:
            return False
        return fact.label in _COPIES or (fact.label in ("add", "add_") and fact.form in _ADD_ZERO)

    # -- results ------------------------------------------------------------------------------------------------------

    def _collect_results(self) -> None:
        recording, results = self._recording, self._values.results
        form, reads = recording.output
        results["returned", ""] = (form, tuple(map(self._content, reads)))
        unused = self._only_in_removed_branches()
        for name, read in recording.written.items():
            writer = read[1] or read[0]
            if not self._groups.owns(name) and writer not in unused and self._last_write(writer) is not None:
                results["written", name] = self._content(read)
        for name, read in recording.stored.items():
            if not self._groups.owns(name):
                results["stored", name] = self._content(read)
        for index, node in enumerate(recording.hook_nodes):
            results["passed to hooks", f"{self._facts[node].label} ({index})"] = self._values.numbers[node]

    def _only_in_removed_branches(self) -> set[Node]:
        """Return the nodes that only the removed operands of sums need."""
        if not self._sums:
            return set()
        used = self._dependencies(self._recording.output[1])
        operands = [self._facts[node].reads[1 - each.keep] for node, each in self._sums.items()]
        removed = self._dependencies(operands) - used
        frames = {id(self._facts[node].frame) for node in removed} - {id(self._facts[node].frame) for node in used}
        return removed | {node for node, fact in self._facts.items() if id(fact.frame) in frames}  # norms' counters

    def _dependencies(self, reads: Iterable[Read]) -> set[Node]:
        """Return all nodes that some reads depend on, with the changes applied."""
        dependencies: set[Node] = set()
        todo = [node for read in reads for node in read if node is not None]
        while todo:
            node = todo.pop()
            if node in dependencies:
                continue
            dependencies.add(node)
            fact = self._facts[node]
            if node in self._sums:
                remaining: tuple[Read, ...] = (fact.reads[self._sums[node].keep],)
            else:
                remaining = self._dropped.get(node, fact.reads)
            todo += [source for read in remaining for source in read if source is not None]
            todo += [source for source in fact.previous_writers if source is not None]
        return dependencies

    def _find_live(self) -> None:
        recording, numbers = self._recording, self._values.numbers
        written = [read for name, read in recording.written.items() if ("written", name) in self._values.results]
        hooks: list[Read] = [(node, None) for node in recording.hook_nodes]
        live = self._dependencies([*recording.output[1], *written, *recording.stored.values(), *hooks])
        self._values.live = [
            node
            for node in self._facts
            if node in live and node in numbers and self._groups.inside(numbers[node]) is None
        ]

    def _find_broken_groups(self) -> None:
        """Note groups that are malformed, or of which a value inside is read elsewhere."""
        broken = self._values.broken
        broken.update(self._groups.malformed(complete=self._is_original))
        readers: list[tuple[str, Iterable[Read]]] = [
            (f"{self._facts[node].label} in {self._facts[node].frame.path or 'the model'}", self._facts[node].reads)
            for node in self._values.live
            if node not in self._groups
        ]
        for kind, name in self._values.results:
            if kind == "returned":
                readers.append(("what is returned", self._recording.output[1]))
            elif kind == "stored":
                readers.append(("what is stored", [self._recording.stored[name]]))
        for reader, reads in readers:
            for number in (number for read in reads for number in self._content(read)):
                group = self._groups.inside(number)
                if group is not None:
                    broken.setdefault(group.head, f"{reader} depends on a value inside of it")


def _is_dropout(fact: Fact) -> bool:
    """Return whether a module drops values in train mode; merged convolutions do not, as FoldedNormWarning says."""
    return bool(fact.settings) and ("Drop" in fact.settings[1] or fact.settings[1] == "StochasticDepth")
