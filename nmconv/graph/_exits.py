"""Where a forward may go another way than the one that was traced, between two of its calls: by its source."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType, FrameType
from typing import Any

from torch import nn

__all__ = ["Line", "line_of", "may_turn_off"]

Line = tuple[CodeType, int]  # of a module's method, and the line in it that makes a call
_FLAGS = (bool, int, float, str)


def line_of(module: nn.Module) -> Line | None:
    """The innermost line of the module's own methods that is running; None if none of them is to be seen."""
    cls = type(module)
    at: FrameType | None = sys._getframe(2)
    while at is not None:
        code = at.f_code
        found = getattr(cls, code.co_name, None)
        if found is not None and getattr(getattr(found, "__wrapped__", found), "__code__", None) is code:
            return code, at.f_lineno
        at = at.f_back
    return None


def may_turn_off(module: nn.Module, first: Line | None, then: Line | None) -> bool:
    """Whether a method, called with other arguments or flags, may not come from one line to another of the module's.

    Only optional arguments count, and flags (``self.name`` that is a number, a text or a truth value) where what there
    is so far is returned: what a module does with submodules that it has or has not is no choice of its caller's.

    Args:
        module: Whose methods these are.
        first: Where a value was made.
        then: Where it was used.
    """
    if first is None or then is None:
        return False
    if first[0] is then[0]:
        return any(_matters(fork, module) for fork in _between(_forks(first[0]), first[1], then[1]))
    behind = (fork for fork in _forks(first[0]).forks if fork.start > first[1])
    before = (fork for fork in _forks(then[0]).forks if fork.start <= then[1])
    return any(_matters(fork, module) for part in (behind, before) for fork in part)


@dataclass(frozen=True)
class _Fork:
    """A condition: where it is, which optional arguments and attributes it asks for, and whether it may end it all."""

    start: int
    arguments: frozenset[str]
    attributes: frozenset[str]
    ends: bool


@dataclass(frozen=True)
class _Forks:
    forks: tuple[_Fork, ...] = ()
    loops: tuple[tuple[int, int], ...] = ()


def _between(found: _Forks, first: int, then: int) -> Iterator[_Fork]:
    """Those met on the way from one line to another: in a loop, on the way round."""
    if first < then:
        yield from (fork for fork in found.forks if first < fork.start <= then)
        return
    around = [span for span in found.loops if span[0] <= then and first <= span[1]]
    if around:
        start, end = max(around)
        yield from (fork for fork in found.forks if start <= fork.start <= end)


def _matters(fork: _Fork, module: nn.Module) -> bool:
    if fork.arguments:
        return True
    return fork.ends and any(type(_held(module, name)) in _FLAGS for name in fork.attributes)


def _held(module: nn.Module, name: str) -> Any:
    return module.__dict__.get(name, inspect.getattr_static(type(module), name, None))


@lru_cache(maxsize=1024)
def _forks(code: CodeType) -> _Forks:
    try:
        lines, start = inspect.getsourcelines(code)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError, ValueError):
        return _Forks()  # nothing is known
    ast.increment_lineno(tree, start - 1)
    function = tree.body[0]
    if not isinstance(function, ast.FunctionDef):
        return _Forks()
    given = function.args
    positional = [*given.posonlyargs, *given.args]
    optional = {part.arg for part in positional[len(positional) - len(given.defaults) :]}
    optional |= {part.arg for part, value in zip(given.kwonlyargs, given.kw_defaults, strict=True) if value is not None}
    own = positional[0].arg if positional else ""
    forks, loops = [], []
    for node in ast.walk(function):
        if isinstance(node, (ast.For, ast.While)):
            loops.append((node.lineno, node.end_lineno or node.lineno))
        if isinstance(node, ast.Return) and node.value is not None:
            either = [part for part in ast.walk(node.value) if isinstance(part, ast.IfExp)]
            forks += [_fork(part, optional, own, _is_made(part.body) or _is_made(part.orelse)) for part in either]
        elif isinstance(node, (ast.If, ast.While)):
            ends = any(isinstance(part, ast.Return) and _is_made(part.value) for part in ast.walk(node))
            forks.append(_fork(node, optional, own, ends))
        elif isinstance(node, ast.IfExp):
            forks.append(_fork(node, optional, own, False))
    return _Forks(tuple(forks), tuple(loops))


def _is_made(value: ast.expr | None) -> bool:
    """Whether nothing is computed any more."""
    return value is None or not any(isinstance(part, (ast.Call, ast.BinOp, ast.UnaryOp)) for part in ast.walk(value))


def _fork(node: ast.If | ast.While | ast.IfExp, optional: set[str], own: str, ends: bool) -> _Fork:
    asked = list(ast.walk(node.test))
    attributes = {
        part.attr
        for part in asked
        if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id == own
    }
    names = {part.id for part in asked if isinstance(part, ast.Name)}
    return _Fork(node.lineno, frozenset(names & optional), frozenset(attributes - {"training"}), ends)
