"""Python functions: what decorators wrap, and syntax trees."""

from __future__ import annotations

import ast
import dis
import inspect
import warnings
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from nmconv.copying import closure_contents

__all__ = ["NoSource", "conditions", "is_branchless", "method_codes", "syntax_tree", "unwrapped"]


# -- decorators -------------------------------------------------------------------------------------------------------


def method_codes(cls: type) -> frozenset[CodeType]:
    """Return the code of all methods of a class and its bases, also of those inside decorators."""
    bases = [base for base in cls.__mro__ if base not in (object, nn.Module)]
    attributes = [_plain_function(value) for base in bases for value in vars(base).values()]
    functions = [function for value in attributes if callable(value) for function in unwrapped(value)]
    codes = (getattr(each, "__code__", None) for each in functions if not isinstance(each, (type, nn.Module)))
    return frozenset(code for code in codes if isinstance(code, CodeType))


def _plain_function(value: Any) -> Any:
    if isinstance(value, property):
        return value.fget
    return value.__func__ if isinstance(value, (staticmethod, classmethod)) else value


def unwrapped(method: Any) -> Iterator[Any]:
    """Yield a method and the functions that its decorators wrap, outermost first.

    A decorator without ``__wrapped__`` is taken to wrap the functions in its closure.
    """
    todo, seen = [method], set()
    while todo:
        method = todo.pop()
        if method is None or id(method) in seen:
            continue
        seen.add(id(method))
        yield method
        inner = getattr(method, "__wrapped__", None)
        todo += (
            [inner]
            if inner is not None
            else [part for part in closure_contents(method) if isinstance(part, FunctionType)]
        )


# -- syntax trees -----------------------------------------------------------------------------------------------------


class NoSource(Exception):
    """The source of the loaded code is missing, has changed since it was imported, or cannot be followed."""


def syntax_tree(code: CodeType) -> ast.FunctionDef:
    """Return a function's syntax tree with the line numbers of its file.

    The file may have changed since it was imported, or the code may come from elsewhere. So the source is used only
    if it compiles to exactly this code, at these lines.

    Raises:
        NoSource: If it does not, or if the code is not that of a function.
    """
    try:
        lines, _ = inspect.findsource(code)
    except OSError as error:
        raise NoSource(f"{code.co_name}: {error}") from error
    compiled = _compiled_functions("".join(lines), code.co_filename).get((code.co_name, code.co_firstlineno))
    if compiled is not None:
        tree, compiled_code = compiled
        if compiled_code == code and list(compiled_code.co_lines()) == list(code.co_lines()):
            return tree
    raise NoSource(f"{code.co_name}: its file does not match the loaded code")


@lru_cache(maxsize=8)  # the trees are large, and callers cache what they derive from them
def _compiled_functions(text: str, file: str) -> dict[tuple[str, int], tuple[ast.FunctionDef, CodeType] | None]:
    """Return the tree and code of every function in a file by name and first line; None where that is ambiguous."""
    try:
        with warnings.catch_warnings():  # the import has shown the file's warnings already
            warnings.simplefilter("ignore")
            tree = ast.parse(text, file)
            todo = [compile(tree, file, "exec", dont_inherit=True)]
    except (SyntaxError, ValueError, RecursionError):
        return {}
    codes: dict[tuple[str, int], list[CodeType]] = {}
    while todo:
        code = todo.pop()
        codes.setdefault((code.co_name, code.co_firstlineno), []).append(code)
        todo += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    functions: dict[tuple[str, int], tuple[ast.FunctionDef, CodeType] | None] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            key = node.name, min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            same_place = codes.get(key, [])
            functions[key] = (node, same_place[0]) if len(same_place) == 1 and key not in functions else None
    return functions


def is_branchless(code: CodeType) -> bool:
    """Return whether the bytecode has no branches, loops or exception handlers: for functions without source."""
    names = [step.opname for step in dis.get_instructions(code)]
    branches = any(("JUMP" in name and "IF" in name) or name in ("FOR_ITER", "SETUP_FINALLY") for name in names)
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return not branches and not getattr(code, "co_exceptiontable", b"") and all(map(is_branchless, inner))


def conditions(function: ast.FunctionDef) -> Iterator[tuple[Any, ast.expr]]:
    """Yield every ``if``, ``while``, ``for``, ``match`` and conditional expression with what it branches on."""
    for node in ast.walk(function):
        if isinstance(node, (ast.If, ast.While, ast.IfExp)):
            yield node, node.test
        elif isinstance(node, ast.For):
            yield node, node.iter
        elif isinstance(node, ast.Match):
            yield node, node.subject
