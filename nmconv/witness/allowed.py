"""What a result may differ in: what a plan and merges say, as marks on a recording of the original."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from torch.fx import Node

from nmconv.flow import expressions_of
from nmconv.planning import Change, Changes, Sum
from nmconv.recording import Fact, Read, Recording

__all__ = [
    "AllowedDifferences",
    "MergedGroup",
    "activations",
    "allowed_by",
    "by_member",
    "grouped_sums",
    "settings_of",
    "sums_of",
]


@dataclass(frozen=True)
class MergedGroup:
    """Modules and sums that have become one convolution.

    Attributes:
        head: Qualified name of the convolution whose place it takes; what names the group.
        members: Of all modules in it, the head and a norm that stays behind it included.
        sums: The additions in it, each with the number of the round in which it goes: those that went in earlier rounds
            are not counted in its own number.
    """

    head: str
    members: frozenset[str]
    sums: tuple[tuple[int, Sum], ...] = ()


@dataclass(frozen=True)
class AllowedDifferences:
    """All in which a result may differ.

    Attributes:
        changes: Activations that are dropped or moved.
        sums: Additions of which one operand is left.
        hoists: Convolutions of each run whose padding has moved.
        groups: What was merged.
        rewritten: Qualified names of modules whose methods were written anew.
    """

    changes: tuple[Change, ...] = ()
    sums: tuple[Sum, ...] = ()
    hoists: tuple[tuple[str, ...], ...] = ()
    groups: tuple[MergedGroup, ...] = ()
    rewritten: frozenset[str] = field(default_factory=frozenset)


def allowed_by(changes: Changes | None, groups: Iterable[MergedGroup] = ()) -> AllowedDifferences:
    """What a plan and merges say."""
    groups = tuple(groups)
    rewritten = {addition.owner for group in groups for _, addition in group.sums}
    if changes is None:
        return AllowedDifferences(groups=groups, rewritten=frozenset(rewritten))
    for change in changes.made:
        if change.call.how == "rewrite" or change.call.function:
            rewritten.add(change.call.owner)
        if change.place is not None and change.place.how == "rewrite":
            rewritten.add(change.place.owner)
    rewritten |= {addition.owner for addition in changes.sums}
    return AllowedDifferences(changes.made, changes.sums, changes.hoists, groups, frozenset(rewritten))


def activations(recording: Recording, changes: Sequence[Change]) -> Iterator[tuple[Node, Change, tuple[Read, ...]]]:
    """The calls in a recording that are those of changes, each with its change and what it is given, value first."""
    training = recording.call.training
    wanted: dict[tuple[str, str, str | None, int], Change] = {}
    for change in changes:
        call = change.call
        if call.modes in ("both", "train" if training else "eval"):
            number = call.train_call if training and call.train_call is not None else call.call
            owner, name = (recording.names.get(path, path) for path in (call.owner, call.name))
            wanted[owner, name, call.function, number] = change
    asked = {(owner, function) for owner, _, function, _ in wanted if function}
    names = {(owner, name) for owner, name, function, _ in wanted if not function}
    times: Counter[tuple[int, str, str | None]] = Counter()
    by_hand = expressions_of(recording) if asked else {}
    for node, fact in recording.facts.items():
        path = fact.frame.path
        function = by_hand[node].kind if node in by_hand else fact.label.rstrip("_")
        if node.op == "call_module":
            key, kind = (path, fact.label), None
            if key not in names:
                continue
            name = fact.label
        elif node.op == "call_function" and (path, function) in asked:
            kind = function
            name = path
        else:
            continue
        made = (id(fact.frame), name, kind)
        times[made] += 1
        found = wanted.get((path, name, kind, times[made]))
        if found is not None:
            yield node, found, (by_hand[node].base,) if node in by_hand else fact.reads


# What operators are called in a forward, and in a recording of it.
_RECORDED = {"iadd": "add_", "radd": "add"}


def sums_of(recording: Recording, sums: Iterable[Sum], gone: Container[Node] = ()) -> dict[Node, Sum]:
    """The additions in a recording that are these; those that are ``gone`` are not counted."""
    wanted = {(each.owner, _RECORDED.get(each.label, each.label), each.number): each for each in sums}
    found: dict[Node, Sum] = {}
    times: Counter[tuple[int, str]] = Counter()
    owners = {(owner, label) for owner, label, _ in wanted}
    for node, fact in recording.facts.items() if wanted else ():
        if node.op != "call_function" or (fact.frame.path, fact.label) not in owners or node in gone:
            continue
        times[id(fact.frame), fact.label] += 1
        each = wanted.get((fact.frame.path, fact.label, times[id(fact.frame), fact.label]))
        if each is not None and len(fact.reads) == 2:
            found[node] = each
    return found


def grouped_sums(recording: Recording, groups: Iterable[MergedGroup], gone: Iterable[Node]) -> dict[Node, MergedGroup]:
    """The additions in a recording that are in groups, round by round."""
    inner = {id(each): (number, each, group) for group in groups for number, each in group.sums}
    found: dict[Node, MergedGroup] = {}
    before = set(gone)
    for number in sorted({number for number, _, _ in inner.values()}):
        sums = [each for at, each, _ in inner.values() if at == number]
        met = sums_of(recording, sums, before)
        found |= {node: inner[id(each)][2] for node, each in met.items()}
        before |= met.keys()
    return found


_PADDING = re.compile(r", padding(_mode)?=(\([^)]*\)|'?\w+'?)")


def settings_of(fact: Fact, hoisted: frozenset[str]) -> tuple[str, ...]:
    """A module's class and settings; of a convolution whose padding moves, without that."""
    if fact.label not in hoisted:
        return fact.settings
    *cls, shown = fact.settings
    return (*cls, _PADDING.sub("", shown))


def by_member(groups: Iterable[MergedGroup]) -> dict[str, MergedGroup]:
    """From each module's name to the group that it is in."""
    found: dict[str, MergedGroup] = {}
    for group in groups:
        found.update(dict.fromkeys(group.members, group))
    return found
