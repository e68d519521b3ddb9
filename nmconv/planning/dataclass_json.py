"""Convert dataclasses to plain JSON data and back, with the type of every value checked.

A dataclass with methods ``to_row`` and ``from_row`` defines its own form.
"""

from __future__ import annotations

import json
import types
from collections.abc import Container
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

__all__ = ["checked", "from_plain", "lines_of", "to_plain"]


def to_plain(value: Any, without: Container[str] | None = None) -> Any:
    """Return a dataclass as a dict of the fields that differ from their defaults, and a tuple as a list.

    Args:
        value: A dataclass, a tuple or list, or a plain value.
        without: Names of fields to omit; a ``to_row`` passes it to convert the other fields as usual.
    """
    if isinstance(value, (tuple, list)):
        return [to_plain(part) for part in value]
    if not is_dataclass(value):
        return value
    if without is None and hasattr(value, "to_row"):
        return value.to_row()
    row = {}
    for field in fields(value):
        part = getattr(value, field.name)
        if field.name not in (without or ()) and (field.default is MISSING or part != field.default):
            row[field.name] = to_plain(part)
    return row


def from_plain(kind: Any, value: Any, where: str = "plan") -> Any:
    """Return the value of type ``kind`` that JSON data stands for.

    Args:
        kind: A dataclass, a tuple type, a union with None, or a plain type.
        value: The JSON data.
        where: What the data is, for error messages.

    Raises:
        TypeError: If a part is of another type, missing or unknown; the message says where.
        ValueError: If a ``from_row`` rejects its row.
    """
    if is_dataclass(kind):
        return _dataclass(kind, value, where)
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return from_plain(next(part for part in args if part is not type(None)), value, where)
    if origin is tuple:
        return _tuple(args, value, where)
    if type(value) is not kind:
        raise TypeError(f"{where} is {value!r}, not a {kind.__name__}")
    return value


def _tuple(kinds: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise TypeError(f"{where} is not a list")
    kinds = (kinds[0],) * len(value) if kinds[-1] is ... else kinds
    if len(kinds) != len(value):
        raise TypeError(f"{where} has {len(value)} parts, not {len(kinds)}")
    return tuple(
        from_plain(kind, part, f"{where}[{index}]") for index, (kind, part) in enumerate(zip(kinds, value, strict=True))
    )


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise TypeError(f"{where} is not an object with fields")
    if hasattr(kind, "from_row"):
        return kind.from_row(value, where)
    return kind(**checked(kind, value, where))


def checked(kind: Any, row: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the fields of a dataclass, each converted to its type.

    Raises:
        TypeError: If a field is missing, unknown or of another type.
    """
    hints = get_type_hints(kind)
    names = {field.name for field in fields(kind)}
    required = {field.name for field in fields(kind) if field.default is MISSING}
    if not required <= row.keys() <= names:
        raise TypeError(f"{where} has missing or unknown fields: its fields are {', '.join(sorted(names))}")
    return {name: from_plain(hints[name], value, f"{where}.{name}") for name, value in row.items()}


def lines_of(data: dict[str, Any]) -> str:
    """Return an object as JSON with one line for each field, and one for each element of a list of objects."""
    lines = []
    for key, value in data.items():
        is_table = isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)
        text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]" if is_table else json.dumps(value)
        lines.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}"
