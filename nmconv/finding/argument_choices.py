"""Which arguments a forward chooses by: what it does, or which module it calls."""

from __future__ import annotations

import ast
import dis
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType
from typing import Any

from torch import nn

from nmconv.recording import NoSource, conditions, goes_one_way, parsed, unwrapped

__all__ = ["chosen_by"]


def chosen_by(module: nn.Module, *, conditions: bool) -> frozenset[str] | None:
    """Names of the arguments by which the module's forward chooses; None where its code cannot be read.

    Args:
        module: Whose forward.
        conditions: Whether conditions on optional arguments count, and not only indices, helpers, and arguments without
            a default: a run does not go past the others.
    """
    own = module.__dict__.get("forward", getattr(type(module), "forward", None))
    found: frozenset[str] = frozenset()
    for function in unwrapped(getattr(own, "__func__", own)):
        code = getattr(function, "__code__", None)
        if not isinstance(code, CodeType) or code.co_name != "forward":
            continue
        names = _chosen(code, conditions)
        if names is None:
            return None
        found |= names
    return found


@lru_cache(maxsize=1024)
def _chosen(code: CodeType, with_conditions: bool) -> frozenset[str] | None:
    try:
        function = parsed(code)
    except NoSource:
        indexes = any(step.opname == "BINARY_SUBSCR" for step in dis.get_instructions(code))
        return frozenset() if goes_one_way(code) and not indexes else None
    given = function.args
    parts = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    meant = {part.arg: {part.arg} for part in parts if part is not None}  # from a variable to the arguments behind it
    own = next(iter(meant), "")
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            behind = _behind(node.value, meant) if not _computes(node.value, own) else set()
            for target in node.targets:
                for part in ast.walk(target):
                    if isinstance(part, ast.Name) and behind:
                        meant.setdefault(part.id, set()).update(behind)
    positional = [*given.posonlyargs, *given.args]
    optional = {part.arg for part in positional[len(positional) - len(given.defaults) :]}
    optional |= {part.arg for part, value in zip(given.kwonlyargs, given.kw_defaults, strict=True) if value is not None}
    tests = [test for _, test in conditions(function)]
    asked = set().union(*(_behind(test, meant) for test in tests))
    found = asked if with_conditions else asked - optional
    inside = {id(part) for test in tests for part in ast.walk(test)}
    for part in _choices(function, own, inside):
        found |= _behind(part, meant)
    return frozenset(found - {own})


def _choices(function: ast.FunctionDef, own: str, inside: set[int]) -> Iterator[ast.AST]:
    """Whatever something is chosen by besides conditions, whose parts are ``inside``."""
    for node in ast.walk(function):
        if id(node) in inside:
            continue
        if isinstance(node, (ast.BoolOp, ast.Compare)):
            yield node
        elif isinstance(node, ast.comprehension):
            yield node.iter
            yield from node.ifs
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            yield node.slice
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield from node.args  # a helper, or getattr
        elif isinstance(node, ast.Call) and _is_helper(node.func, own):
            yield from node.args
            yield from (keyword.value for keyword in node.keywords)


def _is_helper(func: ast.expr, own: str) -> bool:
    """Whether it may be a method of the module's: a call of ``self.name``; a child's forward is asked by itself."""
    return isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name) and func.value.id == own


def _computes(value: ast.expr, own: str) -> bool:
    """Whether more is done than to hand on or look up: what a module or an operator gives is no argument any more."""
    return any(
        isinstance(part, ast.BinOp) or (isinstance(part, ast.Call) and _is_helper(part.func, own))
        for part in ast.walk(value)
    )


def _behind(value: ast.AST, meant: dict[str, set[str]]) -> set[str]:
    names: list[Any] = [part.id for part in ast.walk(value) if isinstance(part, ast.Name)]
    return set().union(*(meant.get(name, set()) for name in names))
