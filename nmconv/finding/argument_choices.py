"""Find the arguments that decide what a forward does, or which module it calls."""

from __future__ import annotations

import ast
import dis
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType

from torch import nn

from nmconv.finding.control_flow import is_attribute_of, optional_arguments
from nmconv.recording import NoSource, conditions, is_branchless, syntax_tree, unwrapped

__all__ = ["deciding_arguments"]


def deciding_arguments(module: nn.Module, *, conditions: bool) -> frozenset[str] | None:
    """Return the names of the arguments that decide what a module's forward does, or None if its code is unavailable.

    Args:
        module: The module.
        conditions: Whether conditions on optional arguments count, too; linear runs do not extend over these. Indices,
            arguments of helpers, and conditions on required arguments always count.
    """
    forward = module.__dict__.get("forward", getattr(type(module), "forward", None))
    names: frozenset[str] = frozenset()
    for function in unwrapped(getattr(forward, "__func__", forward)):
        code = getattr(function, "__code__", None)
        if not isinstance(code, CodeType) or code.co_name != "forward":
            continue
        deciding = _deciding_arguments(code, conditions)
        if deciding is None:
            return None
        names |= deciding
    return names


@lru_cache(maxsize=1024)
def _deciding_arguments(code: CodeType, with_conditions: bool) -> frozenset[str] | None:
    try:
        function = syntax_tree(code)
    except NoSource:
        indexes = any(step.opname == "BINARY_SUBSCR" for step in dis.get_instructions(code))
        return frozenset() if is_branchless(code) and not indexes else None
    args = function.args
    names = [arg.arg for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg) if arg]
    self_name = next(iter(names), "")
    sources = _sources_of_variables(function, names, self_name)
    tests = [test for _, test in conditions(function)]
    deciding = set().union(*(_arguments_in(test, sources) for test in tests))
    if not with_conditions:
        deciding -= optional_arguments(args)
    in_tests = {id(part) for test in tests for part in ast.walk(test)}
    for expression in _other_choices(function, self_name, in_tests):
        deciding |= _arguments_in(expression, sources)
    return frozenset(deciding - {self_name})


def _sources_of_variables(function: ast.FunctionDef, names: list[str], self_name: str) -> dict[str, set[str]]:
    """Return the arguments that each variable holds whole or in part, by the variable's name."""
    sources = {name: {name} for name in names}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and not _computes(node.value, self_name):
            arguments = _arguments_in(node.value, sources)
            for target in node.targets:
                for part in ast.walk(target):
                    if isinstance(part, ast.Name) and arguments:
                        sources.setdefault(part.id, set()).update(arguments)
    return sources


def _arguments_in(expression: ast.AST, sources: dict[str, set[str]]) -> set[str]:
    """Return the arguments that the variables in an expression hold."""
    names = (part.id for part in ast.walk(expression) if isinstance(part, ast.Name))
    return set[str]().union(*(sources.get(name, set()) for name in names))


def _computes(value: ast.expr, self_name: str) -> bool:
    """Return whether an expression calls a module or computes; its result is then not part of an argument."""
    return any(
        isinstance(part, ast.BinOp) or (isinstance(part, ast.Call) and is_attribute_of(part.func, self_name))
        for part in ast.walk(value)
    )


def _other_choices(function: ast.FunctionDef, self_name: str, in_tests: set[int]) -> Iterator[ast.AST]:
    """Yield the deciding expressions that are not conditions; ``in_tests`` holds the ids of the parts of conditions."""
    for node in ast.walk(function):
        if id(node) in in_tests:
            continue
        if isinstance(node, (ast.BoolOp, ast.Compare)):
            yield node
        elif isinstance(node, ast.comprehension):
            yield node.iter
            yield from node.ifs
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            yield node.slice
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield from node.args  # a helper function, or getattr
        elif isinstance(node, ast.Call) and is_attribute_of(node.func, self_name):
            # It may be a method of the module; if it is a child, that child's own forward is examined separately.
            yield from node.args
            yield from (keyword.value for keyword in node.keywords)
