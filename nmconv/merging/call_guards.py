"""Calls of a merged model that it was not merged for: refused with a clear error, in its forward itself."""

from __future__ import annotations

import inspect
import json
import keyword
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from torch import nn

from nmconv.errors import MergeError
from nmconv.finding import chosen_by
from nmconv.merging.recorded_runs import groups_of
from nmconv.merging.report import Guard, Merge
from nmconv.recording import ENTRY_POINTS, Frame, Recording
from nmconv.surgery import RewrittenMethod, Witness, rewritten, shown_parameters

__all__ = ["Closed", "check_argument", "guard", "guarded", "with_flags"]

_PLAIN = (type(None), bool, int, float, str)


def guarded(model: nn.Module, witness: Witness | None, merges: Sequence[Merge]) -> list[Merge]:
    """The merges, each with what a caller must not change: arguments that forwards choose by, methods that read inside.

    Args:
        model: As it was recorded.
        witness: What it did; None: nothing is known, and nothing guarded.
        merges: To be made.
    """
    if witness is None or not witness.recordings.runs:
        return list(merges)
    groups = groups_of(merges)
    closed: dict[str, list[str]] = {}
    for run in witness.recordings.runs:
        if run.call.closable:
            for head in witness.broken_in(run, groups):
                closed.setdefault(head, []).append(run.call.method)
    runs = witness.recordings.runs
    recorded = {run.call.method for run in runs}
    unknown = [name for name in ENTRY_POINTS if name not in recorded and callable(getattr(model, name, None))]
    for merge in merges:
        if len(merge.convs) > 1:  # folding a norm leaves what others read
            closed.setdefault(merge.head, []).extend(unknown)
    found = []
    for merge in merges:
        members = {merge.head, *merge.removed}
        frames = _frames(runs[0], members)
        guards = dict.fromkeys(
            each for frame, crossed in frames for each in _guards_of(model, frame, runs, crossed=crossed)
        )
        found.append(replace(merge, guards=tuple(guards), closed=tuple(dict.fromkeys(closed.get(merge.head, ())))))
    return found


def with_flags(model: nn.Module, merges: Iterable[Merge], flags: Iterable[tuple[str, str]]) -> list[Merge]:
    """The merges, each with the flags around it that must stay as they are.

    Args:
        model: That has them.
        merges: To be made.
        flags: Of the runs that they are parts of, see :class:`nmconv.finding.LinearRun`.
    """
    flags = sorted(set(flags))
    found = []
    for merge in merges:
        members = (merge.head, *merge.removed)
        guards = [
            Guard(path, f"self.{name}", json.dumps(getattr(model.get_submodule(path), name)))
            for path, name in flags
            if any(not path or member.startswith(f"{path}.") for member in members)
        ]
        found.append(replace(merge, guards=tuple(dict.fromkeys((*merge.guards, *guards)))))
    return found


def _frames(run: Recording, members: set[str]) -> list[tuple[Frame, bool]]:
    """The forwards that a run is in, from the innermost that holds all of it on, and whether each holds a part."""
    ways: list[list[Frame]] = []
    for node, fact in run.facts.items():
        if (node.op == "call_module" and fact.label in members) or fact.frame.path in members:
            ways.append([*_ancestors(fact.frame)])
    if not ways:
        return []
    shared = set.intersection(*({id(frame) for frame in way} for way in ways))
    found: dict[int, tuple[Frame, bool]] = {}
    for way in ways:
        for frame in way:
            found[id(frame)] = (frame, id(frame) not in shared)
            if id(frame) in shared:
                break
    return [(frame, crossed) for frame, crossed in found.values() if frame.parent is not None]


def _ancestors(frame: Frame | None) -> Iterator[Frame]:
    while frame is not None:
        yield frame
        frame = frame.parent


def _guards_of(model: nn.Module, frame: Frame, runs: Sequence[Recording], *, crossed: bool) -> Iterator[Guard]:
    module = model.get_submodule(frame.path)
    given = _given(module, frame)
    plain = {name: value for name, value in given.items() if type(value) in _PLAIN and not isinstance(value, Enum)}
    chosen = chosen_by(module, conditions=crossed) if plain else frozenset()
    for name, value in plain.items():
        if (chosen is None or name in chosen) and not _varied(module, frame.path, name, value, runs):
            yield Guard(frame.path, name, json.dumps(value))


def _given(module: nn.Module, frame: Frame) -> dict[str, Any]:
    try:
        bound = inspect.signature(module.forward).bind(*frame.args, **frame.kwargs)
    except (TypeError, ValueError):
        return {}
    bound.apply_defaults()
    return dict(bound.arguments)


def _varied(module: nn.Module, path: str, name: str, value: Any, runs: Sequence[Recording]) -> bool:
    """Whether a truth value was recorded the other way, too."""
    if type(value) is not bool:
        return False
    frames = (frame for run in runs for frame in run.frames if frame.path == path)
    return any(_given(module, frame).get(name, value) != value for frame in frames)


# -- in the model -----------------------------------------------------------------------------------------------------


def check_argument(value: Any, expected: Any, owner: str, name: str) -> None:
    """Raise MergeError unless an argument is what the model was merged for."""
    if value is expected or (type(value) is type(expected) and isinstance(value, _PLAIN) and value == expected):
        return
    shown = repr(value) if isinstance(value, _PLAIN) else f"a {type(value).__name__}"
    raise MergeError(
        f"{owner or 'the model'} was merged by nmconv for {name}={expected!r} and is called with {shown}, by which it "
        "does something else inside of what is one convolution now: call the model that was not merged, or merge it "
        "with example_inputs that call it like this"
    )


@dataclass(frozen=True)
class Closed:
    """What stands in a merged model for a method that reads values inside of what was merged, or may."""

    name: str

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Raise MergeError."""
        raise MergeError(
            f"{self.name} reads values inside of what was merged into one convolution, or was not recorded: call it on "
            f"the model that was not merged, or merge with methods={{{self.name!r}: its inputs}}, which leaves what it "
            "reads"
        )


def guard(model: nn.Module, merges: Iterable[Merge], rewritten_owners: Iterable[str]) -> None:
    """Let the forwards of a merged model check their arguments.

    Args:
        model: Changed.
        merges: All that were made in it.
        rewritten_owners: Qualified names of modules whose forward was rewritten: it checks all of its arguments.

    Raises:
        MergeError: If a forward is set on an object, where no class can check.
    """
    done = set(rewritten_owners)
    wanted: dict[str, dict[str, str]] = {}
    closed: dict[str, None] = {}
    for merge in merges:
        closed.update(dict.fromkeys(merge.closed))
        for each in merge.guards:
            wanted.setdefault(each.owner, {})[each.argument] = each.value
    methods: dict[str, list[RewrittenMethod]] = {}
    for owner, arguments in wanted.items():
        module = model.get_submodule(owner)
        if owner in done or _checks_all(module):
            continue
        if "forward" in module.__dict__:
            raise MergeError(
                f"{owner or 'the model'} has a forward set on the object, which chooses by {', '.join(arguments)}: "
                "give its class that forward"
            )
        methods.setdefault(owner, []).append(_checking(module, owner, arguments))
    for name in closed:
        vars(model)[name] = Closed(name)
    for owner, made in methods.items():
        module = model.get_submodule(owner)
        module.__class__ = rewritten(type(module), tuple(made))


_MARK = "_argument("


def _checks_all(module: nn.Module) -> bool:
    """Whether its forward was rewritten by a conversion or for a sum, and not to check arguments."""
    methods = getattr(type(module), "_nmconv_methods", ())
    return any(method.name == "forward" and _MARK not in method.source for method in methods)


def _checking(module: nn.Module, owner: str, arguments: dict[str, str]) -> RewrittenMethod:
    """A forward that checks arguments and calls the class's own."""
    base = getattr(type(module), "_nmconv_base", type(module))
    parameters = list(inspect.signature(base.forward).parameters.values())
    bound: dict[str, Any] = {"_argument": check_argument}
    shown = shown_parameters(parameters, bound)
    passed: list[str] = []
    for parameter in parameters[1:]:
        kind = parameter.kind
        stars = "*" if kind is parameter.VAR_POSITIONAL else "**" if kind is parameter.VAR_KEYWORD else ""
        named = kind is parameter.KEYWORD_ONLY
        passed.append(f"{parameter.name}={parameter.name}" if named else stars + parameter.name)
    own = parameters[0].name
    lines = [f"def forward({', '.join(shown)}):"]
    known = {parameter.name for parameter in parameters[1:]}
    for at, (name, value) in enumerate(arguments.items()):
        flag = name.removeprefix("self.")
        if name not in known and not (flag != name and flag.isidentifier() and not keyword.iskeyword(flag)):
            raise MergeError(f"{owner or 'the model'} has no argument {name!r} that could be checked")
        bound[f"_expected_{at}"] = json.loads(value)
        shown_as = name if name in known else f"{own}.{flag}"
        lines.append(f"    _argument({shown_as}, _expected_{at}, {owner!r}, {name!r})")
    lines.append(f"    return type({own})._nmconv_base.forward({', '.join([own, *passed])})")
    return RewrittenMethod.with_globals("forward", "\n".join(lines) + "\n", bound)
