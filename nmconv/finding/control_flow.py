"""Find branch points between two values of a forward: where other arguments or settings may take another path."""

from __future__ import annotations

import ast
import inspect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType
from typing import Any, TypeGuard

from torch import nn

from nmconv.flow import FlowNode, ModuleCall, ancestors
from nmconv.recording import ENTRY_POINTS, Lines, NoSource, conditions, is_branchless, syntax_tree

__all__ = ["flags_between", "is_attribute_of", "may_diverge_between", "optional_arguments"]

_FLAG_TYPES = (bool, int, float, str)
_EXITS = (ast.Return, ast.Break, ast.Continue)
_ARITHMETIC = (ast.BinOp, ast.UnaryOp, ast.AugAssign)


def may_diverge_between(value: FlowNode, node: FlowNode, *, count_variables: bool) -> bool:
    """Return whether a forward may take another path between a value and a node that reads it.

    Recordings show what depends on sizes, modes and contexts. What remains are branch points of the innermost forward
    that computes both: those that depend on an optional argument, and those that may exit the forward depending on a
    flag (a bool, number or string attribute of the module). :func:`flags_between` returns the other flags. A module's
    choice between submodules that it has or lacks does not depend on the call.

    Args:
        value: The value that is read.
        node: The node that reads it.
        count_variables: Whether branch points that depend on variables, which may hold numbers computed from sizes,
            count, too.
    """
    frame, points = _points_between(value, node)
    return frame is not None and any(
        point.may_diverge(frame.module, count_variables=count_variables) for point in points
    )


def is_split_by_method(value: FlowNode, node: FlowNode) -> bool:
    """Return whether a method of the model that others may call on its own computes one of both nodes, not the other.

    The entry points that are recorded on their own do not count, and methods whose name begins with an underscore.
    """
    frame, first, then = _lines_of(value, node)
    if frame is None or frame.parent is not None:
        return False
    apart = {code for code, _ in first} ^ {code for code, _ in then}
    return any(not code.co_name.startswith("_") and code.co_name not in ("forward", *ENTRY_POINTS) for code in apart)


def flags_between(value: FlowNode, node: FlowNode) -> tuple[tuple[str, str], ...]:
    """Return the flags on which a forward branches between two nodes without exiting: module name and attribute."""
    frame, points = _points_between(value, node)
    if frame is None:
        return ()
    names = dict.fromkeys(name for point in points for name in sorted(point.inner_flags))
    return tuple((frame.path, name) for name in names if _is_flag(frame.module, name))


def _is_flag(module: nn.Module, name: str) -> bool:
    value = module.__dict__.get(name, inspect.getattr_static(type(module), name, None))
    return type(value) in _FLAG_TYPES


def _points_between(value: FlowNode, node: FlowNode) -> tuple[ModuleCall | None, list[_BranchPoint]]:
    """Return the innermost forward that computes both nodes, and its branch points between them."""
    shared, first, then = _lines_of(value, node)
    return shared, _points_on_path(first, then)


def _lines_of(value: FlowNode, node: FlowNode) -> tuple[ModuleCall | None, Lines, Lines]:
    """Return the innermost forward that computes both nodes, and the lines of its methods that compute each."""
    value_frames, node_frames = [*ancestors(value.frame)], [*ancestors(node.frame)]
    shared = next((frame for frame in node_frames if any(frame is other for other in value_frames)), None)
    if shared is None:
        return None, (), ()
    return shared, _lines_in(shared, value, value_frames), _lines_in(shared, node, node_frames)


def _lines_in(frame: ModuleCall, node: FlowNode, frames: list[ModuleCall]) -> Lines:
    """Return the lines of a frame's methods at which a node is computed, directly or within a call."""
    lines = node.lines
    for each in frames:
        if each is frame:
            break
        lines = each.lines
    return lines


def _points_on_path(first: Lines, then: Lines) -> list[_BranchPoint]:
    """Return the branch points between two places in a module's methods."""
    level = 0
    points: list[_BranchPoint] = []
    while level < min(len(first), len(then)) and first[level] == then[level]:
        code, line = first[level]
        points += _points_in_loop_around(code, line, line)
        level += 1
    left, entered = first[level:], then[level:]
    if left and entered and left[0][0] is entered[0][0]:
        code, start, end = *left[0], entered[0][1]
        points += [point for point in _branch_points(code) if start <= end and point.is_between(start, end)]
        points += _points_in_loop_around(code, start, end)
        left, entered = left[1:], entered[1:]
    points += [point for code, _ in (*first, *then) for point in _branch_points(code) if point.everywhere]
    points += [point for code, line in left for point in _branch_points(code) if point.end > line]
    points += [point for code, line in entered for point in _branch_points(code) if point.start <= line]
    return points


def _points_in_loop_around(code: CodeType, *lines: int) -> list[_BranchPoint]:
    """Return the branch points of the outermost loop that holds all these lines."""
    points = _branch_points(code)
    loops = [loop for loop in points if loop.is_loop and all(loop.start <= line <= loop.end for line in lines)]
    outermost = min(loops, key=lambda loop: loop.start, default=None)
    return [point for point in points if outermost is not None and outermost.start <= point.start <= outermost.end]


# The branch points of one function -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _BranchPoint:
    """A condition, a lookup by a variable, or an exception handler.

    Attributes:
        start: Its first line.
        end: Its last line.
        by_argument: Whether it depends on an optional argument, or on data.
        by_variable: Whether it depends on a variable.
        exit_flags: Names of the module's attributes that it depends on, if it may exit the forward.
        inner_flags: The same, if it may not.
        everywhere: Whether it counts for all pairs of values: it also decides on what is called elsewhere, or depends
            on variadic arguments.
        is_loop: Whether it is a loop.
        is_handler: Whether it is an exception handler.
    """

    start: int
    end: int
    by_argument: bool = False
    by_variable: bool = False
    exit_flags: frozenset[str] = frozenset()
    inner_flags: frozenset[str] = frozenset()
    everywhere: bool = False
    is_loop: bool = False
    is_handler: bool = False

    def is_between(self, first: int, then: int) -> bool:
        """Return whether it affects the path from one line to the same or a later one."""
        if self.is_handler:
            return self.start <= then and first <= self.end
        if first == then:
            return self.by_argument and self.start == first
        decides_first = self.by_argument and self.start <= first <= self.end < then
        return decides_first or first < self.start <= then

    def may_diverge(self, module: nn.Module, *, count_variables: bool) -> bool:
        """Return whether calls of this module may take another path."""
        return (
            self.by_argument
            or (count_variables and self.by_variable)
            or any(_is_flag(module, n) for n in self.exit_flags)
        )


@lru_cache(maxsize=1024)
def _branch_points(code: CodeType) -> tuple[_BranchPoint, ...]:
    try:
        function = syntax_tree(code)
    except NoSource:
        return () if is_branchless(code) else (_BranchPoint(0, 1 << 30, by_argument=True),)
    scope = _Scope(function, code)
    points = [_condition(node, test, scope) for node, test in conditions(function)]
    for node in ast.walk(function):
        if isinstance(node, ast.Subscript) and scope.is_lookup_by_variable(node):
            points.append(_BranchPoint(node.lineno, node.end_lineno or node.lineno, by_variable=True))
        if isinstance(node, ast.Try) and node.handlers:  # the data may decide whether an exception is raised
            points.append(_BranchPoint(node.lineno, node.end_lineno or node.lineno, by_argument=True, is_handler=True))
    return tuple(points)


class _Scope:
    """What the names in a forward stand for, and where its attributes are used."""

    def __init__(self, function: ast.FunctionDef, code: CodeType) -> None:
        args = function.args
        positional = [*args.posonlyargs, *args.args]
        self.self_name = positional[0].arg if positional else ""
        self.variadic = {arg.arg for arg in (args.vararg, args.kwarg) if arg}
        self.optional = optional_arguments(args) | self.variadic
        self.variables = code.co_varnames
        self.uses = Counter(self.attributes(function))
        returns = (node for node in ast.walk(function) if isinstance(node, ast.Return))
        self.returned = {id(part) for node in returns for part in ast.walk(node)}

    def attributes(self, tree: ast.AST) -> Iterator[str]:
        """Yield the names of the module's attributes that are used within a syntax tree."""
        return (part.attr for part in ast.walk(tree) if is_attribute_of(part, self.self_name))

    def shares_attributes(self, tree: ast.AST) -> bool:
        """Return whether a tree uses an attribute of the module without calling it, or one that is used elsewhere."""
        called = {id(part.func) for part in ast.walk(tree) if isinstance(part, ast.Call)}
        return any(
            self.uses[part.attr] > 1 or id(part) not in called
            for part in ast.walk(tree)
            if is_attribute_of(part, self.self_name)
        )

    def is_lookup_by_variable(self, node: ast.Subscript) -> bool:
        """Return whether a subscript picks a part of one of the module's attributes by a variable."""
        return any(is_attribute_of(part, self.self_name) for part in ast.walk(node.value)) and any(
            isinstance(part, ast.Name) and part.id in self.variables for part in ast.walk(node.slice)
        )


def _condition(node: Any, test: ast.expr, scope: _Scope) -> _BranchPoint:
    names = {part.id for part in ast.walk(test) if isinstance(part, ast.Name)}
    by_argument = not names.isdisjoint(scope.optional)
    is_loop = isinstance(node, (ast.For, ast.While))
    # What may exit from inside a loop is another branch point.
    exits = not is_loop and (id(node) in scope.returned or any(isinstance(part, _EXITS) for part in ast.walk(node)))
    is_guard = exits or not _has_equivalent_bodies(node, scope)
    flags = frozenset(scope.attributes(test)) - {"training"} if is_guard else frozenset[str]()
    return _BranchPoint(
        node.lineno,
        node.end_lineno,
        by_argument=by_argument,
        by_variable=not (names - {scope.self_name}).isdisjoint(scope.variables) and not _is_identity_test(test),
        exit_flags=flags if exits else frozenset(),
        inner_flags=frozenset() if exits else flags,
        everywhere=(by_argument and scope.shares_attributes(node)) or not names.isdisjoint(scope.variadic),
        is_loop=is_loop,
    )


def _is_identity_test(test: ast.expr) -> bool:
    """Return whether a condition only compares by ``is`` or ``is not``, such as with None."""
    return isinstance(test, ast.Compare) and all(isinstance(op, (ast.Is, ast.IsNot)) for op in test.ops)


def _has_equivalent_bodies(node: Any, scope: _Scope) -> bool:
    """Return whether both bodies of an ``if`` use the same attributes without arithmetic, as checkpointing does."""
    if not isinstance(node, ast.If):
        return False
    bodies = [ast.Module(body, []) for body in (node.body, node.orelse)]
    computes = any(isinstance(part, _ARITHMETIC) for body in bodies for part in ast.walk(body))
    return not computes and list(scope.attributes(bodies[0])) == list(scope.attributes(bodies[1]))


def optional_arguments(args: ast.arguments) -> set[str]:
    """Return the names of a function's arguments that have a default."""
    positional = [*args.posonlyargs, *args.args]
    names = {arg.arg for arg in positional[len(positional) - len(args.defaults) :]}
    return names | {arg.arg for arg, value in zip(args.kwonlyargs, args.kw_defaults, strict=True) if value is not None}


def is_attribute_of(node: ast.AST, name: str) -> TypeGuard[ast.Attribute]:
    """Return whether a node is an attribute of the variable ``name``."""
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == name
