"""Count how often the source of a method uses an attribute, on paths that were recorded and on others."""

from __future__ import annotations

import ast
from functools import cache
from types import CodeType

from torch import nn

from nmconv.recording import NoSource, conditions, syntax_tree, unwrapped

__all__ = ["count_uses"]


def count_uses(module: nn.Module, method: str, attribute: str) -> int:
    """Return how many expressions in a method use an attribute of this name; 0 for a method without source.

    Args:
        module: The module whose class has the method.
        method: The method's name.
        attribute: The attribute's name. What only tests it (``if self.act is not None``) does not count.
    """
    functions = unwrapped(getattr(type(module), method, None))
    codes = (getattr(function, "__code__", None) for function in functions)
    return sum(_count_uses(code, attribute) for code in codes if isinstance(code, CodeType))


@cache
def _count_uses(code: CodeType, attribute: str) -> int:
    if attribute not in code.co_names:
        return 0
    try:
        tree = syntax_tree(code)
    except NoSource:
        return 0
    tested = {id(part) for _, test in conditions(tree) for part in ast.walk(test)}
    uses = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == attribute)
    return sum(isinstance(use.ctx, ast.Load) and id(use) not in tested for use in uses)
