"""Deprecated names of arguments and values: still accepted, with a DeprecationWarning."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from nmconv.errors import warn_user

__all__ = ["current_value", "renamed_arguments"]

_Function = TypeVar("_Function", bound=Callable[..., Any])
_Value = TypeVar("_Value")


def renamed_arguments(**names: str) -> Callable[[_Function], _Function]:
    """Let a function accept keyword arguments under their old names.

    Args:
        names: Maps each old name to the current one.

    Returns:
        A decorator. The decorated function emits a DeprecationWarning for each old name in a call.

    Raises:
        TypeError: If a call passes an argument under both names.
    """

    def decorate(function: _Function) -> _Function:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for old in [name for name in kwargs if name in names]:
                new, value = names[old], kwargs.pop(old)
                if new in kwargs:
                    raise TypeError(f"{function.__name__}() got {old!r} and {new!r}: {old!r} is the old name, drop it")
                text = f"{function.__name__}(): the argument {old!r} is called {new!r} now"
                warn_user(text, DeprecationWarning)
                kwargs[new] = value
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


def current_value(argument: str, value: _Value, old_names: Mapping[str, str]) -> _Value | str:
    """Return the current name of an argument's value; emit a DeprecationWarning if the given name is an old one."""
    if isinstance(value, str) and value in old_names:
        warn_user(f"{argument}={value!r} is called {old_names[value]!r} now", DeprecationWarning)
        return old_names[value]
    return value
