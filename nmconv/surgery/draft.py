"""Drawing up a plan for a model, with what cannot be rewritten locked."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from torch import nn

from nmconv.errors import NoSitesError
from nmconv.finding import fingerprint, read
from nmconv.flow import registered_names, signature_of
from nmconv.planning import Changes, Options, Plan, Signature, Structure, changes_of, draw_up
from nmconv.recording import Recordings
from nmconv.surgery.apply import Known, Surgery
from nmconv.surgery.hoist import find_hoists
from nmconv.surgery.resolve import ResolvedPlan
from nmconv.surgery.working_copy import outline_of

__all__ = ["planned"]


def planned(
    model: nn.Module,
    options: Options,
    example_inputs: Any,
    recordings: Recordings,
    call: Signature | None = None,
) -> tuple[Plan, ResolvedPlan, Known]:
    """The plan, hoists included; what it does; the methods written for it."""
    structure = read(model, recordings, linear=options.linear)
    plan, known = _drawn_up(model, structure, options)
    plan = replace(plan, call=signature_of(model, recordings), registered=registered_names(model))
    if options.hoist:
        trial = outline_of(model)
        Surgery(trial, changes_of(plan, structure), known, {}).commit()
        plan = replace(plan, hoists=find_hoists(trial, example_inputs, call))
    return plan, ResolvedPlan(changes_of(plan, structure)), known


def _drawn_up(model: nn.Module, structure: Structure, options: Options) -> tuple[Plan, Known]:
    """The plan, with what cannot be rewritten locked; the methods written to find that out."""
    if not any(item.act is not None for chain in structure.chains for item in chain.items):
        raise NoSitesError(_no_sites(structure, options.linear))
    identity = fingerprint(model, structure)
    locked: dict[int, str] = {}
    known: Known = {}
    while True:
        plan = draw_up(structure, options, identity, locked)
        changes = changes_of(plan, structure)
        failures = Surgery(model, changes, known, {}).failures()
        if not failures:
            break
        for index, change in enumerate(changes.calls):
            call, place = change.call, change.place
            rewritten = [(call.owner, call.method)] if call.how == "rewrite" and change.action != "keep" else []
            rewritten += [(place.owner, place.method)] if place is not None else []
            for where in rewritten:
                if where in failures:
                    locked[index] = str(failures[where])
    everything = _all_dropped(changes)
    if everything is None:
        return plan, known
    failures = Surgery(model, everything, {}, {}).failures()  # so that whoever edits the plan knows what can be dropped
    for index, change in enumerate(changes.calls):
        call = change.call
        if change.action == "keep" and (call.owner, call.method) in failures and call.how == "rewrite":
            locked[index] = str(failures[call.owner, call.method])
    return draw_up(structure, options, identity, locked), known


def _all_dropped(changes: Changes) -> Changes | None:
    """The same with every site dropped whose method is left alone, or None if there is no such site."""
    touched = {(change.call.owner, change.call.method) for change in changes.made}
    calls = tuple(
        replace(change, action="drop")
        if change.action == "keep"
        and change.call.how == "rewrite"
        and (change.call.owner, change.call.method) not in touched
        else change
        for change in changes.calls
    )
    return None if calls == changes.calls else replace(changes, calls=calls)


_SEEN = (  # how a reason begins, and the same of one activation and of several
    ("gate", "is a gate", "are gates"),
    ("it activates a linear layer", "follows a linear layer", "follow linear layers"),
    ("the value before it", "follows a value with other readers", "follow values with other readers"),
    ("it activates a parameter", "is of a parameter", "are of parameters"),
    ("no convolution next to it", "has no convolution next to it", "have no convolution next to them"),
    ("nothing that is returned", "reaches no output", "reach no output"),
    ("stands before a chain", "stands before a chain", "stand before chains"),
    ("the forward never calls it", "is never called", "are never called"),
    ("inside an activation", "is a part of another activation", "are parts of other activations"),
    ("a part of", "is a part of one indivisible layer", "are parts of indivisible layers"),
)


def _no_sites(structure: Structure, linear: bool) -> str:
    text = f"no activation of this {structure.model} belongs to a convolution"
    if structure.untraced:
        parts = "; ".join(f"{part.name or 'the model itself'}: {part.reason}" for part in structure.untraced[:3])
        hints = dict.fromkeys(part.hint for part in structure.untraced)
        return f"{text} that runs ({parts}). {'. '.join(hints)}"
    leading = dict(structure.leading)
    reasons = [leading.get(at, act.skip) for at, act in enumerate(structure.activations)]
    counts = Counter(next((words for words in _SEEN if reason.startswith(words[0])), reason) for reason in reasons)
    seen = [
        f"{count} stay{'s' * (count == 1)}: {words}" if isinstance(words, str) else f"{count} {words[1 + (count > 1)]}"
        for words, count in counts.items()
    ]
    what = ", ".join(seen) or (
        "it calls none that nmconv knows; of those that a forward works out by hand, such as x * torch.sigmoid(x), it "
        "knows expressions in one value, within one forward, of which nobody reads a part; nmconv.register tells it of "
        "activation modules"
    )
    return f"{text}: {what}" if linear else f"{text}: {what}; linear=True counts linear layers as well"
