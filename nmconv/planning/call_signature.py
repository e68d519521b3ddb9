"""What a model was called with when its plan was made: shapes and plain values, no data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Signature", "TensorSpec", "to_signature"]

_PLAIN = (bool, int, float, str, type(None))
_LONGEST = 64  # arguments, extents, parts of a container
_LARGEST = 2**31 - 1  # of an extent
_DEPTH = 8


@dataclass(frozen=True)
class TensorSpec:
    """A tensor among the arguments.

    Attributes:
        shape: Its shape.
        dtype: Name of its dtype, or "" for the one that the model's parameters have.
    """

    shape: tuple[int, ...]
    dtype: str = ""


@dataclass(frozen=True)
class Signature:
    """The arguments of a call: nested tuples, lists and dicts of :class:`TensorSpec`, numbers, text, flags and None.

    Attributes:
        args: Positional ones.
        kwargs: By name.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def to_row(self) -> dict[str, Any]:
        """What stands in a plan's JSON."""
        found: dict[str, Any] = {"args": [_plain(value) for value in self.args]}
        if self.kwargs:
            found["kwargs"] = {name: _plain(value) for name, value in self.kwargs.items()}
        return found

    @classmethod
    def from_row(cls, row: dict[str, Any], where: str) -> Signature:
        """Read what :meth:`to_row` wrote.

        Raises:
            ValueError: If it is something else, or arguments that no model is called with.
        """
        args, kwargs = row.get("args"), row.get("kwargs", {})
        if not row.keys() <= {"args", "kwargs"} or not isinstance(args, list) or not isinstance(kwargs, dict):
            raise ValueError(f"{where} is no list of arguments and dict of keyword arguments")
        _checked([*args, *kwargs.values()], 0, written=True)
        return cls(tuple(map(_read, args)), {name: _read(part) for name, part in kwargs.items()})


def to_signature(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Signature | None:
    """The signature of a call, or None where something else is among its arguments."""
    try:
        _checked([*args, *kwargs.values()], 0)
    except ValueError:
        return None
    return Signature(args, kwargs)


def _checked(value: Any, depth: int, *, written: bool = False) -> None:
    """Refuse arguments that are no plain values or that no model is called with, with ValueError."""
    if written and isinstance(value, dict):
        value = _container(value)
    if isinstance(value, TensorSpec):
        sizes = type(value.shape) is tuple and all(
            type(size) is int and 0 <= size <= _LARGEST for size in value.shape[:_LONGEST]
        )
        if not sizes or len(value.shape) > _LONGEST or type(value.dtype) is not str:
            raise ValueError(f"its call has a tensor of shape {value.shape!r:.40}")
    elif type(value) in (list, tuple, dict):
        if len(value) > _LONGEST or depth > _DEPTH:
            raise ValueError("its call has arguments that are too many or nested too deep")
        if type(value) is dict and any(type(key) is not str for key in value):
            raise ValueError("its call has an argument with keys that are no text")
        for part in value.values() if type(value) is dict else value:
            _checked(part, depth + 1, written=written)
    elif type(value) not in _PLAIN or (type(value) is int and abs(value) > _LARGEST):
        raise ValueError(f"its call has the argument {value!r:.40}")


def _container(value: dict[str, Any]) -> Any:
    """What is written as a dict: a tensor, a tuple or a dict, its parts as they are written."""
    if "shape" in value and value.keys() <= {"shape", "dtype"} and type(value["shape"]) is list:
        return TensorSpec(tuple(value["shape"]), value.get("dtype", ""))
    if value.keys() == {"tuple"} and type(value["tuple"]) is list:
        return tuple(value["tuple"])
    if value.keys() == {"dict"} and type(value["dict"]) is dict:
        return value["dict"]
    raise ValueError("its call has an argument of no known kind")


def _plain(value: Any) -> Any:
    if isinstance(value, TensorSpec):
        return {"shape": list(value.shape), **({"dtype": value.dtype} if value.dtype else {})}
    if isinstance(value, tuple):
        return {"tuple": [_plain(part) for part in value]}
    if isinstance(value, dict):
        return {"dict": {name: _plain(part) for name, part in value.items()}}
    return [_plain(part) for part in value] if isinstance(value, list) else value


def _read(value: Any) -> Any:
    """A value that was checked."""
    found = _container(value) if isinstance(value, dict) else value
    if isinstance(found, dict):
        return {name: _read(part) for name, part in found.items()}
    return type(found)(map(_read, found)) if isinstance(found, (list, tuple)) else found
