"""Count how often the source of a method uses an attribute on one path, recorded or not."""

from __future__ import annotations

import ast
import dis
from collections.abc import Iterable, Sequence
from functools import cache
from types import CodeType
from typing import Any

from torch import nn

from nmconv.recording import NoSource, is_branchless, syntax_tree, unwrapped

__all__ = ["count_uses"]

_EXITS = (ast.Return, ast.Raise, ast.Continue, ast.Break)


def count_uses(module: nn.Module, method: str, attribute: str) -> int:
    """Return how often one path through a method may use an attribute.

    Without source, each use in the bytecode counts, or none if it has no branches: then all are recorded.

    Args:
        module: The module whose class has the method.
        method: The method's name.
        attribute: The attribute's name. Conditions (``if self.act is not None``) and repetitions do not count.
    """
    functions = unwrapped(getattr(type(module), method, None))
    codes = (getattr(function, "__code__", None) for function in functions)
    return sum(_count_uses(code, attribute) for code in codes if isinstance(code, CodeType))


@cache
def _count_uses(code: CodeType, attribute: str) -> int:
    if attribute not in code.co_names:
        return 0
    try:
        return _most_in(syntax_tree(code).body, attribute)
    except NoSource:
        uses = sum(step.argval == attribute and "LOAD" in step.opname for step in dis.get_instructions(code))
        return 0 if is_branchless(code) else uses


def _most_in(statements: Sequence[ast.stmt], attribute: str) -> int:
    """Return the most uses on one path through statements."""
    uses = 0
    for number, statement in enumerate(statements):
        if isinstance(statement, ast.If):
            bodies = (statement.body, statement.orelse)
            counts = [_most_in(body, attribute) for body in bodies]
            exits = [bool(body) and isinstance(body[-1], _EXITS) for body in bodies]
            if any(exits):
                rest = _most_in(statements[number + 1 :], attribute)
                return uses + max(count + rest * (not ends) for count, ends in zip(counts, exits, strict=True))
            uses += max(counts)
        else:
            uses += _most(ast.iter_child_nodes(statement), attribute)
    return uses


def _most(nodes: Iterable[Any], attribute: str) -> int:
    """Return the most uses on one path through the parts of statements and expressions."""
    uses = 0
    for node in nodes:
        if isinstance(node, ast.If):
            uses += _most_in([node], attribute)
        elif isinstance(node, ast.IfExp):
            uses += max(_most([node.body], attribute), _most([node.orelse], attribute))
        else:
            uses += isinstance(node, ast.Attribute) and node.attr == attribute and isinstance(node.ctx, ast.Load)
            uses += _most(ast.iter_child_nodes(node), attribute)
    return uses
