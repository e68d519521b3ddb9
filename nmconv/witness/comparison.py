"""Compare a recording of a result with the original's, to which the plan's changes and the merges are applied."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, replace

from torch.fx import Node

from nmconv.recording import Fact, Recording
from nmconv.witness.allowed import AllowedDifferences, changed_activations
from nmconv.witness.group_values import Table
from nmconv.witness.value_numbering import NumberedValues, expected_values, values_of

__all__ = ["Difference", "broken_groups", "compare"]

_MAX_MOVED = 100  # names that are tried for activations which rewritten methods call


@dataclass(frozen=True)
class Difference:
    """The first difference between two recordings.

    Attributes:
        text: A description of what differs.
        module: Qualified name of the module in whose forward the difference is.
        first: The call in the original.
        second: The call in the result.
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
    """Compare a result's recording with the original's, to which the allowed changes are applied.

    Args:
        original: The recording before.
        result: The recording after.
        allowed: The changes that were to be made.
        slope: For a gradual result, the slope at which it is compared: at 0 with the original, at 1 with the original
            after a hard conversion.
        gradual: Names of the result's modules that are gradual activations.

    Returns:
        The first difference, or None.
    """
    table: Table = {}
    actual = values_of(result, allowed, table, _moved_classes(original, allowed), original.names, slope, gradual)
    if slope == 0:
        allowed = replace(allowed, changes=())
    expected = expected_values(original, allowed, table, actual.moved)
    broken = {**actual.broken, **expected.broken}
    if broken:
        head, reason = next(iter(broken.items()))
        return Difference(f"the group merged at {head} is not one convolution: {reason}")
    missing = _missing_call(original, allowed)
    if missing:
        return Difference(f"the model never makes the call {missing} that the plan changes")
    if actual.results != expected.results:
        return _first_difference(original, result, expected, actual)
    return _shape_difference(original, result, expected, actual, allowed)


def broken_groups(recording: Recording, allowed: AllowedDifferences) -> Mapping[str, str]:
    """Return why groups are not one convolution in a recording of the original, by their heads."""
    return expected_values(recording, allowed, {}, {}).broken


def _moved_classes(original: Recording, allowed: AllowedDifferences) -> dict[str, frozenset[str]]:
    """Return the names that moved activations may have in the result, with the names of their possible classes."""
    moved = [change for change in allowed.changes if change.place is not None]
    classes: dict[str, set[str]] = {}
    for node, change, _ in changed_activations(original, moved):
        place, settings = change.place, original.facts[node].settings
        assert place is not None
        cls = settings[1] if settings else change.call.kind
        if place.how == "slot":
            classes.setdefault(f"{place.owner}.{place.op}", set()).add(cls)
        else:
            prefix = f"{place.owner}." if place.owner else ""
            for number in ("", *range(1, _MAX_MOVED)):
                classes.setdefault(f"{prefix}moved_act{number}", set()).add(cls)
    return {path: frozenset(names) for path, names in classes.items()}


def _missing_call(original: Recording, allowed: AllowedDifferences) -> str:
    """Return the id of a changed call that a recording does not contain although its owner ran, or ""."""
    mode = "train" if original.call.training else "eval"
    ran = {frame.path for frame in original.frames}
    recorded = {change.call.id for _, change, _ in changed_activations(original, allowed.changes)}
    for change in allowed.changes:
        call = change.call
        owner_ran = original.names.get(call.owner, call.owner) in ran
        if call.modes in ("both", mode) and owner_ran and call.id not in recorded:
            return call.id
    return ""


def _first_difference(
    original: Recording, result: Recording, expected: NumberedValues, actual: NumberedValues
) -> Difference:
    first, second = _unmatched(expected, actual), _unmatched(actual, expected)
    if first is None and second is None:
        results = {**expected.results, **actual.results}
        kind, name = next(key for key in results if expected.results.get(key) != actual.results.get(key))
        return Difference(f"what is {kind}{f' ({name})' if name else ''} differs")
    facts = [None if first is None else original.facts[first], None if second is None else result.facts[second]]
    before, after = map(_describe, facts)
    module = next(fact.frame.path for fact in reversed(facts) if fact is not None)
    return Difference(
        f"in the forward of {module or 'the model'}, the result runs {after or 'nothing'} where "
        f"{before or 'nothing'} was expected",
        module,
        before,
        after,
    )


def _unmatched(values: NumberedValues, other: NumberedValues) -> Node | None:
    """Return the first live node whose value the other recording does not have."""
    known = {other.numbers[node] for node in other.live}
    return next((node for node in values.live if values.numbers[node] not in known), None)


def _describe(fact: Fact | None) -> str:
    if fact is None:
        return ""
    if fact.settings:
        return f"{fact.label} = {fact.settings[1]}({fact.settings[2]})"
    arguments = _describe_form(fact.form[1]) if len(fact.form) > 1 else ""
    return f"{fact.label}({arguments})"


def _describe_form(form: object) -> str:
    """Return a call's arguments as text, with tensors as "tensor"."""
    if isinstance(form, tuple) and form and form[0] in ("tuple", "list"):
        return ", ".join(_describe_form(part) for part in form[1:])
    if isinstance(form, tuple) and len(form) == 2:
        return str(form[1])
    return "tensor" if isinstance(form, str) and form.startswith("\0") else str(form)


def _shape_difference(
    original: Recording,
    result: Recording,
    expected: NumberedValues,
    actual: NumberedValues,
    allowed: AllowedDifferences,
) -> Difference | None:
    """Return a value whose shape has changed outside the runs whose padding moved, or None."""
    if not allowed.hoists:
        return None
    hoisted = _nodes_in_hoists(original, allowed)
    shapes = {number: result.facts[node].shapes for node, number in actual.numbers.items()}
    for node in expected.live:
        fact = original.facts[node]
        shape = shapes.get(expected.numbers[node], fact.shapes)
        if shape != fact.shapes and node not in hoisted:
            text = (
                f"{fact.label} gives {shape} instead of {fact.shapes}, though it is not part of a run whose padding "
                "moved"
            )
            return Difference(text, fact.frame.path, _describe(fact), _describe(fact))
    return None


def _nodes_in_hoists(original: Recording, allowed: AllowedDifferences) -> set[Node]:
    """Return the nodes from the first convolution (inclusive) to the last (exclusive) of runs whose padding moved."""
    by_label: dict[str, list[Node]] = {}
    for node, fact in original.facts.items():
        by_label.setdefault(fact.label, []).append(node)
    nodes: set[Node] = set()
    for hoist in allowed.hoists:
        firsts = set(by_label.get(hoist[0], ()))
        for last in by_label.get(hoist[-1], ()):
            nodes |= _nodes_between(original, firsts, last)
    return nodes


def _nodes_between(original: Recording, firsts: set[Node], last: Node) -> set[Node]:
    """Return the nodes that ``last`` is computed from, back to ``firsts`` (inclusive)."""
    nodes: set[Node] = set()
    todo: list[Node] = [node for node, _ in original.facts[last].reads]
    while todo:
        node = todo.pop()
        if node in nodes or node.op in ("placeholder", "get_attr"):
            continue
        nodes.add(node)
        if node not in firsts:
            todo += [source for source, _ in original.facts[node].reads]
    return nodes
