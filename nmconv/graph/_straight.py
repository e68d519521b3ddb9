"""Whether a forward that goes by sizes comes from one of its calls to another at any size: by its source."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from types import CodeType

from torch import nn

from nmconv.graph._exits import Lines, parsed

__all__ = ["goes_straight"]


def goes_straight(module: nn.Module, first: Lines, then: Lines) -> bool:
    """Whether a value made on one line is used on another, and nowhere else, whatever the sizes are.

    So it is where the lines are, or belong to, consecutive statements ``x = self.layer(x)`` of one block, with
    submodules that no method mentions a second time: each overwrites what the one before has made.

    Args:
        module: Whose methods these are.
        first: Where the value is made.
        then: Where it is used.
    """
    if not (first and then) or first[:-1] != then[:-1] or first[-1][0] is not then[-1][0]:
        return False
    code, start, end = *first[-1], then[-1][1]
    try:
        called = _chain(code, start, end)
        mentioned: Counter[str] = Counter()
        for method in _methods(type(module)):
            mentioned += _mentions(method)
    except Exception:  # no source, or one that has changed since
        return False
    places = Counter(id(part) for _, part in module.named_modules(remove_duplicate=False))
    held = [module._modules.get(name) for name in called]
    alone = all(part is not None and all(places[id(inner)] == 1 for inner in part.modules()) for part in held)
    return bool(called) and alone and all(mentioned[name] == 1 for name in called)


@lru_cache(maxsize=256)
def _chain(code: CodeType, start: int, end: int) -> tuple[str, ...]:
    """The submodules called by the statements from one line to another; none where these do anything else."""
    function = parsed(code)
    for block in _blocks(function):
        at = [number for number, part in enumerate(block) if part.lineno <= start <= (part.end_lineno or 0)]
        to = [number for number, part in enumerate(block) if part.lineno <= end <= (part.end_lineno or 0)]
        if len(at) == len(to) == 1 and all(isinstance(block[number], _SIMPLE) for number in (*at, *to)):
            return _calls(block[at[0] : to[0] + 1], function.args.args[0].arg)
    return ()


_SIMPLE = (ast.Assign, ast.Return)


def _blocks(function: ast.FunctionDef) -> Iterator[list[ast.stmt]]:
    for node in ast.walk(function):
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list):
                yield block


def _calls(statements: Iterable[ast.stmt], own: str) -> tuple[str, ...]:
    found: list[str] = []
    variable = ""  # holds what the statement before has made
    for statement in statements:
        if variable == "return":
            return ()
        if isinstance(statement, ast.Return) and statement.value is not None:
            value, target = statement.value, "return"
        elif isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            value, target = statement.value, statement.targets[0].id
            if len(statement.targets) > 1 or (variable and target != variable):
                return ()
        else:
            return ()
        called = []
        while isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
            if not _is_name(value.func.value, own) or len(value.args) != 1 or value.keywords:
                return ()
            called.append(value.func.attr)
            value = value.args[0]
        if not called or not isinstance(value, ast.Name) or (variable and value.id != variable):
            return ()
        found += called
        variable = target
    return tuple(found)


def _methods(cls: type) -> Iterator[CodeType]:
    """Of a class and its bases, but for what builds them, and nn.Module's own."""
    for base in cls.__mro__:
        for name, method in base.__dict__.items() if issubclass(base, nn.Module) and base is not nn.Module else ():
            method = getattr(method, "fget", None) or getattr(method, "__func__", method)
            while method is not None:
                code = getattr(method, "__code__", None)
                if isinstance(code, CodeType) and name != "__init__":
                    yield code
                method = getattr(method, "__wrapped__", None)


@lru_cache(maxsize=1024)
def _mentions(code: CodeType) -> Counter[str]:
    """How often a method names each attribute of its module; one that it hands on itself may use any of them.

    Raises:
        ValueError: If it hands on its module, or sets any of its attributes.
    """
    function = parsed(code)
    given = [*function.args.posonlyargs, *function.args.args]
    own = given[0].arg if given else ""
    parts = [part for part in ast.walk(function) if isinstance(part, ast.Attribute) and _is_name(part.value, own)]
    alone = sum(_is_name(part, own) for part in ast.walk(function)) - len(parts)
    if alone or any(part.attr in _ALL or not isinstance(part.ctx, ast.Load) for part in parts):
        raise ValueError(f"{code.co_qualname} may use any module")
    return Counter(part.attr for part in parts)


_ALL = ("children", "modules", "named_children", "named_modules", "get_submodule", "_modules", "__dict__")


def _is_name(part: ast.AST, name: str) -> bool:
    return isinstance(part, ast.Name) and part.id == name
