"""Attributes whose values a trace freezes: numbers, flags and the like that a method reads off its module."""

from __future__ import annotations

import dis
from collections.abc import Iterator
from enum import Enum
from types import CodeType
from typing import Any

from torch import nn

from nmconv.errors import RewriteError
from nmconv.recording import enclosed, is_chance

__all__ = ["frozen_attributes"]

_SCALARS = (bool, int, float, str, type(None))
# Ways to ask what an object is that no proxy can answer, and sources of chance that no state shows.
_REFUSED = {
    "__class__": "it asks for the class of what it was given",
    "is_grad_enabled": "it asks whether gradients are wanted",
    "is_inference_mode_enabled": "it asks whether gradients are wanted",
    "is_autocast_enabled": "it asks for autocast",
    "set_grad_enabled": "it enters a context",
}
_REFUSED_STEPS = {
    "MATCH_CLASS": "it asks for the class of what it was given",
    "BEFORE_WITH": "it enters a context",
    "SETUP_WITH": "it enters a context",
    "LOAD_SPECIAL": "it enters a context",
    "CHECK_EXC_MATCH": "it catches exceptions",
    "JUMP_IF_NOT_EXC_MATCH": "it catches exceptions",
}


def frozen_attributes(module: nn.Module, method: str) -> dict[str, Any]:
    """From ``self.name``, ``self.child.name`` or ``len(self.list)`` to the value that the method's code finds there.

    Numbers are not among them: a trace reads them anew, or says that it did not.

    Methods that it names are looked into as well.

    More may be listed than is read; ``training`` never is, since rewritten methods ask for it anew. Functions that the
    code names are looked into for what cannot be traced.

    Raises:
        RewriteError: If the code asks for classes in a way that proxies cannot answer, or draws random numbers.
    """
    found: dict[str, Any] = {}
    done: set[CodeType] = set()
    todo = [_code(module, method)]
    while todo:
        code = todo.pop()
        if code is None or code in done:
            continue
        done.add(code)
        for name in [*code.co_names, *(step.opname for step in dis.get_instructions(code))]:
            reason = _REFUSED.get(name) or _REFUSED_STEPS.get(name)
            if reason:
                raise RewriteError(f"{reason}, which tracing would freeze")
        todo += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        function = getattr(type(module), method, None)
        space = getattr(function, "__globals__", {})
        outside = [space[name] for name in code.co_names if name in space]
        outside += list(enclosed(function))
        if any(map(is_chance, outside)):
            raise RewriteError("it draws random numbers that tracing would freeze")
        todo += [getattr(value, "__code__", None) for value in outside]
        for chain in _chains(code):
            todo.append(_code(module, chain[0]))
            holder: Any = module
            for depth, name in enumerate(chain):
                read_anew = isinstance(holder, nn.Module)
                holder = _held(holder, name)
                read_anew &= type(holder) in (int, float)
                if holder is _chains:
                    break
                if is_chance(holder):
                    raise RewriteError("it draws random numbers that tracing would freeze")
                if _is_scalar(holder) and name != "training" and not read_anew:
                    found[f"self.{'.'.join(chain[: depth + 1])}"] = holder
                if isinstance(holder, (nn.ModuleList, nn.ModuleDict)):
                    found[f"len(self.{'.'.join(chain[: depth + 1])})"] = len(holder)
    return found


def _held(holder: Any, name: str) -> Any:
    """The child, attribute, field, or missing parameter or buffer of that name; ``_chains`` if there is none."""
    for kept in ("_modules", "_parameters", "_buffers"):
        among = getattr(holder, kept, {})
        if name in among and (kept == "_modules" or among[name] is None):
            return among[name]
    if isinstance(holder, tuple):
        return getattr(holder, name) if name in getattr(holder, "_fields", ()) else _chains
    return getattr(holder, "__dict__", {}).get(name, _chains)


def _is_scalar(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_scalar, value))
    return type(value) in _SCALARS or isinstance(value, Enum)


def _code(module: nn.Module, name: str) -> CodeType | None:
    return getattr(getattr(type(module), name, None), "__code__", None)


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
