"""Copies that share nothing with the model: for recording, with meta twins in the place of all tensors."""

from __future__ import annotations

import copy
import functools
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from nmconv.errors import ModelTypeError

__all__ = ["Copy", "attribute_names", "meta_copy", "real_copy", "shared_on_copy"]


@dataclass(eq=False)
class Copy:
    """A model's copy.

    Attributes:
        model: The copy.
        originals: From the id of each of the copy's tensors to the tensor of the model that it stands for.
        names: From the ids of the model's own tensors to their names: a copy that meets one reaches outside of itself.
    """

    model: nn.Module
    originals: dict[int, torch.Tensor]
    names: dict[int, str]


def meta_copy(model: nn.Module) -> Copy:
    """A deep copy in which every parameter, buffer and other tensor has a twin on the meta device.

    Closures and hooks are bound to the copy. What cannot be copied (locks, open files) is shared.

    Raises:
        ModelTypeError: If the copy shares modules with the model or has another structure.
    """
    return _copied(model, _Twins())


def real_copy(model: nn.Module) -> nn.Module:
    """The same with copies of the tensors as they are."""
    return _copied(model, _Clones()).model


def shared_on_copy(model: nn.Module) -> list[Any]:
    """Objects that the model's attributes hold and that cannot be copied, such as locks and open files."""
    return [value for value in _held_by(model) if _cannot_be_copied(value)]


def attribute_names(model: nn.Module) -> dict[int, str]:
    """From the id of each parameter, buffer and other tensor attribute to its first qualified name."""
    found: dict[int, str] = {}
    for path, module in model.named_modules():
        for name, value in _tensors_of(module):
            found.setdefault(id(value), f"{path}.{name}" if path else name)
    return found


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for space in (module._parameters, module._buffers, vars(module)):
        for name, value in space.items():
            if isinstance(value, torch.Tensor):
                yield name, value


class _Clones(TorchFunctionMode):
    """Makes copies of tensors that a deep copy meets anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.memo: dict[int, Any] = {}
        self.originals: dict[int, torch.Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__deepcopy__:
            return self.add(args[0])
        return func(*args, **(kwargs or {}))

    def add(self, value: torch.Tensor) -> torch.Tensor:
        """The tensor's copy."""
        if id(value) not in self.memo:
            with torch.no_grad():
                made = self.made(value)
            if isinstance(value, nn.Parameter):
                made = nn.Parameter(made, requires_grad=value.requires_grad)
                made.__dict__.update(vars(value))
            else:
                made.requires_grad_(value.requires_grad)
            self.memo[id(value)] = made
            self.originals[id(made)] = value
        found: torch.Tensor = self.memo[id(value)]
        return found

    def made(self, value: torch.Tensor) -> torch.Tensor:
        """A new tensor for one."""
        return value.detach().clone()


class _Twins(_Clones):
    """Makes meta twins; tensors that share memory have twins that do."""

    def __init__(self) -> None:
        super().__init__()
        self._bases: dict[int, torch.Tensor] = {}
        self.shared: set[int] = set()  # storages of several tensors

    def made(self, value: torch.Tensor) -> torch.Tensor:
        if value.layout != torch.strided or value.is_quantized:
            return value.detach().to("meta")
        storage = _storage(value)
        if storage not in self.shared:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        if storage not in self._bases:
            size = value.untyped_storage().nbytes() // value.element_size()
            self._bases[storage] = torch.empty(size, dtype=value.dtype, device="meta")
        return self._bases[storage].view(value.dtype).as_strided(value.shape, value.stride(), value.storage_offset())


def _storage(value: torch.Tensor) -> int:
    return value.untyped_storage()._cdata


def _copied(model: nn.Module, clones: _Clones) -> Copy:
    tensors = {id(value): value for module in model.modules() for _, value in _tensors_of(module)}
    if isinstance(clones, _Twins):
        strided = [value for value in tensors.values() if value.layout == torch.strided and not value.is_quantized]
        times = Counter(map(_storage, strided))
        clones.shared = {storage for storage, count in times.items() if count > 1}
    for value in tensors.values():
        clones.add(value)
    held = list(_held_by(model))
    for value in held:
        if isinstance(value, torch.Generator):
            clones.memo[id(value)] = value.clone_state()
        elif _cannot_be_copied(value):
            clones.memo[id(value)] = value
    chance = torch.get_rng_state()
    with clones:
        _copy_by_parts(model, clones.memo)
        made = copy.deepcopy(model, clones.memo)
    try:
        _check(model, made, clones)
    except ModelTypeError:
        torch.set_rng_state(chance)  # a __deepcopy__ that builds a model draws weights for it
        raise
    if any(type(value) is FunctionType and value.__closure__ for value in held):
        _rebind(made, clones)
    return Copy(made, clones.originals, attribute_names(model))


_COPYING = ("__deepcopy__", "__copy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__")


def _copy_by_parts(model: nn.Module, memo: dict[int, Any]) -> None:
    """What a deep copy does for modules of classes that have no say in it, in a fifth of the time."""
    plain = [module for module in model.modules() if _is_copied_plainly(type(module))]
    for module in plain:
        memo[id(module)] = type(module).__new__(type(module))
    for module in plain:
        space = vars(memo[id(module)])
        for name, value in vars(module).items():
            if type(value) in (bool, int, float, str, type(None)):
                space[name] = value
            elif name in _INTERNAL and type(value) in (dict, OrderedDict):  # of tensors, modules or hooks
                space[name] = type(value)((key, copy.deepcopy(part, memo)) for key, part in value.items())
            else:
                space[name] = copy.deepcopy(value, memo)


def _is_copied_plainly(cls: type[nn.Module]) -> bool:
    """Whether the class is copied as nn.Module is; torch's own fill in what old files lack."""
    methods = [(name, getattr(cls, name, None)) for name in _COPYING]
    return all(
        method is getattr(nn.Module, name, None) or getattr(method, "__module__", None) in _FILL_IN
        for name, method in methods
    )


_FILL_IN = ("torch.nn.modules.conv", "torch.nn.modules.batchnorm")


def _check(model: nn.Module, made: nn.Module, clones: _Clones) -> None:
    own = {id(module): name for name, module in model.named_modules()}
    for name, module in made.named_modules():
        if id(module) in own:
            raise ModelTypeError(
                f"a copy of this {type(model).__name__} shares {name or 'the whole'} with it (a __deepcopy__ of its "
                "own?), so that it cannot be changed or checked on a copy: give a class whose copies share nothing"
            )
    before, after = ([(name, _class_of(module)) for name, module in each.named_modules()] for each in (model, made))
    lost = next((one[0] for one, other in zip(before, after, strict=False) if one != other), None)
    names = [[name for name, _ in each.state_dict(keep_vars=True).items()] for each in (model, made)]
    if lost is None:
        lost = next((name for name, value in made.named_parameters() if id(value) not in clones.originals), None)
    if len(before) != len(after) or lost is not None or names[0] != names[1]:
        raise ModelTypeError(
            f"a copy of this {type(model).__name__} has another structure than itself"
            f"{f', beginning with {lost!r}' if lost else ''} (a __deepcopy__ of its own?): give a class whose copies "
            "are alike"
        )


def _class_of(module: nn.Module) -> tuple[str, str]:
    """The class by name: one that was rewritten may be made anew for a copy."""
    return type(module).__module__, type(module).__qualname__


# -- what a model holds -----------------------------------------------------------------------------------------------

_ATOMS = frozenset(
    (bool, int, float, complex, str, bytes, type(None), type, ModuleType, CodeType, BuiltinFunctionType, torch.Tensor,
     nn.Parameter, torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format)
)  # fmt: skip
_CONTAINERS = (dict, list, tuple, set, frozenset, deque, FunctionType, MethodType, functools.partial)
_INTERNAL = frozenset(nn.Module().__dict__) - {"_forward_hooks", "_forward_pre_hooks"}


def _is_atom(value: Any) -> bool:
    """Whether there is nothing in it to look into, tensors and modules included."""
    return type(value) in _ATOMS or isinstance(value, (torch.Tensor, nn.Module, type))


def _parts(value: Any) -> Iterable[Any]:
    """What an object holds, as far as a deep copy goes into it."""
    if isinstance(value, dict):
        return (*dict.keys(value), *dict.values(value))
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return tuple(value)
    if isinstance(value, functools.partial):
        return (value.func, value.args, value.keywords, vars(value))
    if isinstance(value, MethodType):
        return (value.__self__, value.__func__)
    if isinstance(value, FunctionType):
        return tuple(cell.cell_contents for cell in value.__closure__ or () if _is_full(cell))
    held = getattr(value, "__dict__", None)
    return tuple(held.values()) if isinstance(held, dict) else ()


def _is_full(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _held_by(model: nn.Module) -> Iterator[Any]:
    """All objects that the modules' attributes hold, however deep; tensors and modules are not looked into."""
    seen: set[int] = set()
    todo: list[Any] = [
        value
        for module in model.modules()
        for name, value in vars(module).items()
        if name not in _INTERNAL and type(value) not in _ATOMS
    ]
    while todo:
        value = todo.pop()
        if type(value) in _ATOMS or id(value) in seen or _is_atom(value):
            continue
        seen.add(id(value))
        yield value
        todo += _parts(value)


def _cannot_be_copied(value: Any) -> bool:
    if isinstance(value, _CONTAINERS) or hasattr(type(value), "__deepcopy__"):
        return False
    plain = "__reduce_ex__" not in {name for base in type(value).__mro__[:-1] for name in vars(base)}
    if plain and isinstance(getattr(value, "__dict__", None), dict):
        return hasattr(value, "fileno")
    try:
        value.__reduce_ex__(4)
    except TypeError:  # what Python says of locks, files, generators and sockets
        return True
    return False


# -- closures ---------------------------------------------------------------------------------------------------------


def _rebind(made: nn.Module, clones: _Clones) -> None:
    """Give functions that the copy holds new closures, over copies of what theirs are over."""
    binding = _Rebinding(clones)
    for module in made.modules():
        for key, value in list(vars(module).items()):
            vars(module)[key] = binding.bound(value)


class _Rebinding:
    """Replaces functions by functions over the copy, in place in the containers that hold them."""

    def __init__(self, clones: _Clones) -> None:
        self._clones = clones
        self._done: dict[int, Any] = {}
        self._kept: list[Any] = []

    def bound(self, value: Any) -> Any:
        if _is_atom(value):
            return value
        if id(value) in self._done:
            return self._done[id(value)]
        self._done[id(value)] = value
        self._kept.append(value)
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, dict):
            for key, part in list(dict.items(value)):
                dict.__setitem__(value, key, self.bound(part))
        elif isinstance(value, list):
            value[:] = map(self.bound, value)
        elif type(value) is tuple:
            parts = tuple(map(self.bound, value))
            if any(one is not other for one, other in zip(parts, value, strict=True)):
                self._done[id(value)] = parts
                return parts
        elif isinstance(value, functools.partial):
            made = functools.partial(self.bound(value.func), *value.args, **value.keywords)
            self._done[id(value)] = made
            return made
        elif isinstance(getattr(value, "__dict__", None), dict) and not isinstance(value, MethodType):
            for key, part in list(vars(value).items()):
                vars(value)[key] = self.bound(part)
        return self._done[id(value)]

    def _function(self, function: FunctionType) -> FunctionType:
        cells = function.__closure__ or ()
        if not any(_is_full(cell) and _may_reach(cell.cell_contents) for cell in cells):
            return function
        closure = tuple(CellType() for _ in cells)
        made = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, closure)
        made.__kwdefaults__ = function.__kwdefaults__
        made.__dict__.update(vars(function))
        self._done[id(function)] = made
        for cell, own in zip(cells, closure, strict=True):
            if _is_full(cell):
                with self._clones:
                    held = copy.deepcopy(cell.cell_contents, self._clones.memo)
                own.cell_contents = self.bound(held)
        return made


def _may_reach(value: Any, depth: int = 3) -> bool:
    """Whether modules, tensors or containers that could be written to are to be reached from the value."""
    if isinstance(value, (torch.Tensor, nn.Module, list, dict, set, deque)):
        return True
    if _is_atom(value) or not depth:
        return False
    return any(_may_reach(part, depth - 1) for part in _parts(value))
