"""Dataclasses as what JSON has, and out of that again with every type checked.

A class with ``to_row`` and ``from_row`` says itself how its fields are written.
"""

from __future__ import annotations

import json
import types
from collections.abc import Container
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

__all__ = ["checked", "from_plain", "lines_of", "to_plain"]


def to_plain(value: Any, without: Container[str] | None = None) -> Any:
    """Dataclasses as dicts, without fields that have their defaults; tuples as lists.

    Args:
        value: A dataclass, a tuple or list, or a plain value.
        without: Names of fields to leave out; given by a ``to_row`` that writes the rest as usual.
    """
    if isinstance(value, (tuple, list)):
        return [to_plain(part) for part in value]
    if not is_dataclass(value):
        return value
    if without is None and hasattr(value, "to_row"):
        return value.to_row()
    found = {}
    for field in fields(value):
        part = getattr(value, field.name)
        if field.name not in (without or ()) and (field.default is MISSING or part != field.default):
            found[field.name] = to_plain(part)
    return found


def from_plain(kind: Any, value: Any, where: str = "plan") -> Any:
    """A value of type ``kind``: a dataclass, a tuple, a union, or a plain type.

    Raises:
        TypeError: If something is of another type, missing or unknown; the text says where.
        ValueError: If a ``from_row`` does not take it.
    """
    if is_dataclass(kind):
        return _dataclass(kind, value, where)
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return from_plain(next(part for part in args if part is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise TypeError(f"{where} is no list")
        inner = [args[0]] * len(value) if args[-1] is ... else list(args)
        if len(inner) != len(value):
            raise TypeError(f"{where} has {len(value)} parts, not {len(inner)}")
        return tuple(
            from_plain(part, item, f"{where}[{at}]") for at, (part, item) in enumerate(zip(inner, value, strict=True))
        )
    if type(value) is not kind:
        raise TypeError(f"{where} is {value!r}, no {kind.__name__}")
    return value


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise TypeError(f"{where} is no object with fields")
    if hasattr(kind, "from_row"):
        return kind.from_row(value, where)
    return kind(**checked(kind, value, where))


def checked(kind: Any, value: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of a dataclass, each of its type."""
    hints = get_type_hints(kind)
    names = {field.name for field in fields(kind)}
    needed = {field.name for field in fields(kind) if field.default is MISSING}
    if not needed <= value.keys() <= names:
        raise TypeError(f"{where} has other fields than {', '.join(sorted(names))}")
    return {name: from_plain(hints[name], part, f"{where}.{name}") for name, part in value.items()}


def lines_of(data: dict[str, Any]) -> str:
    """An object as JSON: a line a field, and a line an element of lists of objects."""
    parts = []
    for key, value in data.items():
        rows = isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)
        text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]" if rows else json.dumps(value)
        parts.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}"
