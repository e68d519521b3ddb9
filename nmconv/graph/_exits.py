"""Where a forward may go another way than the one that was traced, between two of its calls: by its source."""

from __future__ import annotations

import ast
import inspect
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType, FrameType
from typing import Any

from torch import nn

from nmconv.graph._syntax import NoSource, conditions, goes_one_way, parsed, unwrapped

__all__ = ["Lines", "lines_of", "may_turn_off"]

Lines = tuple[tuple[CodeType, int], ...]  # methods of one module that call one another, and where; outermost first
_FLAGS = (bool, int, float, str)
_ENDS = ("_descend", "call")  # of the tracer: what it runs a forward from


def lines_of(module: nn.Module, known: dict[type, frozenset[CodeType]]) -> Lines:
    """The lines of the module's own methods that are running; none of what was called from elsewhere.

    Args:
        module: Whose methods.
        known: What the methods of classes are, for as long as nobody gives these classes others.
    """
    found: list[tuple[CodeType, int]] = []
    at: FrameType | None = sys._getframe(2)
    cls = type(module)
    if cls not in known:
        known[cls] = _codes(cls)
    while at is not None:
        code = at.f_code
        if code.co_name in _ENDS and at.f_globals.get("__name__", "").startswith(__package__):
            break
        if code in known[cls]:
            found.append((code, at.f_lineno))
        at = at.f_back
    return tuple(reversed(found))


def _codes(cls: type) -> frozenset[CodeType]:
    """Of all methods, those of its bases and those inside decorators, whatever these call them."""
    bases = [base for base in cls.__mro__ if base not in (object, nn.Module)]
    held = [_function(value) for base in bases for value in vars(base).values()]
    methods = [method for value in held if callable(value) for method in unwrapped(value)]
    codes = (getattr(method, "__code__", None) for method in methods if not isinstance(method, (type, nn.Module)))
    return frozenset(code for code in codes if isinstance(code, CodeType))


def _function(value: Any) -> Any:
    if isinstance(value, property):
        return value.fget
    return value.__func__ if isinstance(value, (staticmethod, classmethod)) else value


def may_turn_off(module: nn.Module, first: Lines, then: Lines) -> bool:
    """Whether a method, called with other arguments or flags, may not come from one line to another of the module's.

    Only optional arguments count, exceptions that are caught, and flags (``self.name`` that is a number, a text or a
    truth value): what a module does with submodules that it has or has not is no choice of its caller's.

    Args:
        module: Whose methods these are.
        first: Where a value was made.
        then: Where it was used.
    """
    level = 0
    while level < min(len(first), len(then)) and first[level] == then[level]:
        code, line = first[level]
        if any(_matters(fork, module) for fork in _around(_forks(code), line, line)):
            return True
        level += 1
    behind, before = first[level:], then[level:]
    if behind and before and behind[0][0] is before[0][0]:
        code, start, end = *behind[0], before[0][1]
        if any(_matters(fork, module) for fork in _between(_forks(code), start, end)):
            return True
        behind, before = behind[1:], before[1:]
    met = [fork for code, line in behind for fork in _forks(code).forks if fork.end > line or fork.anywhere]
    met += [fork for code, line in before for fork in _forks(code).forks if fork.start <= line or fork.anywhere]
    return any(_matters(fork, module) for fork in met)


@dataclass(frozen=True)
class _Fork:
    """A condition.

    Attributes:
        start: Its first line.
        end: And its last.
        arguments: Whether it asks for an optional argument.
        attributes: Of the module, that it asks for.
        ends: Whether what there is so far may be returned there.
        same: Whether it calls the same, in the same order, either way.
        anywhere: Whether it also decides on what is called elsewhere.
    """

    start: int
    end: int
    arguments: bool
    attributes: frozenset[str]
    ends: bool
    anywhere: bool
    same: bool = False


@dataclass(frozen=True)
class _Forks:
    forks: tuple[_Fork, ...] = ()
    loops: tuple[tuple[int, int], ...] = ()


# Of a function without source that may go several ways: it may turn off anywhere.
_ANY = _Forks((_Fork(0, sys.maxsize, arguments=True, attributes=frozenset(), ends=True, anywhere=True),))


def _between(found: _Forks, first: int, then: int) -> Iterator[_Fork]:
    """Those met on the way from one line to another, or with one of them inside: in a loop, on the way round."""
    for fork in found.forks:
        holds_first = fork.start <= first <= fork.end and not fork.start <= then <= fork.end
        if fork.anywhere or first < fork.start <= then or (holds_first and fork.arguments):
            yield fork
    if then <= first:
        yield from _around(found, first, then)


def _around(found: _Forks, first: int, then: int) -> Iterator[_Fork]:
    """Those of the outermost loop that both lines are in."""
    loops = [span for span in found.loops if span[0] <= then and first <= span[1]]
    for fork in found.forks:
        if fork.anywhere or (loops and min(loops)[0] <= fork.start <= min(loops)[1]):
            yield fork


def _matters(fork: _Fork, module: nn.Module) -> bool:
    flags = any(type(_held(module, name)) in _FLAGS for name in fork.attributes)
    return fork.arguments or (flags and (fork.ends or not fork.same))


def _held(module: nn.Module, name: str) -> Any:
    return module.__dict__.get(name, inspect.getattr_static(type(module), name, None))


@lru_cache(maxsize=1024)
def _forks(code: CodeType) -> _Forks:
    try:
        function = parsed(code)
    except NoSource:
        return _Forks() if goes_one_way(code) else _ANY
    return _Reader(function).read()


class _Reader:
    """Reads one function."""

    def __init__(self, function: ast.FunctionDef) -> None:
        self.function = function
        given = self.function.args
        positional = [*given.posonlyargs, *given.args]
        self.own = positional[0].arg if positional else ""
        self.optional = {part.arg for part in positional[len(positional) - len(given.defaults) :]}
        self.optional |= {part.arg for part, value in zip(given.kwonlyargs, given.kw_defaults, strict=True) if value}
        self.optional |= {part.arg for part in (given.vararg, given.kwarg) if part}
        self.mentioned = Counter(self._attributes([self.function]))

    def read(self) -> _Forks:
        for node in ast.walk(self.function):  # another name for an argument
            if isinstance(node, ast.Assign) and self._asks(node.value) and not self._computes(node.value):
                self.optional.update(part.id for part in node.targets if isinstance(part, ast.Name))
        forks, loops = [], []
        for node, test in conditions(self.function):
            ends = not isinstance(node, ast.For) and any(map(self._ends, ast.walk(node)))
            forks.append(self._fork(node, test, ends))
            if isinstance(node, (ast.For, ast.While)):
                loops.append((node.lineno, node.end_lineno or node.lineno))
        for node in ast.walk(self.function):
            if isinstance(node, ast.Try) and node.handlers:  # what is caught there may be up to data
                end = node.end_lineno or node.lineno
                forks.append(_Fork(node.lineno, end, arguments=True, attributes=frozenset(), ends=True, anywhere=False))
        for node in ast.walk(self.function):
            for part in ast.walk(node.value) if isinstance(node, ast.Return) and node.value is not None else ():
                if isinstance(part, ast.IfExp):
                    ends = not (self._computes(part.body) and self._computes(part.orelse))
                    forks.append(self._fork(part, part.test, ends))
        return _Forks(tuple(forks), tuple(loops))

    def _fork(self, node: Any, test: ast.expr, ends: bool) -> _Fork:
        asks = self._asks(test)
        called = {id(part.func) for part in ast.walk(node) if isinstance(part, ast.Call)}
        inside = [part for part in ast.walk(node) if self._is_own(part)]
        # What is called here and elsewhere too, or only picked here: where it runs is up to the condition.
        anywhere = any(self.mentioned[part.__dict__["attr"]] > 1 or id(part) not in called for part in inside)
        anywhere |= not self.own  # a wrapper's, that takes its module among others: what it calls cannot be told
        attributes = frozenset(self._attributes([test])) - {"training"}
        end, same = node.end_lineno or node.lineno, self._calls_the_same(node)
        return _Fork(node.lineno, end, asks, attributes, ends, asks and anywhere, same)

    def _calls_the_same(self, node: Any) -> bool:
        """Whether both ways name the same of the module's attributes, and do no arithmetic: checkpointing, say."""
        if not isinstance(node, ast.If):
            return False
        ways = [ast.Module(body, []) for body in (node.body, node.orelse)]
        computes = any(
            isinstance(part, (ast.BinOp, ast.UnaryOp, ast.AugAssign)) for way in ways for part in ast.walk(way)
        )
        return not computes and self._attributes([ways[0]]) == self._attributes([ways[1]])

    def _asks(self, value: ast.AST) -> bool:
        return any(isinstance(part, ast.Name) and part.id in self.optional for part in ast.walk(value))

    def _is_own(self, part: ast.AST) -> bool:
        return isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id == self.own

    def _attributes(self, parts: Iterable[ast.AST]) -> list[str]:
        return [str(part.__dict__["attr"]) for whole in parts for part in ast.walk(whole) if self._is_own(part)]

    def _ends(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Break) or (isinstance(node, ast.Return) and not self._computes(node.value))

    def _computes(self, value: ast.AST | None) -> bool:
        """Whether anything is done there besides putting what there is into something."""
        if value is None:
            return False
        parts = list(ast.walk(value))
        calls = any(isinstance(part, ast.Call) and any(map(self._is_own, ast.walk(part.func))) for part in parts)
        return calls or any(isinstance(part, (ast.BinOp, ast.UnaryOp)) for part in parts)
