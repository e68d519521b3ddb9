"""What a result may differ in: what a plan and merges say, as marks on a recording of the original."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from torch.fx import Node

from nmconv.graph import expressions_of
from nmconv.planning import Hoist, Plan, Site, Sum
from nmconv.recording import Fact, Read, Recording

__all__ = ["Changes", "Group", "activations", "by_member", "changes_of", "grouped_sums", "settings_of", "sums_of"]


@dataclass(frozen=True)
class Group:
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
class Changes:
    """All that was to be done.

    Attributes:
        sites: Activations that are dropped, moved, or gone with a branch.
        sums: Additions of which one operand is left.
        hoists: Runs whose padding has moved.
        groups: What was merged.
        rewritten: Qualified names of modules whose methods were written anew.
    """

    sites: tuple[Site, ...] = ()
    sums: tuple[Sum, ...] = ()
    hoists: tuple[Hoist, ...] = ()
    groups: tuple[Group, ...] = ()
    rewritten: frozenset[str] = field(default_factory=frozenset)


def changes_of(plan: Plan | None, groups: Iterable[Group] = ()) -> Changes:
    """What a plan and merges say."""
    groups = tuple(groups)
    rewritten = {addition.owner for group in groups for _, addition in group.sums}
    if plan is None:
        return Changes(groups=groups, rewritten=frozenset(rewritten))
    rewritten |= {site.owner for site in plan.changes if site.how == "rewrite" or site.function}
    rewritten |= {site.place.owner for site in plan.changes if site.place is not None and site.place.how == "rewrite"}
    rewritten |= {branch.sum.owner for branch in plan.branches}
    return Changes(
        sites=tuple(site for site in plan.sites if site.action in ("drop", "move")),
        sums=tuple(branch.sum for branch in plan.branches),
        hoists=tuple(hoist for hoist in plan.hoists if not hoist.why),
        groups=groups,
        rewritten=frozenset(rewritten),
    )


def activations(recording: Recording, sites: Sequence[Site]) -> Iterator[tuple[Node, Site, tuple[Read, ...]]]:
    """The calls in a recording that are those of sites, each with its site and what it is given, the value first."""
    training = recording.call.training
    wanted: dict[tuple[str, str, str | None, int], Site] = {}
    for site in sites:
        if site.modes in ("both", "train" if training else "eval"):
            number = site.train_call if training and site.train_call is not None else site.call
            owner, name = (recording.names.get(path, path) for path in (site.owner, site.name))
            wanted[owner, name, site.function, number] = site
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
        call = (id(fact.frame), name, kind)
        times[call] += 1
        site_found = wanted.get((path, name, kind, times[call]))
        if site_found is not None:
            yield node, site_found, (by_hand[node].base,) if node in by_hand else fact.reads


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


def grouped_sums(recording: Recording, groups: Iterable[Group], gone: Iterable[Node]) -> dict[Node, Group]:
    """The additions in a recording that are in groups, round by round."""
    inner = {id(each): (number, each, group) for group in groups for number, each in group.sums}
    found: dict[Node, Group] = {}
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


def by_member(groups: Iterable[Group]) -> dict[str, Group]:
    """From each module's name to the group that it is in."""
    found: dict[str, Group] = {}
    for group in groups:
        found.update(dict.fromkeys(group.members, group))
    return found
