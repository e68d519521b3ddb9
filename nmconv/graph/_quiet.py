"""Tracing without a trace: the model's attributes, its mode and the random state stay as they were found."""

from __future__ import annotations

import operator
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn

__all__ = [
    "AsFound",
    "chance_restored",
    "in_mode",
    "is_chance",
    "left_as_found",
    "mode_hidden",
]

_Snapshot = list[tuple[Any, Any, str]]  # a container, what it held, and where it is


_modes: list[tuple[bool, set[int]]] = []  # innermost last


def _read(module: nn.Module) -> bool:
    if not _modes:
        return bool(module.__dict__["training"] if "training" in module.__dict__ else module.__getattr__("training"))
    training, seen = _modes[-1]
    seen.add(id(module))
    return training


def _write(module: nn.Module, value: bool) -> None:
    module.__dict__["training"] = value


@contextmanager
def mode_hidden() -> Iterator[None]:
    """Let modules' ``training`` be read through a property, so that :func:`in_mode` can answer.

    A property on nn.Module wins over the instances' own entries. (torch.fx patches the same class while it traces.)
    Changing that class is slow; around many traces this does it once.
    """
    if "training" in nn.Module.__dict__:
        yield
        return
    nn.Module.training = property(_read, _write)  # type: ignore[assignment]
    try:
        yield
    finally:
        del nn.Module.training


@contextmanager
def in_mode(training: bool, seen: set[int]) -> Iterator[None]:
    """Make every module read ``training`` as given, without setting it, and note the ids of those that read it."""
    with mode_hidden():
        _modes.append((training, seen))
        try:
            yield
        finally:
            _modes.pop()


# What nn.Module keeps for itself and no forward touches, and what holds nothing that could change.
_INTERNAL = frozenset(key for key in nn.Module().__dict__ if key not in ("_parameters", "_buffers", "_modules"))
_ATOMS = frozenset((bool, int, float, str, bytes, type(None), torch.Tensor, nn.Parameter, torch.dtype, torch.device))


def _snapshot(model: nn.Module) -> _Snapshot:
    """Everything that attributes of the model's modules hold: dicts, lists, sets, queues and plain objects in them."""
    found: _Snapshot = []
    seen: set[int] = set()
    for module in model.modules():
        where = f"{type(module).__name__}."
        space = module.__dict__
        found.append((space, dict(space), where))
        for key, value in space.items():
            if key in ("_parameters", "_buffers", "_modules"):
                found.append((value, dict(value), where))
            elif key not in _INTERNAL and not _holds_nothing(value):
                _note(value, where, found, seen, 3)
    return found


def _holds_nothing(value: Any) -> bool:
    kind = type(value)
    return kind in _ATOMS or (kind is tuple and all(type(part) in _ATOMS for part in value))


def _note(value: Any, where: str, found: _Snapshot, seen: set[int], depth: int) -> None:
    if type(value) in _ATOMS or id(value) in seen or isinstance(value, (type, torch.Tensor, nn.Module)):
        return
    if isinstance(value, (dict, list, set, deque)):
        seen.add(id(value))
        # by the base class's own methods: subclasses may forbid, or do something else
        held: Any = dict(dict.items(value)) if isinstance(value, dict) else list(_parts(value))
        found.append((value, held, where))
    elif isinstance(getattr(value, "__dict__", None), dict) and type(value).__module__ != "builtins":
        _note(vars(value), where, found, seen, depth)
        return
    elif not isinstance(value, tuple):
        return
    if depth:
        for part in dict.values(value) if isinstance(value, dict) else _parts(value):
            _note(part, where, found, seen, depth - 1)


def _parts(value: Any) -> Iterator[Any]:
    base: Any = next(kind for kind in (list, set, deque, tuple) if isinstance(value, kind))
    return iter(base.__iter__(value))


def _changed(before: _Snapshot) -> list[str]:
    """``Class.attribute`` for everything that does not hold the very objects it held."""
    changed = []
    for value, held, where in before:
        if not _same(value, held):
            names = (
                [key for key in {**held, **value} if held.get(key, held) is not value.get(key, held)]
                if (isinstance(held, dict))
                else [""]
            )
            changed += [f"{where}{name}" for name in names]
    return changed


def _same(now: Any, before: Any) -> bool:
    """Whether a container still holds the same objects (never compares the objects: they may be tensors)."""
    if isinstance(before, dict):
        if (  # nearly always, and all of it in C
            len(now) == len(before)
            and all(map(operator.is_, dict.values(now), before.values()))
            and all(map(operator.is_, dict.keys(now), before))
        ):
            return True
        items = dict.items(now)
        return len(items) == len(before) and all(key in before and before[key] is value for key, value in items)
    parts = list(_parts(now))
    if isinstance(now, set):
        return {id(part) for part in parts} == {id(part) for part in before}
    return len(parts) == len(before) and all(one is other for one, other in zip(parts, before, strict=True))


def _restore(before: _Snapshot) -> None:
    for value, held, _ in before:
        if _same(value, held):
            continue
        if isinstance(value, dict):
            kind: Any = OrderedDict if isinstance(value, OrderedDict) else dict
            kind.clear(value)
            kind.update(value, held)
            continue
        base: Any = next(kind for kind in (list, set, deque) if isinstance(value, kind))
        base.clear(value)
        (base.update if base is set else base.extend)(value, held)


def is_chance(value: Any) -> bool:
    """Whether the object is a random generator of its own."""
    return _is_chance(type(value))  # type: ignore[arg-type]


@cache
def _is_chance(kind: Any) -> bool:
    return issubclass(kind, (random.Random, torch.Generator)) or kind.__module__.startswith("numpy.random")


class _Chance:
    """The random states that a forward could draw from: the global ones and those of generators among attributes."""

    def __init__(self, model: nn.Module) -> None:
        self._own = [
            value
            for module in model.modules()
            for key, value in module.__dict__.items()
            if _is_chance(type(value)) and key not in _INTERNAL  # type: ignore[arg-type]
        ]
        self._numpy = sys.modules.get("numpy")
        self._devices = [kind for kind in (torch.cuda, torch.xpu) if kind.is_initialized()]
        self._before = self._now()

    def _now(self) -> list[Any]:
        states: list[Any] = [random.getstate(), torch.get_rng_state()]
        states.append(None if self._numpy is None else self._numpy.random.get_state())
        states.append([kind.get_rng_state_all() for kind in self._devices])
        for value in self._own:
            if isinstance(value, random.Random):
                states.append(value.getstate())
            elif isinstance(value, torch.Generator):
                states.append(value.get_state())
            else:
                states.append(_numpy_state(value))
        return states

    def moved(self) -> bool:
        """Whether anything was drawn."""
        return not all(map(_alike, self._before, self._now()))

    def put_back(self) -> None:
        """As it was at first."""
        random.setstate(self._before[0])
        torch.set_rng_state(self._before[1])
        if self._numpy is not None:
            self._numpy.random.set_state(self._before[2])
        for kind, state in zip(self._devices, self._before[3], strict=True):
            kind.set_rng_state_all(state)
        for value, state in zip(self._own, self._before[4:], strict=True):
            if isinstance(value, random.Random):
                value.setstate(state)
            elif isinstance(value, torch.Generator):
                value.set_state(state)
            elif hasattr(value, "bit_generator"):
                value.bit_generator.state = state
            elif hasattr(value, "set_state"):
                value.set_state(state)


def _numpy_state(value: Any) -> Any:
    if hasattr(value, "bit_generator"):
        return value.bit_generator.state
    return value.get_state() if hasattr(value, "get_state") else None


def _alike(one: Any, other: Any) -> bool:
    """Equality of states, in which there may be arrays and tensors."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, list):
        return all(map(_alike, one, other))
    if isinstance(one, tuple):
        return one == other if type(one[-1]) is int else all(map(_alike, one, other))
    if isinstance(one, dict):
        return all(_alike(value, other[key]) for key, value in one.items())
    return bool((one == other).all()) if hasattr(one, "all") else bool(one == other)


@contextmanager
def chance_restored(model: nn.Module) -> Iterator[None]:
    """Put random states back on the way out, so that what is called twice draws the same numbers."""
    chance = _Chance(model)
    try:
        yield
    finally:
        chance.put_back()


class AsFound:
    """What a model's attributes held and where its random generators stood."""

    def __init__(self, model: nn.Module) -> None:
        self._attributes = _snapshot(model)
        self._chance = _Chance(model)

    def changed(self) -> list[str]:
        """``Class.attribute`` for everything that does not hold the very objects it held."""
        return _changed(self._attributes)

    def drew(self) -> bool:
        """Whether anything was drawn from a random generator."""
        return self._chance.moved()

    def put_back(self) -> None:
        """All of it as it was."""
        try:
            self._chance.put_back()
        finally:
            _restore(self._attributes)


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[AsFound]:
    """Put attributes (caches that tracing fills with proxies, counters) and random states back on the way out."""
    found = AsFound(model)
    try:
        yield found
    finally:
        found.put_back()
