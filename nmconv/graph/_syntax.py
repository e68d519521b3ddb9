"""Functions as syntax trees: what the rooms that judge a forward by its source share."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from types import CodeType
from typing import Any

__all__ = ["conditions", "parsed", "unwrapped"]


def parsed(code: CodeType) -> ast.FunctionDef:
    """A function's syntax, with the line numbers of its file.

    Raises:
        Exception: If there is no source, or another one by now.
    """
    lines, start = inspect.getsourcelines(code)
    nested = lines[0][:1].isspace()  # not dedented: lines of a text may begin further left
    tree: Any = ast.parse("".join(["if True:\n" if nested else "", *lines]))
    ast.increment_lineno(tree, start - 1 - nested)
    function = tree.body[0].body[0] if nested else tree.body[0]
    assert isinstance(function, ast.FunctionDef)
    return function


def unwrapped(method: Any) -> Iterator[Any]:
    """A method, and what its decorators wrap, outermost first."""
    while method is not None:
        yield method
        method = getattr(method, "__wrapped__", None)


def conditions(function: ast.FunctionDef) -> Iterator[tuple[Any, ast.expr]]:
    """Every ``if``, ``while``, ``match``, ``for`` and conditional expression, and what it goes by."""
    for node in ast.walk(function):
        if isinstance(node, (ast.If, ast.While, ast.IfExp)):
            yield node, node.test
        elif isinstance(node, ast.For):
            yield node, node.iter
        elif isinstance(node, ast.Match):
            yield node, node.subject
