"""Arguments under their old names, and options under their old words: accepted for a while, with a warning."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["renamed_arguments", "warn_of_word"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def renamed_arguments(**names: str) -> Callable[[_Function], _Function]:
    """Let a function take keyword arguments under their old names, too.

    Args:
        names: From the old names to those of today.

    Returns:
        A decorator. What it returns warns with a DeprecationWarning for each old name that a call uses.

    Raises:
        TypeError: If a call gives an argument under both names.
    """

    def decorate(function: _Function) -> _Function:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for old in [name for name in kwargs if name in names]:
                new, value = names[old], kwargs.pop(old)
                if new in kwargs:
                    raise TypeError(f"{function.__name__}() got {old!r} and {new!r}: {old!r} is the old name, drop it")
                text = f"{function.__name__}(): the argument {old!r} is called {new!r} now"
                warnings.warn(text, DeprecationWarning, stacklevel=2)
                kwargs[new] = value
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


def warn_of_word(option: str, old: str, new: str, stacklevel: int) -> None:
    """Warn that an option was given by its old word.

    Args:
        option: Its name.
        old: The word that was given.
        new: The word of today.
        stacklevel: How many calls above this one the user's own is.
    """
    warnings.warn(f"{option}={old!r} is called {new!r} now", DeprecationWarning, stacklevel=stacklevel + 1)
