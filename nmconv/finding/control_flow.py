"""Whether a forward, asked otherwise, may do something else between two of its values than a recording shows."""

from __future__ import annotations

import ast
import inspect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType
from typing import Any

from torch import nn

from nmconv.flow import FlowNode, ModuleCall, ancestors
from nmconv.recording import Lines, NoSource, conditions, goes_one_way, parsed

__all__ = ["flags_between", "turns_between"]

_FLAGS = (bool, int, float, str)
_ENDING = (ast.Return, ast.Break, ast.Continue)


def turns_between(value: FlowNode, node: FlowNode, *, sized: bool) -> bool:
    """Whether a forward may do something else between a value and a node that reads it.

    What differs by sizes, modes and contexts recordings show. What is left are the jumps of the forward that both are
    made in: those that go by an optional argument, and those that may end the forward by a flag (a bool, a number or a
    text on the module). Other flags are for :func:`flags_between`. What a module does with submodules that it has or
    has not is no choice of its caller's.

    Args:
        value: What is read.
        node: What reads it.
        sized: Whether jumps that go by variables count, too: these may hold numbers that were made of sizes.
    """
    frame, met = _met_between(value, node)
    return frame is not None and any(jump.counts(frame.module, sized=sized) for jump in met)


def flags_between(value: FlowNode, node: FlowNode) -> tuple[tuple[str, str], ...]:
    """The flags by which a forward goes another way between the two without ending: its module's name, and theirs."""
    frame, met = _met_between(value, node)
    if frame is None:
        return ()
    names = dict.fromkeys(name for jump in met for name in sorted(jump.settings))
    return tuple((frame.path, name) for name in names if type(_held(frame.module, name)) in _FLAGS)


def _met_between(value: FlowNode, node: FlowNode) -> tuple[ModuleCall | None, list[_Jump]]:
    """The innermost forward that both are made in, and the jumps that are met between them."""
    ways = [[*ancestors(each.frame)] for each in (value, node)]
    shared = {id(frame) for frame in ways[0]} & {id(frame) for frame in ways[1]}
    lines = [value.lines, node.lines]
    for side, way in enumerate(ways):
        for frame in way:
            if id(frame) in shared:
                if side:
                    return frame, _met(*lines)
                break
            lines[side] = frame.lines
    return None, []


def _held(module: nn.Module, name: str) -> Any:
    return module.__dict__.get(name, inspect.getattr_static(type(module), name, None))


def _met(first: Lines, then: Lines) -> list[_Jump]:
    """The jumps between two places in a module's methods: where a value is made, and where it is read."""
    level = 0
    met: list[_Jump] = []
    while level < min(len(first), len(then)) and first[level] == then[level]:
        code, line = first[level]
        met += _around(code, line, line)
        level += 1
    behind, before = first[level:], then[level:]
    if behind and before and behind[0][0] is before[0][0]:
        code, start, end = *behind[0], before[0][1]
        met += [jump for jump in _jumps(code) if jump.is_between(start, end)] if start <= end else []
        met += _around(code, start, end)
        behind, before = behind[1:], before[1:]
    met += [jump for code, _ in (*first, *then) for jump in _jumps(code) if jump.anywhere]
    met += [jump for code, line in behind for jump in _jumps(code) if jump.end > line]
    met += [jump for code, line in before for jump in _jumps(code) if jump.start <= line]
    return met


@dataclass(frozen=True)
class _Jump:
    """A condition, or what catches exceptions.

    Attributes:
        start: Its first line.
        end: And its last.
        optional: Whether it goes by an optional argument, or by data.
        flags: Names of attributes of the module that it goes by, if it may end the forward.
        settings: The same, if it may not.
        variable: Whether it goes by a variable, or picks by one.
        anywhere: Whether it also decides on what is called elsewhere, or goes by whatever else is given (``**more``).
        loops: Whether it is a loop.
        catches: Whether it is no condition, but catches exceptions.
    """

    start: int
    end: int
    optional: bool
    flags: frozenset[str] = frozenset()
    settings: frozenset[str] = frozenset()
    variable: bool = False
    anywhere: bool = False
    loops: bool = False
    catches: bool = False

    def is_between(self, first: int, then: int) -> bool:
        """Whether it is met on the way from one line to another that is no earlier one."""
        if self.catches:
            return self.start <= then and first <= self.end
        if first == then:
            return self.optional and self.start == first
        makes = self.optional and self.start <= first <= self.end < then
        return makes or first < self.start <= then

    def counts(self, module: nn.Module, *, sized: bool) -> bool:
        """Whether another way may be taken in calls of this module."""
        by_flag = any(type(_held(module, name)) in _FLAGS for name in self.flags)
        return self.optional or (sized and self.variable) or by_flag


def _around(code: CodeType, *lines: int) -> list[_Jump]:
    """The jumps of the outermost loop that all these lines are in."""
    loops = [loop for loop in _jumps(code) if loop.loops and all(loop.start <= line <= loop.end for line in lines)]
    first = min(loops, key=lambda loop: loop.start, default=None)
    return [jump for jump in _jumps(code) if first is not None and first.start <= jump.start <= first.end]


@lru_cache(maxsize=1024)
def _jumps(code: CodeType) -> tuple[_Jump, ...]:
    try:
        function = parsed(code)
    except NoSource:
        return () if goes_one_way(code) else (_Jump(0, 1 << 30, optional=True),)
    given = function.args
    positional = [*given.posonlyargs, *given.args]
    own = positional[0].arg if positional else ""
    optional = {part.arg for part in positional[len(positional) - len(given.defaults) :]}
    optional |= {part.arg for part, value in zip(given.kwonlyargs, given.kw_defaults, strict=True) if value}
    rest = {part.arg for part in (given.vararg, given.kwarg) if part}
    optional |= rest
    returned = {id(part) for last in ast.walk(function) if isinstance(last, ast.Return) for part in ast.walk(last)}
    found = []
    mentioned = Counter(_own_names(function, own))
    for node, test in conditions(function):
        names = {part.id for part in ast.walk(test) if isinstance(part, ast.Name)}
        by_given, is_loop = not names.isdisjoint(optional), isinstance(node, (ast.For, ast.While))
        ends = id(node) in returned or any(isinstance(part, _ENDING) for part in ast.walk(node))
        ends = ends and not is_loop  # what ends it is a jump inside
        same = not ends and _calls_the_same(node, own)
        flags = frozenset() if same else frozenset(_own_names(test, own)) - {"training"}
        called = {id(part.func) for part in ast.walk(node) if isinstance(part, ast.Call)}
        shared = any(
            mentioned[part.__dict__["attr"]] > 1 or id(part) not in called
            for part in ast.walk(node)
            if _is_own(part, own)
        )
        anywhere = (by_given and shared) or not names.isdisjoint(rest)
        by_variable = not (names - {own}).isdisjoint(code.co_varnames) and not _asks_for_none(test)
        which = (flags, frozenset[str]()) if ends else (frozenset[str](), flags)
        found.append(_Jump(node.lineno, node.end_lineno, by_given, *which, by_variable, anywhere, is_loop))
    for part in ast.walk(function):
        if isinstance(part, ast.Subscript) and any(_is_own(inner, own) for inner in ast.walk(part.value)):
            picks = any(isinstance(inner, ast.Name) and inner.id in code.co_varnames for inner in ast.walk(part.slice))
            found += [_Jump(part.lineno, part.end_lineno or part.lineno, False, variable=True)] if picks else []
        if isinstance(part, ast.Try) and part.handlers:  # what is caught there may be up to data
            found.append(_Jump(part.lineno, part.end_lineno or part.lineno, optional=True, catches=True))
    return tuple(found)


def _asks_for_none(test: ast.expr) -> bool:
    return isinstance(test, ast.Compare) and all(isinstance(op, (ast.Is, ast.IsNot)) for op in test.ops)


def _calls_the_same(node: Any, own: str) -> bool:
    """Whether both ways name the same of the module's attributes, and do no arithmetic: checkpointing, say."""
    if not isinstance(node, ast.If):
        return False
    ways = [ast.Module(body, []) for body in (node.body, node.orelse)]
    computing = (ast.BinOp, ast.UnaryOp, ast.AugAssign)
    computes = any(isinstance(part, computing) for way in ways for part in ast.walk(way))
    one, other = (list(_own_names(way, own)) for way in ways)
    return not computes and one == other


def _own_names(whole: ast.AST, own: str) -> Iterator[str]:
    return (str(part.__dict__["attr"]) for part in ast.walk(whole) if _is_own(part, own))


def _is_own(part: Any, own: str) -> bool:
    return isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id == own
