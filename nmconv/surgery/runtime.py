"""Functions that the source of rewritten methods calls, besides those of torch."""

from __future__ import annotations

from typing import Any

import torch

from nmconv.errors import RewriteError

__all__ = ["check", "check_tensor", "iadd", "imul", "isub", "itruediv"]


def check(value: Any, expected: Any, method: str, name: str) -> None:
    """Raise RewriteError unless a value is the one that the method was traced with."""
    if not _is_same(value, expected):
        raise RewriteError(
            f"{method} was rewritten by nmconv for {name}={expected!r} and finds {value!r}: convert the original model "
            "anew, with this value set or passed in example_inputs"
        )


def _is_same(value: Any, expected: Any) -> bool:
    if value is expected:
        return True
    if type(value) is not type(expected) or isinstance(value, torch.Tensor):
        return False
    if isinstance(value, tuple):
        return len(value) == len(expected) and all(map(_is_same, value, expected))
    both_nan = isinstance(value, float) and value != value and expected != expected
    return both_nan or bool(value == expected)


def check_tensor(value: Any, method: str, name: str) -> None:
    """Raise RewriteError if an argument that was a tensor when the method was traced is plain data now."""
    if value is None or isinstance(value, (bool, int, float, str, list, tuple, dict)):
        raise RewriteError(
            f"{method} was rewritten by nmconv for a tensor as {name} and is given {value!r}: convert the original "
            "model with example_inputs that pass this value"
        )


def iadd(value: Any, other: Any) -> Any:
    """Return ``value`` after ``value += other``."""
    value += other
    return value


def isub(value: Any, other: Any) -> Any:
    """Return ``value`` after ``value -= other``."""
    value -= other
    return value


def imul(value: Any, other: Any) -> Any:
    """Return ``value`` after ``value *= other``."""
    value *= other
    return value


def itruediv(value: Any, other: Any) -> Any:
    """Return ``value`` after ``value /= other``."""
    value /= other
    return value
