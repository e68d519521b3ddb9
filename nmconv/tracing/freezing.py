"""What a trace freezes: attributes that a method reads off its module, tensors' values, classes of results."""

from __future__ import annotations

import dis
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from types import CodeType
from typing import Any

import torch
from torch import nn
from torch.fx import Proxy
from torch.overrides import TorchFunctionMode

from nmconv.errors import RewriteError
from nmconv.recording import draws_randomness, enclosed

__all__ = ["NoFrozenTensors", "check_returned", "frozen_attributes"]


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
        if any(map(draws_randomness, outside)):
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
                if draws_randomness(holder):
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


_VALUES = (
    *("item", "tolist", "numpy", "__array__", "__len__", "__contains__"),
    *("__bool__", "__int__", "__float__", "__index__"),
)
_READS = {getattr(torch.Tensor, name) for name in _VALUES if hasattr(torch.Tensor, name)} | {
    *(getattr(torch.Tensor, name).__get__ for name in ("dtype", "device")),
    torch.is_nonzero,
    torch.equal,
    torch.allclose,
}
_CHANCE = {getattr(torch, name) for name in ("rand", "randn", "randint", "randperm", "normal", "bernoulli")}


class NoFrozenTensors(TorchFunctionMode):
    """While a method is traced, no number may come out of a real tensor: it would be a constant ever after."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let every call through but those that read a value, a dtype or a device off a real tensor."""
        if func in _CHANCE:
            raise RewriteError("it draws random numbers that tracing would freeze")
        if func in _READS and not any(isinstance(value, Proxy) for value in args):
            name = getattr(getattr(func, "__self__", func), "__name__", str(func))
            raise RewriteError(
                f"it reads {name} off a tensor that is no input, which would be frozen (a random number or another)"
            )
        return func(*args, **(kwargs or {}))


def check_returned(value: Any) -> None:
    """Refuse containers that fx would rebuild as plain ones.

    Raises:
        RewriteError: For a subclass of list, tuple or dict that is no named tuple.
    """
    if isinstance(value, Proxy) or value is None:
        return
    if isinstance(value, (list, tuple, dict)):
        named = isinstance(value, tuple) and hasattr(value, "_fields")
        if type(value) not in (list, tuple, dict, torch.Size) and not named:
            raise RewriteError(f"it returns a {type(value).__name__}, which would become a plain one")
        for part in value.values() if isinstance(value, dict) else value:
            check_returned(part)
    elif is_dataclass(value):
        for field in fields(value):
            check_returned(getattr(value, field.name))
