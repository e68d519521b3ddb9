"""What a module's forward may come to, by its source: its methods, and the submodules that they name."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from nmconv.graph._syntax import NoSource, parsed, unwrapped

__all__ = ["ForwardMethod", "ForwardSource", "source_of"]

_ALL = frozenset(("_modules", "__getattribute__", *vars(nn.Module))) - {"forward"}  # what may reach any part
_PLAIN = (staticmethod, classmethod, bool, int, float, str, tuple, type)  # of a class: they know of no module of it


@dataclass(frozen=True)
class ForwardMethod:
    """One method; ``own`` is what it calls its module."""

    function: ast.FunctionDef
    own: str

    @property
    def parts(self) -> list[Any]:
        """All of its syntax."""
        return list(ast.walk(self.function))

    def is_own(self, part: Any, *names: str) -> bool:
        """Whether it is ``self.name``; of any name where none is given."""
        own = isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id == self.own
        return own and (not names or part.attr in names)

    def attributes(self) -> tuple[list[str], list[str]]:
        """Names it has ``self.name`` of, and ``super().name``.

        Raises:
            NoSource: If it hands its module on as a whole.
        """
        own = [part.attr for part in self.parts if self.is_own(part)]
        inherited = [part for part in self.parts if isinstance(part, ast.Attribute) and _is_super(part.value)]
        asking = {id(inner) for part in inherited for inner in ast.walk(part.value)}
        named = [part for part in self.parts if isinstance(part, ast.Name) and part.id == self.own]
        if sum(id(part) not in asking for part in named) != len(own):
            raise NoSource(f"{self.function.name} hands its module on")
        return own, [part.attr for part in inherited]

    def blocks(self) -> Iterator[list[ast.stmt]]:
        """Lists of statements of which all run once the first does: not those of ``try`` and ``with``."""
        todo = [self.function.body]
        while todo:
            block = todo.pop()
            yield block
            for part in block:
                if isinstance(part, (ast.If, ast.For, ast.While)):
                    todo += [part.body, part.orelse]


@dataclass(frozen=True)
class ForwardSource:
    """All methods that a forward may come to, and how often they name each attribute of their module."""

    methods: tuple[ForwardMethod, ...]
    names: Counter[str]


def source_of(module: nn.Module) -> ForwardSource | None:
    """Of a module's class; None without source, or where a method may use any attribute or hands its module on."""
    cls: Any = type(module)
    return _source_of(_methods(cls)) if cls.__getattr__ is nn.Module.__getattr__ else None


_Methods = tuple[tuple[str, "tuple[CodeType, ...] | None"], ...]  # None: something else than a function


def _methods(cls: type[nn.Module]) -> _Methods:
    """What a class and its bases have at this time, by name."""
    bases = [base for base in cls.__mro__ if base not in (object, nn.Module)]
    held = [(name, value) for base in bases for name, value in vars(base).items()]
    return tuple((name, _codes(value)) for name, value in held if value is not None and not isinstance(value, _PLAIN))


@lru_cache(maxsize=1024)
def _source_of(methods: _Methods) -> ForwardSource | None:
    try:
        return _read(methods)
    except NoSource:
        return None


def _read(held: _Methods) -> ForwardSource:
    names: Counter[str] = Counter()
    methods: list[ForwardMethod] = []
    todo, seen = ["forward"], set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for codes in [codes for other, codes in held if other == name]:
            if codes is None:
                raise NoSource(f"{name} is no function")
            for code in codes:
                function = parsed(code)
                given = [*function.args.posonlyargs, *function.args.args]
                method = ForwardMethod(function, given[0].arg if given else "")
                found, inherited = method.attributes()
                if not _ALL.isdisjoint(found):
                    raise NoSource(f"{name} may use any attribute")
                names.update(found)
                todo += [*found, *inherited]
                methods.append(method)
    return ForwardSource(tuple(methods), names)


def _codes(held: Any) -> tuple[CodeType, ...] | None:
    """Of a method or a property, and of what is inside its decorators; None if it is something else."""
    methods = list(unwrapped(held.fget if isinstance(held, property) else held))
    if not all(isinstance(method, FunctionType) for method in methods):
        return None
    return tuple(method.__code__ for method in methods)


def _is_super(part: ast.AST) -> bool:
    return isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and part.func.id == "super"
