"""Whether a forward that goes by sizes comes from one of its calls to another at any size: by its source."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from types import FunctionType
from typing import Any

from torch import nn

from nmconv.graph._forwards import ForwardMethod, ForwardSource, source_of
from nmconv.graph._modules import leaf_op
from nmconv.graph._syntax import conditions

__all__ = ["goes_straight", "reaches_into"]

_LISTS = (nn.ModuleList, nn.ModuleDict)
_SIMPLE = (ast.Assign, ast.Return)
_HARMLESS = frozenset(("torch", "nn", "F", "isinstance", "hasattr", "len", "range", "enumerate", "zip", "reversed"))


def goes_straight(module: nn.Module, first: str, then: str, places: Mapping[int, int]) -> bool:
    """Whether what one submodule makes goes to another, and to nobody else, whatever the sizes are.

    So it is where the forward has ``self.then(self.first(...))``, or one after the other ``x = self.first(...)`` and
    ``x = self.then(x)``, each overwriting what was there; with others of the kind between, and names that are nowhere
    else in what the forward may come to. A part that goes by anything but parts of its own may have been told of sizes.

    Args:
        module: Whose forward this is.
        first: Name of the submodule that makes the value.
        then: Of the one that takes it.
        places: From ids of modules to how often they are registered in what was traced.
    """
    source = source_of(module)
    if source is None or any(source.names[name] != 1 for name in (first, then)):
        return False
    if any(callable(module.__dict__.get(name)) for name in source.names):  # a function of its own may use any part
        return False
    held = [module._modules.get(name) for name in _way(source, first, then)]
    inside = [inner for part in held if part is not None for inner in part.modules()]
    return bool(held) and None not in held and all(places[id(part)] == 1 and _goes_by_parts(part) for part in inside)


def reaches_into(module: nn.Module, label: str) -> bool:
    """Whether a forward may use what is inside a submodule other than by calling that.

    Args:
        module: Whose forward this is.
        label: Of the submodule, relative to it.
    """
    source = source_of(module)
    slot = label.partition(".")[0]
    return source is None or any(_reaches(method, module, slot) for method in source.methods)


def _reaches(method: ForwardMethod, module: nn.Module, slot: str) -> bool:
    child = module._modules.get(slot)
    for part in method.parts:
        inner, held = getattr(part, "value", None), [child]
        if isinstance(inner, ast.Subscript) and isinstance(child, _LISTS):
            inner, held = inner.value, list(child.children())
        if not method.is_own(inner, slot):
            continue
        for one in (one for one in held if not isinstance(one, _LISTS)):
            if isinstance(part, ast.Subscript) or (isinstance(part, ast.Attribute) and _is_inside(one, part.attr)):
                return True
    return False


def _is_inside(module: nn.Module | None, name: str) -> bool:
    """Whether it is a part of a module, or a method, which may use any."""
    if module is None or name in module._modules:
        return True
    return callable(inspect.getattr_static(type(module), name, None))


def _way(source: ForwardSource, first: str, then: str) -> list[str]:
    """What is called from one submodule's only call to another's, both included; nothing where more may happen."""
    for method in source.methods:
        calls = [part for part in method.parts if isinstance(part, ast.Call)]
        one, two = (next((call for call in calls if method.is_own(call.func, name)), None) for name in (first, then))
        for block in method.blocks() if one and two else ():
            at, to = _places(block, one), _places(block, two)
            if at and to:
                return _nest(method, two, one) if at == to else _steps(method, block[at[0] : to[0] + 1], one, two)
    return []


def _places(block: list[ast.stmt], call: Any) -> list[int]:
    """Where in a block it is, in a statement that holds no others."""
    return [at for at, part in enumerate(block) if isinstance(part, _SIMPLE) and call in set(ast.walk(part))]


def _nest(method: ForwardMethod, value: Any, inmost: ast.AST | str | None) -> list[str]:
    """Names in ``self.c(self.b(self.a(x)))``, down to a call or a variable; none if it is anything else."""
    names = []
    while not (isinstance(value, ast.Name) and value.id == inmost):
        if not isinstance(value, ast.Call) or not method.is_own(value.func) or len(value.args) != 1 or value.keywords:
            return []
        assert isinstance(value.func, ast.Attribute)
        names.append(value.func.attr)
        if value is inmost:
            break
        value = value.args[0]
    return names


def _steps(method: ForwardMethod, block: list[ast.stmt], one: Any, two: Any) -> list[str]:
    """Names in statements that all write to one variable; after the first, each reads only that, and once."""
    names: list[str] = []
    variable = ""
    for part in block:
        last = part is block[-1]
        found = _nest(method, two if last else getattr(part, "value", None), variable or one)
        target = _target(part)
        ends = last and isinstance(part, ast.Return)
        if not found or not (ends or target) or target not in (variable or target, None):
            return []
        if variable and _reads(part, variable) != 1:
            return []
        names += found
        variable = variable or str(target)
    return names


def _target(part: ast.stmt) -> str | None:
    """The one variable that a statement writes to."""
    targets = part.targets if isinstance(part, ast.Assign) else []
    return targets[0].id if len(targets) == 1 and isinstance(targets[0], ast.Name) else None


def _reads(part: ast.AST, variable: str) -> int:
    found = [inner for inner in ast.walk(part) if isinstance(inner, ast.Name) and inner.id == variable]
    return sum(isinstance(inner.ctx, ast.Load) for inner in found)


def _goes_by_parts(module: nn.Module) -> bool:
    """Whether a module's forward has no conditions but on what it is given and what parts it has."""
    if leaf_op(module) is not None or type(module).__module__.startswith("torch.nn."):
        return True
    source = source_of(module)
    return source is not None and all(_is_structural(module, method) for method in source.methods)


def _is_structural(module: nn.Module, method: ForwardMethod) -> bool:
    given = method.function.args
    known = {part.arg for part in (*given.posonlyargs, *given.args, *given.kwonlyargs)} | _HARMLESS
    asked: list[Any] = [test for _, test in conditions(method.function)]
    for part in method.parts:
        if isinstance(part, ast.comprehension):
            asked += [part.iter, *part.ifs]
        elif isinstance(part, (ast.BoolOp, ast.Assert)):
            asked += part.values if isinstance(part, ast.BoolOp) else [part.test]
        if isinstance(part, (ast.For, ast.comprehension)):
            known |= {inner.id for inner in ast.walk(part.target) if isinstance(inner, ast.Name)}
    inside: list[Any] = [part for whole in asked for part in ast.walk(whole)]
    names = {part.id for part in inside if isinstance(part, ast.Name)}
    return names <= known and all(_is_part(module, part.attr) for part in inside if method.is_own(part))


def _is_part(module: nn.Module, name: str) -> bool:
    """Whether it is a submodule, nothing or a method, and not what somebody may have written there."""
    if name == "training" or name in module._modules:
        return True
    held = module.__dict__.get(name, inspect.getattr_static(type(module), name, None))
    return held is None or isinstance(held, FunctionType)
