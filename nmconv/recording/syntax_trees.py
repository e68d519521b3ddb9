"""Functions as syntax trees, where their source compiles to what is loaded."""

from __future__ import annotations

import ast
import dis
import inspect
import warnings
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType
from typing import Any

__all__ = ["NoSource", "conditions", "goes_one_way", "parsed"]


class NoSource(Exception):
    """There is no source of what is loaded (none at all, or another one by now), or it says what nobody can follow."""


def parsed(code: CodeType) -> ast.FunctionDef:
    """A function's syntax, with the line numbers of its file.

    The file may have changed since it was imported, or what was imported been written by something else: its text is
    believed only if it compiles to this very code, at these lines.

    Raises:
        NoSource: If it does not, or the code is no function's.
    """
    try:
        lines, _ = inspect.findsource(code)
    except OSError as error:
        raise NoSource(f"{code.co_name}: {error}") from error
    found = _functions("".join(lines), code.co_filename).get((code.co_name, code.co_firstlineno), ())
    for function, made in found:
        if made == code and list(made.co_lines()) == list(code.co_lines()):
            return function
    raise NoSource(f"{code.co_name}: its file says something else than what is loaded")


@lru_cache(maxsize=8)  # they are large, and what is made of them is kept by those who ask
def _functions(text: str, file: str) -> dict[tuple[str, int], list[tuple[ast.FunctionDef, CodeType]]]:
    """Every function in a file by its name and first line, and what it compiles to."""
    try:
        with warnings.catch_warnings():  # what there is to say of the file was said when it was imported
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
    found: dict[tuple[str, int], list[tuple[ast.FunctionDef, CodeType]]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            made = codes.get((node.name, first), [])
            if len(made) == 1 and (node.name, first) not in found:
                found[node.name, first] = [(node, made[0])]
            else:  # several on one line: nobody can tell which is which
                found[node.name, first] = []
    return found


def goes_one_way(code: CodeType) -> bool:
    """Whether there is nothing in the code that may go one way or another: for functions without source."""
    names = [step.opname for step in dis.get_instructions(code)]
    forks = any(("JUMP" in name and "IF" in name) or name in ("FOR_ITER", "SETUP_FINALLY") for name in names)
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return not forks and not getattr(code, "co_exceptiontable", b"") and all(map(goes_one_way, inner))


def conditions(function: ast.FunctionDef) -> Iterator[tuple[Any, ast.expr]]:
    """Every ``if``, ``while``, ``match``, ``for`` and conditional expression, and what it goes by."""
    for node in ast.walk(function):
        if isinstance(node, (ast.If, ast.While, ast.IfExp)):
            yield node, node.test
        elif isinstance(node, ast.For):
            yield node, node.iter
        elif isinstance(node, ast.Match):
            yield node, node.subject
