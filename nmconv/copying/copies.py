"""Copies of models: with meta twins in the place of tensors, with copies of them, or with the tensors themselves."""

from __future__ import annotations

import copy
import functools
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from nmconv.errors import ModelTypeError

__all__ = [
    "Copy",
    "attribute_names",
    "check_copy",
    "meta_copy",
    "real_copy",
    "shared_on_copy",
    "structure_copy",
]


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


def real_copy(model: nn.Module) -> Copy:
    """The same with copies of the tensors as they are."""
    return _copied(model, _Clones())


def structure_copy(model: nn.Module) -> Copy:
    """The same with the tensors themselves."""
    return _copied(model, _Same())


def shared_on_copy(model: nn.Module) -> list[Any]:
    """Objects that the model's attributes hold and that cannot be copied, such as locks and open files."""
    kept = _tensors_and_modules(model)
    return [value for value in _held_by(model) if _cannot_be_copied(value, kept)]


def attribute_names(model: nn.Module) -> dict[int, str]:
    """From the id of each parameter, buffer and other tensor attribute to its first qualified name."""
    found: dict[int, str] = {}
    for path, module in model.named_modules():
        for name, value in _tensors_of(module):
            found.setdefault(id(value), f"{path}.{name}" if path else name)
    return found


def _tensors_and_modules(model: nn.Module) -> dict[int, Any]:
    return {id(value): value for module in model.modules() for value in (module, *dict(_tensors_of(module)).values())}


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
        self.shared: set[int] = set()  # storages of several tensors, whose copies share one, too
        self._bases: dict[int, Any] = {}

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
        if not _is_strided(value) or _storage(value) not in self.shared:
            return value.detach().clone()
        storage = _storage(value)
        if storage not in self._bases:
            self._bases[storage] = value.untyped_storage().clone()
        made = torch.empty(0, dtype=value.dtype, device=value.device)
        return made.set_(self._bases[storage], value.storage_offset(), value.shape, value.stride())


class _Same(_Clones):
    """Makes no copies."""

    def add(self, value: torch.Tensor) -> torch.Tensor:
        self.memo[id(value)] = self.originals[id(value)] = value
        return value


class _Twins(_Clones):
    """Makes meta twins."""

    def made(self, value: torch.Tensor) -> torch.Tensor:
        if not _is_strided(value):
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


def _is_strided(value: torch.Tensor) -> bool:
    return value.layout == torch.strided and not value.is_quantized


def _copied(model: nn.Module, clones: _Clones) -> Copy:
    tensors = {id(value): value for module in model.modules() for _, value in _tensors_of(module)}
    times = Counter(map(_storage, filter(_is_strided, tensors.values())))
    clones.shared = {storage for storage, count in times.items() if count > 1}
    for value in tensors.values():
        clones.add(value)
    held, kept = list(_held_by(model)), _tensors_and_modules(model)
    for value in held:
        if isinstance(value, torch.Generator):
            clones.memo[id(value)] = value.clone_state()
        elif _cannot_be_copied(value, kept):
            clones.memo[id(value)] = value
    with clones:
        _copy_by_parts(model, clones.memo)
        made = copy.deepcopy(model, clones.memo)
    check_copy(model, made)
    if any(type(value) is FunctionType and value.__closure__ for value in held):
        _rebind(made, clones)
    return Copy(made, clones.originals, attribute_names(model))


_COPYING = ("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__")


def _copy_by_parts(model: nn.Module, memo: dict[int, Any]) -> None:
    """Copy modules part by part, in a fifth of a deep copy's time; a ``__deepcopy__`` of their class is not asked.

    Children come first: a module that copies itself (``fx.GraphModule``) looks into those it has.
    """
    plain = [module for module in model.modules() if _is_copied_plainly(type(module))]
    for module in plain:
        memo[id(module)] = type(module).__new__(type(module))
    for module in reversed(plain):
        space = vars(memo[id(module)])
        for name, value in vars(module).items():
            if type(value) in (bool, int, float, str, type(None)):
                space[name] = value
            elif name in _INTERNAL and type(value) in (dict, OrderedDict) and id(value) not in memo:
                space[name] = memo[id(value)] = type(value)()  # of tensors, modules or hooks; their handles refer to it
                space[name].update((key, copy.deepcopy(part, memo)) for key, part in value.items())
            else:
                space[name] = copy.deepcopy(value, memo)


def _is_copied_plainly(cls: type[nn.Module]) -> bool:
    """Whether the state of the class is that of nn.Module; torch's own fill in what old files lack."""
    methods = [(name, getattr(cls, name, None)) for name in _COPYING]
    return all(
        method is getattr(nn.Module, name, None) or getattr(method, "__module__", None) in _FILL_IN
        for name, method in methods
    )


_FILL_IN = ("torch.nn.modules.conv", "torch.nn.modules.batchnorm")


def check_copy(model: nn.Module, made: nn.Module, spare: Container[int] = ()) -> None:
    """Refuse a copy that is no copy.

    Args:
        model: What was copied.
        made: The copy.
        spare: Ids of modules that it may share with the model.

    Raises:
        ModelTypeError: If it shares others, or has another structure or other numbers.
    """
    text = f"a copy of this {type(model).__name__}"
    hint = "(a __deepcopy__ of its own?): pass inplace=True"
    own = {id(module) for module in model.modules() if id(module) not in spare}
    for name, module in made.named_modules():
        if id(module) in own:
            raise ModelTypeError(f"{text} shares {name or 'the whole'} with it {hint}")
    before, after = (
        [(name, type(part).__module__, type(part).__qualname__) for name, part in each.named_modules()]
        for each in (model, made)
    )
    tensors = [(*each.named_parameters(), *each.named_buffers()) for each in (model, made)]
    pairs = list(zip(before, after, strict=False))
    pairs += [((one[0], "", ""), (other[0], "", "")) for one, other in zip(*tensors, strict=False)]
    if len(before) != len(after) or len(tensors[0]) != len(tensors[1]) or any(one != other for one, other in pairs):
        lost = next((one[0] for one, other in pairs if one != other), "")
        raise ModelTypeError(
            f"{text} has another structure than itself{f', beginning with {lost!r}' if lost else ''} {hint}"
        )
    if any(hasattr(type(module), "__deepcopy__") for module in model.modules()):
        for (name, one), (_, other) in zip(*tensors, strict=True):
            if one.shape != other.shape or not (other.is_meta or torch.equal(_bits(one), _bits(other))):
                raise ModelTypeError(f"{text} has other numbers in {name!r} than itself {hint}")


def _bits(value: torch.Tensor) -> torch.Tensor:
    return value.detach().reshape(-1).contiguous().view(torch.uint8)


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


def _cannot_be_copied(value: Any, kept: dict[int, Any]) -> bool:
    if isinstance(value, _CONTAINERS):
        return False
    if hasattr(type(value), "__deepcopy__"):
        return _raises(lambda: copy.deepcopy(value, dict(kept)), Exception)  # whatever its class raises
    plain = "__reduce_ex__" not in {name for base in type(value).__mro__[:-1] for name in vars(base)}
    if plain and isinstance(getattr(value, "__dict__", None), dict):
        return hasattr(value, "fileno")
    return _raises(lambda: value.__reduce_ex__(4), TypeError)  # what Python says of locks, files and sockets


def _raises(call: Callable[[], object], error: type[Exception]) -> bool:
    try:
        call()
    except error:
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
