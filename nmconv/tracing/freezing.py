"""What a trace freezes: attributes read from the module, tensors' values, classes of returned containers."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from types import CodeType
from typing import Any

import torch
from torch import nn
from torch.fx import Proxy
from torch.overrides import TorchFunctionMode

from nmconv.copying import closure_contents
from nmconv.errors import RewriteError
from nmconv.recording import is_rng

__all__ = ["NoFrozenTensors", "check_returned", "frozen_attributes"]

_SCALARS = (bool, int, float, str, type(None))
_DRAWS = "it draws random numbers that tracing would freeze"
# Names and bytecode instructions that need what a proxy cannot give, each with the reason for refusing the method.
_REFUSED = {
    "__class__": "it reads the class of an argument",
    "is_grad_enabled": "it queries the gradient mode",
    "is_inference_mode_enabled": "it queries the gradient mode",
    "is_autocast_enabled": "it queries autocast",
    "set_grad_enabled": "it enters a context",
}
_REFUSED_INSTRUCTIONS = {
    "MATCH_CLASS": "it reads the class of an argument",
    "BEFORE_WITH": "it enters a context",
    "SETUP_WITH": "it enters a context",
    "LOAD_SPECIAL": "it enters a context",
    "CHECK_EXC_MATCH": "it catches exceptions",
    "JUMP_IF_NOT_EXC_MATCH": "it catches exceptions",
}
_VALUE_METHODS = (
    *("item", "tolist", "numpy", "__array__", "__len__", "__contains__"),
    *("__bool__", "__int__", "__float__", "__index__"),
)
_VALUE_READS = {getattr(torch.Tensor, name) for name in _VALUE_METHODS if hasattr(torch.Tensor, name)} | {
    *(getattr(torch.Tensor, name).__get__ for name in ("dtype", "device")),
    torch.is_nonzero,
    torch.equal,
    torch.allclose,
}
_RANDOM = {getattr(torch, name) for name in ("rand", "randn", "randint", "randperm", "normal", "bernoulli")}
_MISSING = object()


def frozen_attributes(module: nn.Module, method: str) -> dict[str, Any]:
    """Return the attribute values that a trace of a method freezes.

    They are found in the bytecode of the method, of the methods it calls and of the functions it names. The result may
    list more than is read. Numbers of an instance are not in it: a trace reads them anew, or reports that
    it did not. Neither is ``training``, since rewritten methods read it anew.

    Returns:
        From ``self.name``, ``self.child.name`` or ``len(self.list)`` to the value.

    Raises:
        RewriteError: If the code asks for what proxies cannot give, or draws random numbers.
    """
    frozen: dict[str, Any] = {}
    done: set[CodeType] = set()
    function = getattr(type(module), method, None)
    todo = [_code(module, method)]
    while todo:
        code = todo.pop()
        if code is None or code in done:
            continue
        done.add(code)
        _check_instructions(code)
        todo += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        namespace = getattr(function, "__globals__", {})
        named = [namespace[name] for name in code.co_names if name in namespace] + closure_contents(function)
        if any(map(is_rng, named)):
            raise RewriteError(_DRAWS)
        todo += [getattr(value, "__code__", None) for value in named]
        for chain in (*_attribute_chains(code), *_names_for_getattr(code)):
            todo.append(_code(module, chain[0]))
            frozen.update(_frozen_in_chain(module, chain))
    return frozen


def _check_instructions(code: CodeType) -> None:
    for name in [*code.co_names, *(instruction.opname for instruction in dis.get_instructions(code))]:
        reason = _REFUSED.get(name) or _REFUSED_INSTRUCTIONS.get(name)
        if reason:
            raise RewriteError(f"{reason}, which tracing would freeze")


def _frozen_in_chain(module: nn.Module, chain: tuple[str, ...]) -> dict[str, Any]:
    """Return the values that reading ``self.a.b.c`` freezes."""
    frozen: dict[str, Any] = {}
    value: Any = module
    for depth, name in enumerate(chain, 1):
        owner, value = value, _attribute(value, name)
        if value is _MISSING:
            break
        if is_rng(value):
            raise RewriteError(_DRAWS)
        expression = f"self.{'.'.join(chain[:depth])}"
        read_anew = isinstance(owner, nn.Module) and type(value) in (int, float) and name in vars(owner)
        if _is_scalar(value) and name != "training" and not read_anew:
            frozen[expression] = value
        if isinstance(value, (nn.ModuleList, nn.ModuleDict)):
            frozen[f"len({expression})"] = len(value)
    return frozen


def _attribute(owner: Any, name: str) -> Any:
    """Return the child, attribute, class constant, field, or absent (None) tensor of that name; else ``_MISSING``."""
    for space in ("_modules", "_parameters", "_buffers"):
        entries = getattr(owner, space, {})
        if name in entries and (space == "_modules" or entries[name] is None):
            return entries[name]
    if isinstance(owner, tuple):
        return getattr(owner, name) if name in getattr(owner, "_fields", ()) else _MISSING
    if name in getattr(owner, "__dict__", {}):
        return vars(owner)[name]
    default = inspect.getattr_static(type(owner), name, _MISSING)
    return default if _is_scalar(default) else _MISSING


def _is_scalar(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_scalar, value))
    return type(value) in _SCALARS or isinstance(value, Enum)


def _code(module: nn.Module, name: str) -> CodeType | None:
    method = getattr(type(module), name, None)
    return getattr(method.fget if isinstance(method, property) else method, "__code__", None)


def _names_for_getattr(code: CodeType) -> Iterator[tuple[str]]:
    """Yield the strings that code may give to ``getattr``."""
    if "getattr" in code.co_names:
        yield from ((constant,) for constant in code.co_consts if isinstance(constant, str) and constant.isidentifier())


def _attribute_chains(code: CodeType) -> Iterator[tuple[str, ...]]:
    """Yield the names of every ``self.a.b.c`` in the code; ``self`` is the first parameter or any closure variable."""
    names: list[str] = []
    bases = {*code.co_varnames[:1], *code.co_freevars}
    in_chain = False
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and in_chain:
            names.append(str(instruction.argval))
            continue
        if names:
            yield tuple(names)
        names = []
        in_chain = instruction.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) and instruction.argval in bases
    if names:
        yield tuple(names)


class NoFrozenTensors(TorchFunctionMode):
    """Forbids reading numbers from real tensors while a method is traced, since the trace would freeze them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let every call through except those that read a value, dtype or device from a real tensor."""
        if func in _RANDOM:
            raise RewriteError(_DRAWS)
        if func in _VALUE_READS and not any(isinstance(value, Proxy) for value in args):
            name = getattr(getattr(func, "__self__", func), "__name__", str(func))
            raise RewriteError(
                f"it reads {name} from a tensor that is not an input, and tracing would freeze the value"
            )
        return func(*args, **(kwargs or {}))


def check_returned(value: Any) -> None:
    """Raise RewriteError if fx would not rebuild the returned containers with their own classes.

    It does so for lists, tuples, dicts and named tuples, and not for other subclasses of these.
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
