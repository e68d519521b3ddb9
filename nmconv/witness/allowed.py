"""The allowed differences of a result: a plan's changes and the merges, located in a recording of the original."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch.fx import Node

from nmconv.flow import expressions_of
from nmconv.planning import Change, Changes, ReplacedSum
from nmconv.recording import Fact, Read, Recording

__all__ = [
    "AllowedDifferences",
    "MergedGroup",
    "allowed_differences",
    "by_member",
    "changed_activations",
    "changed_sums",
    "is_moved",
    "settings_of",
    "sums_in_groups",
]

# The labels that a recording gives to in-place and reflected additions.
_RECORDED_LABELS = {"iadd": "add_", "radd": "add"}
_PADDING = re.compile(r", padding(_mode)?=(\([^)]*\)|'?\w+'?)")


@dataclass(frozen=True)
class MergedGroup:
    """Modules and sums that have become one convolution.

    Attributes:
        head: Qualified name of the convolution whose place it takes; identifies the group.
        members: Names of all modules in it, including the head and a norm that stays in place.
        sums: The additions in it, each with the number of the round in which it is removed. ``ReplacedSum.number``
            does not count the additions that earlier rounds have removed.
    """

    head: str
    members: frozenset[str]
    sums: tuple[tuple[int, ReplacedSum], ...] = ()


@dataclass(frozen=True)
class AllowedDifferences:
    """Everything in which a result may differ.

    Attributes:
        changes: Activations that are dropped or moved.
        sums: Additions of which one operand remains.
        hoists: The convolutions of each run whose padding has moved.
        groups: What was merged.
        rewritten: Qualified names of the modules whose methods were rewritten.
    """

    changes: tuple[Change, ...] = ()
    sums: tuple[ReplacedSum, ...] = ()
    hoists: tuple[tuple[str, ...], ...] = ()
    groups: tuple[MergedGroup, ...] = ()
    rewritten: frozenset[str] = field(default_factory=frozenset)


def allowed_differences(changes: Changes | None, groups: Iterable[MergedGroup] = ()) -> AllowedDifferences:
    """Return the differences that a plan's changes and the merges make."""
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


def changed_activations(
    recording: Recording, changes: Sequence[Change]
) -> Iterator[tuple[Node, Change, tuple[Read, ...]]]:
    """Yield the activation calls of a recording that are changed, each with its change and its reads, input first."""
    wanted = _by_call(recording, changes)
    modules = {(owner, name) for owner, name, function, _ in wanted if not function}
    functions = {(owner, function) for owner, _, function, _ in wanted if function}
    expressions = expressions_of(recording) if functions else {}
    counts: Counter[tuple[int, str, str | None]] = Counter()
    for node, fact in recording.facts.items():
        path, expression = fact.frame.path, expressions.get(node)
        name: str = path
        function: str | None = expression.kind if expression is not None else fact.label.rstrip("_")
        if node.op == "call_module" and (path, fact.label) in modules:
            name, function = fact.label, None
        elif node.op != "call_function" or (path, function) not in functions:
            continue
        counts[id(fact.frame), name, function] += 1
        change = wanted.get((path, name, function, counts[id(fact.frame), name, function]))
        if change is not None:
            yield node, change, (expression.base,) if expression is not None else fact.reads


def _by_call(recording: Recording, changes: Iterable[Change]) -> dict[tuple[str, str, str | None, int], Change]:
    """Return the changes in the recording's mode, by the call's owner, name, function and number."""
    training = recording.call.training
    wanted: dict[tuple[str, str, str | None, int], Change] = {}
    for change in changes:
        call = change.call
        if call.modes in ("both", "train" if training else "eval"):
            number = call.train_call if training and call.train_call is not None else call.call
            owner, name = (recording.names.get(path, path) for path in (call.owner, call.name))
            wanted[owner, name, call.function, number] = change
    return wanted


def changed_sums(
    recording: Recording, sums: Iterable[ReplacedSum], gone: Container[Node] = ()
) -> dict[Node, ReplacedSum]:
    """Return the additions of a recording that are among ``sums``; those that are ``gone`` are not counted."""
    wanted = {(each.owner, _RECORDED_LABELS.get(each.label, each.label), each.number): each for each in sums}
    labels = {(owner, label) for owner, label, _ in wanted}
    changed: dict[Node, ReplacedSum] = {}
    counts: Counter[tuple[int, str]] = Counter()
    for node, fact in recording.facts.items() if wanted else ():
        path, label = fact.frame.path, fact.label
        if node.op != "call_function" or (path, label) not in labels or node in gone:
            continue
        counts[id(fact.frame), label] += 1
        match = wanted.get((path, label, counts[id(fact.frame), label]))
        if match is not None and len(fact.reads) == 2:
            changed[node] = match
    return changed


def sums_in_groups(
    recording: Recording, groups: Iterable[MergedGroup], gone: Iterable[Node]
) -> dict[Node, MergedGroup]:
    """Return the additions of a recording that are in groups, located round by round."""
    by_sum = {id(each): (round_, each, group) for group in groups for round_, each in group.sums}
    located: dict[Node, MergedGroup] = {}
    removed = set(gone)
    for current in sorted({round_ for round_, _, _ in by_sum.values()}):
        sums = changed_sums(recording, [each for round_, each, _ in by_sum.values() if round_ == current], removed)
        located |= {node: by_sum[id(each)][2] for node, each in sums.items()}
        removed |= sums.keys()
    return located


def is_moved(classes: Mapping[str, frozenset[str]], node: Node, fact: Fact) -> bool:
    """Return whether a call in a result is one of a moved activation.

    Args:
        classes: From the names of the modules that may be moved activations to their possible classes.
        node: The call.
        fact: The facts about it.
    """
    expected = classes.get(fact.label) if node.op == "call_module" else None
    return expected is not None and fact.settings[1] in expected


def settings_of(fact: Fact, hoisted: frozenset[str]) -> tuple[str, ...]:
    """Return a module's class and settings; without the padding, for a convolution whose padding moves."""
    if fact.label not in hoisted:
        return fact.settings
    *cls, shown = fact.settings
    return (*cls, _PADDING.sub("", shown))


def by_member(groups: Iterable[MergedGroup]) -> dict[str, MergedGroup]:
    """Return the group of each module in one, by the module's name."""
    members: dict[str, MergedGroup] = {}
    for group in groups:
        members.update(dict.fromkeys(group.members, group))
    return members
