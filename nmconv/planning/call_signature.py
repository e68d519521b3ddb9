"""The call signature that a plan was made for: tensor shapes and plain values, without data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Signature", "TensorSpec", "to_signature"]

_PLAIN_TYPES = (bool, int, float, str, type(None))
_MAX_LENGTH = 64  # of argument lists, shapes and containers
_MAX_INTEGER = 2**31 - 1
_MAX_DEPTH = 8


@dataclass(frozen=True)
class TensorSpec:
    """A tensor among the arguments.

    Attributes:
        shape: Its shape.
        dtype: Name of its dtype, or "" for the dtype of the model's parameters.
    """

    shape: tuple[int, ...]
    dtype: str = ""


@dataclass(frozen=True)
class Signature:
    """The arguments of a call: nested tuples, lists and dicts of :class:`TensorSpec`, numbers, text, flags and None.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def to_row(self) -> dict[str, Any]:
        """Return the signature as it is written in a plan's JSON."""
        row: dict[str, Any] = {"args": [_to_json(value) for value in self.args]}
        if self.kwargs:
            row["kwargs"] = {name: _to_json(value) for name, value in self.kwargs.items()}
        return row

    @classmethod
    def from_row(cls, row: dict[str, Any], where: str) -> Signature:
        """Read a row that :meth:`to_row` returned.

        Raises:
            ValueError: If it is something else, or an argument is invalid.
        """
        args, kwargs = row.get("args"), row.get("kwargs", {})
        if not row.keys() <= {"args", "kwargs"} or not isinstance(args, list) or not isinstance(kwargs, dict):
            raise ValueError(f"{where} is not a list of arguments and a dict of keyword arguments")
        _check([*args, *kwargs.values()], is_json=True)
        return cls(tuple(map(_from_json, args)), {name: _from_json(value) for name, value in kwargs.items()})


def to_signature(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Signature | None:
    """Return the signature of a call, or None if an argument is neither plain nor a :class:`TensorSpec`."""
    try:
        _check([*args, *kwargs.values()])
    except ValueError:
        return None
    return Signature(args, kwargs)


def _check(value: Any, depth: int = 0, *, is_json: bool = False) -> None:
    """Raise ValueError if an argument, or a part of it, is not plain, too long, too large or nested too deep."""
    if is_json and isinstance(value, dict):
        value = _untagged(value)
    if isinstance(value, TensorSpec):
        has_valid_shape = type(value.shape) is tuple and all(
            type(size) is int and 0 <= size <= _MAX_INTEGER for size in value.shape[:_MAX_LENGTH]
        )
        if not has_valid_shape or len(value.shape) > _MAX_LENGTH or type(value.dtype) is not str:
            raise ValueError(f"its call has a tensor of shape {value.shape!r:.40}")
    elif type(value) in (list, tuple, dict):
        if len(value) > _MAX_LENGTH or depth > _MAX_DEPTH:
            raise ValueError("its call has arguments that are too many or nested too deep")
        if type(value) is dict and any(type(key) is not str for key in value):
            raise ValueError("its call has an argument with keys that are not text")
        for part in value.values() if type(value) is dict else value:
            _check(part, depth + 1, is_json=is_json)
    elif type(value) not in _PLAIN_TYPES or (type(value) is int and abs(value) > _MAX_INTEGER):
        raise ValueError(f"its call has the argument {value!r:.40}")


def _to_json(value: Any) -> Any:
    """Return a value as JSON data; tensors, tuples and dicts become tagged objects."""
    if isinstance(value, TensorSpec):
        return {"shape": list(value.shape), **({"dtype": value.dtype} if value.dtype else {})}
    if isinstance(value, tuple):
        return {"tuple": [_to_json(part) for part in value]}
    if isinstance(value, dict):
        return {"dict": {name: _to_json(part) for name, part in value.items()}}
    return [_to_json(part) for part in value] if isinstance(value, list) else value


def _from_json(value: Any) -> Any:
    """Return the value that :func:`_to_json` was given; the JSON data must have been checked."""
    value = _untagged(value) if isinstance(value, dict) else value
    if isinstance(value, dict):
        return {name: _from_json(part) for name, part in value.items()}
    return type(value)(map(_from_json, value)) if isinstance(value, (list, tuple)) else value


def _untagged(row: dict[str, Any]) -> Any:
    """Return the tensor, tuple or dict that a tagged object stands for, with parts that are still JSON data."""
    if "shape" in row and row.keys() <= {"shape", "dtype"} and type(row["shape"]) is list:
        return TensorSpec(tuple(row["shape"]), row.get("dtype", ""))
    if row.keys() == {"tuple"} and type(row["tuple"]) is list:
        return tuple(row["tuple"])
    if row.keys() == {"dict"} and type(row["dict"]) is dict:
        return row["dict"]
    raise ValueError("its call has an argument of no known kind")
