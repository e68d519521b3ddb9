"""Random states: put back after what is called twice and is to draw the same numbers."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn

__all__ = ["Chance", "chance_restored", "is_chance"]

_INTERNAL = frozenset(nn.Module().__dict__)


def is_chance(value: Any) -> bool:
    """Whether the object is a random generator of its own."""
    return _is_chance(type(value))  # type: ignore[arg-type]


@cache
def _is_chance(kind: Any) -> bool:
    return issubclass(kind, (random.Random, torch.Generator)) or kind.__module__.startswith("numpy.random")


class Chance:
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
    chance = Chance(model)
    try:
        yield
    finally:
        chance.put_back()
