"""Tracing without a trace: the model's attributes, its mode and the random state stay as they were found."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["changed_attributes", "drew_random_numbers", "in_mode", "left_as_found", "mode_hidden", "snapshot"]

_Snapshot = list[tuple[nn.Module, dict[str, Any], dict[str, Any]]]


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


def snapshot(model: nn.Module) -> _Snapshot:
    """Every module's attributes, and a shallow copy of those that are containers."""
    return [
        (
            module,
            dict(module.__dict__),
            {
                key: value.copy()
                for key, value in module.__dict__.items()
                if isinstance(value, (dict, list, set)) and value
            },
        )
        for module in model.modules()
    ]


def changed_attributes(before: _Snapshot) -> list[str]:
    """``Class.attribute`` for every attribute that is not the same object as it was, or not the same container."""
    changed = []
    for module, attributes, containers in before:
        now = module.__dict__
        names = [name for name in now if name not in attributes or now[name] is not attributes[name]]
        names += [name for name in attributes if name not in now]
        names += [name for name, value in containers.items() if not _same(now.get(name), value)]
        names += [
            name
            for name, value in now.items()
            if isinstance(value, (dict, list, set)) and value and name in attributes and name not in containers
        ]
        changed += [f"{type(module).__name__}.{name}" for name in dict.fromkeys(names)]
    return changed


def _same(now: Any, before: Any) -> bool:
    """Whether a container still holds the same objects (never compares the objects: they may be tensors)."""
    if type(now) is not type(before) or len(now) != len(before):
        return False
    if isinstance(before, dict):
        return all(key in now and now[key] is value for key, value in before.items())
    if isinstance(before, set):
        return {id(value) for value in now} == {id(value) for value in before}
    return all(one is other for one, other in zip(now, before, strict=True))


def _restore(before: _Snapshot) -> None:
    for module, attributes, containers in before:
        now = module.__dict__
        if len(now) != len(attributes) or any(now.get(name) is not value for name, value in attributes.items()):
            now.clear()
            now.update(attributes)
        for name, value in list(now.items()):
            if isinstance(value, (dict, list, set)) and not _same(value, containers.get(name, type(value)())):
                held = containers.get(name, type(value)())
                value.clear()
                value.extend(held) if isinstance(value, list) else value.update(held)


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Put attributes (caches that tracing fills with proxies, counters) and random states back on the way out."""
    before = snapshot(model)
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        torch.set_rng_state(torch_state)
        _restore(before)


@contextmanager
def drew_random_numbers() -> Iterator[list[bool]]:
    """A list that on the way out holds whether Python's or torch's random state has moved."""
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    answer: list[bool] = []
    yield answer
    answer.append(random.getstate() != python_state or not torch.equal(torch.get_rng_state(), torch_state))
