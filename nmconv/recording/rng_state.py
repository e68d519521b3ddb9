"""Random states: seeded, looked at, and put back."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn

__all__ = ["RngState", "draws_randomness", "rng_restored", "rng_seeded"]

_Source = tuple[Callable[[], Any], Callable[[Any], Any]]  # what reads a state, and what puts it back
_INTERNAL = frozenset(nn.Module().__dict__)
_seeding = threading.RLock()


def draws_randomness(value: Any) -> bool:
    """Whether the object is a random generator of its own."""
    return _is_chance(type(value))  # type: ignore[arg-type]


@cache
def _is_chance(kind: Any) -> bool:
    return issubclass(kind, (random.Random, torch.Generator)) or kind.__module__.startswith("numpy.random")


class RngState:
    """The random states that a forward could draw from: the global ones and those of generators among attributes."""

    def __init__(self, model: nn.Module) -> None:
        self._sources = [*_interpreters(), (torch.get_rng_state, torch.set_rng_state), *_devices(), *_own(model)]
        self._before = _states(self._sources)

    def moved(self) -> bool:
        """Whether anything was drawn."""
        return not all(map(_alike, self._before, _states(self._sources)))

    def put_back(self) -> None:
        """As it was at first."""
        _put_back(self._sources, self._before)


@contextmanager
def rng_restored(model: nn.Module) -> Iterator[None]:
    """Put random states back on the way out, so that what is called twice draws the same numbers."""
    chance = RngState(model)
    try:
        yield
    finally:
        chance.put_back()


@contextmanager
def rng_seeded() -> Iterator[None]:
    """Seed Python's and numpy's generators, and put them back; on the meta device nothing draws from torch's.

    They are all threads': one recording at a time has them.
    """
    with _seeding:
        sources = list(_interpreters())
        before = _states(sources)
        random.seed(0)
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            numpy.random.seed(0)
        try:
            yield
        finally:
            _put_back(sources, before)


def _states(sources: list[_Source]) -> list[Any]:
    return [read() for read, _ in sources]


def _put_back(sources: list[_Source], states: list[Any]) -> None:
    for (_, put_back), state in zip(sources, states, strict=True):
        put_back(state)


def _interpreters() -> Iterator[_Source]:
    """Python's and numpy's global generators."""
    yield random.getstate, random.setstate
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        yield numpy.random.get_state, numpy.random.set_state


def _devices() -> Iterator[_Source]:
    for kind in (torch.cuda, torch.xpu):
        if kind.is_initialized():
            yield kind.get_rng_state_all, kind.set_rng_state_all


def _own(model: nn.Module) -> Iterator[_Source]:
    """Generators that modules hold."""
    for module in model.modules():
        for key, value in module.__dict__.items():
            if key in _INTERNAL or not draws_randomness(value):
                continue
            if isinstance(value, random.Random):
                yield value.getstate, value.setstate
            elif hasattr(value, "bit_generator"):  # numpy's new kind
                yield _bits_of(value)
            elif hasattr(value, "get_state"):
                yield value.get_state, value.set_state


def _bits_of(generator: Any) -> _Source:
    bits = generator.bit_generator
    return lambda: bits.state, lambda state: setattr(bits, "state", state)


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
