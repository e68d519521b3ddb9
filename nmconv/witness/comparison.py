"""The witness: the result does what the original does, less what the plan and the merges say."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, replace

from torch.fx import Node

from nmconv.recording import Fact, Recording
from nmconv.witness.allowed import AllowedDifferences, activations
from nmconv.witness.value_numbering import NumberedValues, Table, expected_values, values_of

__all__ = ["Difference", "broken_groups", "compare"]


@dataclass(frozen=True)
class Difference:
    """The first difference between two recordings.

    Attributes:
        text: What differs, in words.
        module: Qualified name of the module whose forward made it.
        first: The step of the original.
        second: The step of the result.
    """

    text: str
    module: str = ""
    first: str = ""
    second: str = ""


def compare(
    original: Recording,
    result: Recording,
    allowed: AllowedDifferences,
    slope: int | None = None,
    gradual: Container[str] = (),
) -> Difference | None:
    """Hold a result's recording against the original's and what was to be done.

    Args:
        original: Before.
        result: After.
        allowed: What was to be done.
        slope: Of a gradual result, 0 or 1: it must do what the original does, or what a hard conversion does.
        gradual: Its modules that are activations which go, by name.

    Returns:
        None where they agree, or the first difference.
    """
    table: Table = {}
    found = values_of(result, allowed, table, _added(original, allowed), original.names, slope, gradual)
    if slope == 0:
        allowed = replace(allowed, changes=())
    wanted = expected_values(original, allowed, table, found.moved)
    broken = {**found.broken, **wanted.broken}
    if broken:
        head, why = next(iter(broken.items()))
        return Difference(f"the convolution merged at {head} is none here: {why}")
    missing = _missing_sites(original, allowed)
    if missing:
        return Difference(f"the model never makes the call {missing} that the plan changes")
    if found.results != wanted.results:
        return _first_difference(original, result, wanted, found)
    return _other_shape(original, result, wanted, found, allowed)


def broken_groups(recording: Recording, allowed: AllowedDifferences) -> Mapping[str, str]:
    """From the heads of groups that are not one convolution in a recording of the original to why."""
    return expected_values(recording, allowed, {}, {}).broken


def _added(original: Recording, allowed: AllowedDifferences) -> dict[str, frozenset[str]]:
    """Where moved activations are called, and of which classes they are."""
    found: dict[str, set[str]] = {}
    for node, change, _ in activations(original, [change for change in allowed.changes if change.place is not None]):
        place, settings = change.place, original.facts[node].settings
        assert place is not None
        name = settings[1] if settings else change.call.kind
        if place.how == "slot":
            found.setdefault(f"{place.owner}.{place.op}", set()).add(name)
        else:
            prefix = f"{place.owner}." if place.owner else ""
            for number in ("", *range(1, 100)):
                found.setdefault(f"{prefix}moved_act{number}", set()).add(name)
    return {path: frozenset(names) for path, names in found.items()}


def _missing_sites(original: Recording, allowed: AllowedDifferences) -> str:
    """A site that a recording of the whole model does not have though its owner ran, or ""."""
    mode = "train" if original.call.training else "eval"
    ran = {frame.path for frame in original.frames}
    met = {change.call.id for _, change, _ in activations(original, allowed.changes)}
    for change in allowed.changes:
        call = change.call
        if call.modes in ("both", mode) and original.names.get(call.owner, call.owner) in ran and call.id not in met:
            return call.id
    return ""


def _first_difference(
    original: Recording, result: Recording, wanted: NumberedValues, found: NumberedValues
) -> Difference:
    first, second = _odd_one(wanted, found), _odd_one(found, wanted)
    facts = [None if first is None else original.facts[first], None if second is None else result.facts[second]]
    texts = [_shown(fact) for fact in facts]
    where = next((fact.frame.path for fact in reversed(facts) if fact is not None), "")
    if first is None and second is None:
        names = [
            key for key in {**wanted.results, **found.results} if wanted.results.get(key) != found.results.get(key)
        ]
        kind, name = names[0]
        return Difference(f"what is {kind}{f' ({name})' if name else ''} differs")
    place = f"in the forward of {where or 'the model'}"
    return Difference(
        f"{place} the result does {texts[1] or 'nothing'} where {texts[0] or 'nothing'} was to be done",
        where,
        texts[0],
        texts[1],
    )


def _odd_one(one: NumberedValues, other: NumberedValues) -> Node | None:
    """The first live node without a counterpart."""
    known = {other.numbers[node] for node in other.live}
    return next((node for node in one.live if one.numbers[node] not in known), None)


def _shown(fact: Fact | None) -> str:
    if fact is None:
        return ""
    if fact.settings:
        return f"{fact.label} = {fact.settings[1]}({fact.settings[2]})"
    given = _plain(fact.form[1]) if len(fact.form) > 1 else ""
    return f"{fact.label}({given})"


def _plain(form: object) -> str:
    """Constants among arguments, as text."""
    if isinstance(form, tuple) and form and form[0] in ("tuple", "list"):
        return ", ".join(_plain(part) for part in form[1:])
    if isinstance(form, tuple) and len(form) == 2:
        return str(form[1])
    return "tensor" if isinstance(form, str) and form.startswith("\0") else str(form)


def _other_shape(
    original: Recording, result: Recording, wanted: NumberedValues, found: NumberedValues, allowed: AllowedDifferences
) -> Difference | None:
    """A value of another shape than it had, outside of runs whose padding moved."""
    if not allowed.hoists:
        return None
    inside = _inside_hoists(original, allowed)
    shapes = {number: result.facts[node].shapes for node, number in found.numbers.items()}
    for node in wanted.live:
        fact = original.facts[node]
        now = shapes.get(wanted.numbers[node], fact.shapes)
        if now != fact.shapes and node not in inside:
            text = (
                f"{fact.label} gives {now} instead of {fact.shapes}, though it is no part of a run whose padding moved"
            )
            return Difference(text, fact.frame.path, _shown(fact), _shown(fact))
    return None


def _inside_hoists(original: Recording, allowed: AllowedDifferences) -> set[Node]:
    """What lies between the first and the last convolution of runs whose padding moved, the first included."""
    by_name: dict[str, list[Node]] = {}
    for node, fact in original.facts.items():
        by_name.setdefault(fact.label, []).append(node)
    found: set[Node] = set()
    for hoist in allowed.hoists:
        firsts = set(by_name.get(hoist[0], ()))
        for last in by_name.get(hoist[-1], ()):
            found |= _between(original, firsts, last)
    return found


def _between(original: Recording, firsts: set[Node], last: Node) -> set[Node]:
    """All that the last one is made of, back to the first ones."""
    found: set[Node] = set()
    todo: list[Node] = [node for node, _ in original.facts[last].reads]
    while todo:
        node = todo.pop()
        if node in found or node.op in ("placeholder", "get_attr"):
            continue
        found.add(node)
        if node not in firsts:
            todo += [part for part, _ in original.facts[node].reads]
    return found
