"""Attributes whose values a trace freezes: numbers, flags and the like that a method reads off its module."""

from __future__ import annotations

import dis
from collections.abc import Iterator
from types import CodeType
from typing import Any

from torch import nn

__all__ = ["frozen_attributes"]

_SCALARS = (bool, int, float, str, type(None))


def frozen_attributes(module: nn.Module, method: str) -> dict[str, Any]:
    """From ``name`` or ``child.name`` to its value, for what the method's code (and that of methods it names) reads.

    More may be listed than is read; ``training`` never is, since rewritten methods ask for it anew.
    """
    found: dict[str, Any] = {}
    done: set[CodeType] = set()
    todo = [_code(module, method)]
    while todo:
        code = todo.pop()
        if code is None or code in done:
            continue
        done.add(code)
        todo += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        for chain in _chains(code):
            todo.append(_code(module, chain[0]))
            holder: Any = module
            for depth, name in enumerate(chain):
                holder = getattr(holder, "_modules", {}).get(name) or getattr(holder, "__dict__", {}).get(name, _chains)
                if holder is _chains:
                    break
                if _is_scalar(holder) and name != "training":
                    found[".".join(chain[: depth + 1])] = holder
    return found


def _is_scalar(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_scalar, value))
    return type(value) in _SCALARS


def _code(module: nn.Module, name: str) -> CodeType | None:
    function = getattr(type(module), name, None)
    return getattr(getattr(function, "__wrapped__", function), "__code__", None)


def _chains(code: CodeType) -> Iterator[tuple[str, ...]]:
    """Every ``self.a.b.c`` in the code, as names; ``self`` is whatever the first parameter is called."""
    names: list[str] = []
    own = {*code.co_varnames[:1], *code.co_freevars}
    at_self = False
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD") and at_self:
            names.append(str(step.argval))
            continue
        if names:
            yield tuple(names)
        names = []
        at_self = step.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) and step.argval in own
    if names:
        yield tuple(names)
