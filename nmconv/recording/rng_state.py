"""States of random number generators: seeded, compared and restored."""

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

__all__ = ["RngState", "is_rng", "rng_restored", "rng_seeded"]

_Accessors = tuple[Callable[[], Any], Callable[[Any], Any]]  # the getter and the setter of a generator's state
_MODULE_INTERNALS = frozenset(nn.Module().__dict__)
_seeding = threading.RLock()


def is_rng(value: Any) -> bool:
    """Return whether an object is a random number generator."""
    return _is_generator_type(type(value))  # type: ignore[arg-type]


@cache
def _is_generator_type(cls: Any) -> bool:
    return issubclass(cls, (random.Random, torch.Generator)) or cls.__module__.startswith("numpy.random")


class RngState:
    """The RNG states that a forward could draw from: the global ones and those of generators among attributes."""

    def __init__(self, model: nn.Module) -> None:
        self._accessors = [
            *_python_and_numpy(),
            (torch.get_rng_state, torch.set_rng_state),
            *_devices(),
            *_held_generators(model),
        ]
        self._initial = _get_states(self._accessors)

    def changed(self) -> bool:
        """Return whether anything has been drawn since."""
        return not all(map(_are_equal, self._initial, _get_states(self._accessors)))

    def restore(self) -> None:
        """Restore the initial states."""
        _set_states(self._accessors, self._initial)


@contextmanager
def rng_restored(model: nn.Module) -> Iterator[None]:
    """Restore RNG states on exit, so that a second call draws the same numbers."""
    state = RngState(model)
    try:
        yield
    finally:
        state.restore()


@contextmanager
def rng_seeded() -> Iterator[None]:
    """Seed Python's and numpy's global generators, and restore them on exit; meta tensors do not draw from torch's.

    The generators belong to all threads, so only one recording at a time may use them.
    """
    with _seeding:
        accessors = list(_python_and_numpy())
        before = _get_states(accessors)
        random.seed(0)
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            numpy.random.seed(0)
        try:
            yield
        finally:
            _set_states(accessors, before)


def _get_states(accessors: list[_Accessors]) -> list[Any]:
    return [get_state() for get_state, _ in accessors]


def _set_states(accessors: list[_Accessors], states: list[Any]) -> None:
    for (_, set_state), state in zip(accessors, states, strict=True):
        set_state(state)


def _python_and_numpy() -> Iterator[_Accessors]:
    """Yield the accessors of Python's and numpy's global generators."""
    yield random.getstate, random.setstate
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        yield numpy.random.get_state, numpy.random.set_state


def _devices() -> Iterator[_Accessors]:
    for device in (torch.cuda, torch.xpu):
        if device.is_initialized():
            yield device.get_rng_state_all, device.set_rng_state_all


def _held_generators(model: nn.Module) -> Iterator[_Accessors]:
    """Yield the accessors of generators that modules hold."""
    for module in model.modules():
        for key, value in module.__dict__.items():
            if key in _MODULE_INTERNALS or not is_rng(value):
                continue
            if isinstance(value, random.Random):
                yield value.getstate, value.setstate
            elif hasattr(value, "bit_generator"):  # a numpy.random.Generator
                yield _bit_generator_accessors(value.bit_generator)
            elif hasattr(value, "get_state"):
                yield value.get_state, value.set_state


def _bit_generator_accessors(bit_generator: Any) -> _Accessors:
    return lambda: bit_generator.state, lambda state: setattr(bit_generator, "state", state)


def _are_equal(one: Any, other: Any) -> bool:
    """Return whether two states, which may contain arrays and tensors, are equal."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, list):
        return all(map(_are_equal, one, other))
    if isinstance(one, tuple):
        return one == other if type(one[-1]) is int else all(map(_are_equal, one, other))
    if isinstance(one, dict):
        return all(_are_equal(value, other[key]) for key, value in one.items())
    return bool((one == other).all()) if hasattr(one, "all") else bool(one == other)
