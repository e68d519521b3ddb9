"""Dataclasses out of what JSON gives, with every type checked."""

from __future__ import annotations

import types
from dataclasses import fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

__all__ = ["from_plain"]


def from_plain(kind: Any, value: Any, where: str = "plan") -> Any:
    """A value of type ``kind``: a dataclass, a tuple, a union, or a plain type.

    Raises:
        TypeError: If something is of another type, missing or unknown; the text says where.
    """
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        names = {field.name for field in fields(kind)}
        if not isinstance(value, dict) or value.keys() != names:
            raise TypeError(f"{where} has other fields than {', '.join(sorted(names))}")
        return kind(**{name: from_plain(hints[name], value[name], f"{where}.{name}") for name in names})  # type: ignore[operator]
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
