"""Guards: a merged model raises MergeError in calls that it was not merged for.

The first half of this file derives the guards from the recordings, the second puts them into the model's forwards.
"""

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
from nmconv.finding import deciding_arguments
from nmconv.merging.recorded_runs import merged_groups
from nmconv.merging.report import Guard, Merge
from nmconv.recording import ENTRY_POINTS, Frame, Recording
from nmconv.surgery import RewrittenMethod, Witness, format_parameters, rewritten_class

__all__ = ["Closed", "check_argument", "guard_calls", "guarded", "with_attribute_guards"]

_PLAIN = (type(None), bool, int, float, str)


def guarded(model: nn.Module, witness: Witness | None, merges: Sequence[Merge]) -> list[Merge]:
    """Return merges with guards for arguments that forwards branch on, and with the methods that read values inside.

    Args:
        model: The model that was recorded.
        witness: Its recordings; None: nothing is guarded.
        merges: Merges to be carried out.
    """
    if witness is None or not witness.recordings.runs:
        return list(merges)
    runs = witness.recordings.runs
    closed = _closed_methods(model, witness, merges)
    result = []
    for merge in merges:
        members = {merge.head, *merge.removed}
        frames = _enclosing_frames(runs[0], members)
        guards = (guard for frame, crossed in frames for guard in _guards_of(model, frame, runs, crossed=crossed))
        result.append(
            replace(
                merge,
                guards=tuple(dict.fromkeys(guards)),
                closed=tuple(dict.fromkeys(closed.get(merge.head, ()))),
            )
        )
    return result


def with_attribute_guards(model: nn.Module, merges: Iterable[Merge], flags: Iterable[tuple[str, str]]) -> list[Merge]:
    """Return merges with guards for the attributes of enclosing modules that control flow depends on.

    Args:
        model: The model.
        merges: Merges to be carried out.
        flags: Names of modules and of their attributes, see :class:`nmconv.finding.LinearRun`.
    """
    flags = sorted(set(flags))
    result = []
    for merge in merges:
        members = (merge.head, *merge.removed)
        guards = [
            Guard(path, f"self.{name}", json.dumps(getattr(model.get_submodule(path), name)))
            for path, name in flags
            if any(not path or member.startswith(f"{path}.") for member in members)
        ]
        result.append(replace(merge, guards=tuple(dict.fromkeys((*merge.guards, *guards)))))
    return result


def _closed_methods(model: nn.Module, witness: Witness, merges: Sequence[Merge]) -> dict[str, list[str]]:
    """Return, by the head of each merge, the methods that read values inside, or may because they were not recorded."""
    runs = witness.recordings.runs
    groups = merged_groups(merges)
    closed: dict[str, list[str]] = {}
    for run in runs:
        if run.call.closable:
            for head in witness.broken_in(run, groups):
                closed.setdefault(head, []).append(run.call.method)
    recorded = {run.call.method for run in runs}
    unknown = [name for name in ENTRY_POINTS if name not in recorded and callable(getattr(model, name, None))]
    for merge in merges:
        if len(merge.convs) > 1:  # folding a norm preserves what others read
            closed.setdefault(merge.head, []).extend(unknown)
    return closed


def _enclosing_frames(run: Recording, members: set[str]) -> list[tuple[Frame, bool]]:
    """Return the forwards that call the members, up to the innermost that encloses all of them.

    Returns:
        Frames without the outermost one, and whether each encloses only a part of the members.
    """
    stacks: list[list[Frame]] = []
    for node, fact in run.facts.items():
        if (node.op == "call_module" and fact.label in members) or fact.frame.path in members:
            stacks.append([*_ancestors(fact.frame)])
    if not stacks:
        return []
    shared = set.intersection(*({id(frame) for frame in stack} for stack in stacks))
    frames: dict[int, tuple[Frame, bool]] = {}
    for stack in stacks:
        for frame in stack:
            frames[id(frame)] = (frame, id(frame) not in shared)
            if id(frame) in shared:
                break
    return [(frame, crossed) for frame, crossed in frames.values() if frame.parent is not None]


def _ancestors(frame: Frame | None) -> Iterator[Frame]:
    while frame is not None:
        yield frame
        frame = frame.parent


def _guards_of(model: nn.Module, frame: Frame, runs: Sequence[Recording], *, crossed: bool) -> Iterator[Guard]:
    module = model.get_submodule(frame.path)
    arguments = _bound_arguments(module, frame)
    plain = {name: value for name, value in arguments.items() if type(value) in _PLAIN and not isinstance(value, Enum)}
    chosen = deciding_arguments(module, conditions=crossed) if plain else frozenset()
    for name, value in plain.items():
        if (chosen is None or name in chosen) and not _was_recorded_both_ways(module, frame.path, name, value, runs):
            yield Guard(frame.path, name, json.dumps(value))


def _bound_arguments(module: nn.Module, frame: Frame) -> dict[str, Any]:
    try:
        bound = inspect.signature(module.forward).bind(*frame.args, **frame.kwargs)
    except (TypeError, ValueError):
        return {}
    bound.apply_defaults()
    return dict(bound.arguments)


def _was_recorded_both_ways(module: nn.Module, path: str, name: str, value: Any, runs: Sequence[Recording]) -> bool:
    """Return whether a bool argument was recorded with the other value, too."""
    if type(value) is not bool:
        return False
    frames = (frame for run in runs for frame in run.frames if frame.path == path)
    return any(_bound_arguments(module, frame).get(name, value) != value for frame in frames)


# -- in the model's forwards -------------------------------------------------------------------------------------------


def check_argument(value: Any, expected: Any, owner: str, name: str) -> None:
    """Raise MergeError unless an argument has the value that the model was merged for."""
    if value is expected or (type(value) is type(expected) and isinstance(value, _PLAIN) and value == expected):
        return
    shown = repr(value) if isinstance(value, _PLAIN) else f"a {type(value).__name__}"
    if name.startswith("self."):
        raise MergeError(
            f"{owner or 'the model'} was merged by nmconv for {name}={expected!r}, on which a merged part depends, and "
            f"{name} is now {shown}: set it back to {expected!r}, or set it before merging"
        )
    raise MergeError(
        f"{owner or 'the model'} was merged by nmconv for {name}={expected!r} and is called with {shown}, and a merged "
        "part depends on it: call the model that was not merged, or merge it with example_inputs of such a call"
    )


@dataclass(frozen=True)
class Closed:
    """A callable that raises, in place of a method that reads values inside of what was merged, or may.

    Attributes:
        name: Name of the method.
    """

    name: str

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Raise MergeError."""
        raise MergeError(
            f"{self.name} reads values inside of what was merged into one convolution, or was not recorded: call it on "
            f"the model that was not merged, or merge with methods={{{self.name!r}: its inputs}}, which preserves what "
            "it reads"
        )


def guard_calls(model: nn.Module, merges: Iterable[Merge], rewritten_owners: Iterable[str]) -> None:
    """Let the forwards of a merged model check their arguments.

    Args:
        model: The model, changed in place.
        merges: All merges carried out in it.
        rewritten_owners: Qualified names of modules whose forward was rewritten, which checks all of its arguments.

    Raises:
        MergeError: If a forward is set on an instance, so that no class can check its arguments.
    """
    checked = set(rewritten_owners)
    expected: dict[str, dict[str, str]] = {}
    closed: dict[str, None] = {}
    for merge in merges:
        closed.update(dict.fromkeys(merge.closed))
        for guard in merge.guards:
            expected.setdefault(guard.owner, {})[guard.argument] = guard.value
    methods: dict[str, RewrittenMethod] = {}
    for owner, arguments in expected.items():
        module = model.get_submodule(owner)
        if owner in checked or _checks_all(module):
            continue
        if "forward" in module.__dict__:
            raise MergeError(
                f"{owner or 'the model'} has a forward set on the instance, which depends on "
                f"{', '.join(arguments)}: define that forward in its class"
            )
        methods[owner] = _checking_forward(module, owner, arguments)
    for name in closed:
        vars(model)[name] = Closed(name)
    for owner, method in methods.items():
        module = model.get_submodule(owner)
        module.__class__ = rewritten_class(type(module), (method,))


_CHECK = "_argument("  # in the source of a forward that only checks arguments


def _checks_all(module: nn.Module) -> bool:
    """Return whether a conversion or a removed sum has rewritten the forward, so that it checks all arguments."""
    methods = getattr(type(module), "_nmconv_methods", ())
    return any(method.name == "forward" and _CHECK not in method.source for method in methods)


def _checking_forward(module: nn.Module, owner: str, arguments: dict[str, str]) -> RewrittenMethod:
    """Return a forward that checks arguments and calls the class's own.

    Args:
        module: The module.
        owner: Its qualified name.
        arguments: By name of an argument (or ``self.`` and an attribute), the expected value as JSON.
    """
    base = getattr(type(module), "_nmconv_base", type(module))
    parameters = list(inspect.signature(base.forward).parameters.values())
    bound: dict[str, Any] = {"_argument": check_argument}
    shown = format_parameters(parameters, bound)
    self_name, names = parameters[0].name, {parameter.name for parameter in parameters[1:]}
    lines = [f"def forward({', '.join(shown)}):"]
    for index, (name, value) in enumerate(arguments.items()):
        flag = name.removeprefix("self.")
        if name not in names and not (flag != name and flag.isidentifier() and not keyword.iskeyword(flag)):
            raise MergeError(f"{owner or 'the model'} has no argument or attribute {name!r} to check")
        bound[f"_expected_{index}"] = json.loads(value)
        expression = name if name in names else f"{self_name}.{flag}"
        lines.append(f"    _argument({expression}, _expected_{index}, {owner!r}, {name!r})")
    passed = [_passed_on(parameter) for parameter in parameters[1:]]
    lines.append(f"    return type({self_name})._nmconv_base.forward({', '.join([self_name, *passed])})")
    return RewrittenMethod.with_globals("forward", "\n".join(lines) + "\n", bound)


def _passed_on(parameter: inspect.Parameter) -> str:
    """Return the source that passes a parameter on to a function with the same signature."""
    if parameter.kind is parameter.KEYWORD_ONLY:
        return f"{parameter.name}={parameter.name}"
    stars: dict[Any, str] = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}
    return stars.get(parameter.kind, "") + parameter.name
