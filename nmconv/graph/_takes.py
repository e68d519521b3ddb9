"""The structure of a method's arguments as text, so that a plan can say how a method must be traced."""

from __future__ import annotations

import json
import keyword
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Proxy

from nmconv.errors import RewriteError
from nmconv.graph._records import Arguments, UnknownTensor

__all__ = ["arguments_from", "takes_of"]

_TENSOR = "T"


def takes_of(calls: Iterable[Arguments]) -> str:
    """JSON of the arguments that all ``calls`` of a method have in common, "" if there is no such thing."""
    try:
        seen = {json.dumps([_encode(list(call.args))[1:], _encode_kwargs(call.kwargs)]) for call in calls}
    except TypeError:
        return ""
    return seen.pop() if len(seen) == 1 else ""


def _encode_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: _encode(value) for key, value in sorted(kwargs.items())}


def _encode(value: Any) -> Any:
    if isinstance(value, (Proxy, torch.Tensor)):
        return _TENSOR
    if value is None or type(value) in (bool, int, float):
        return value
    if type(value) in (list, tuple):
        return [type(value).__name__, *map(_encode, value)]
    if type(value) is str:
        return ["str", value]
    if type(value) is torch.Size:
        return ["tuple", *value]
    raise TypeError(f"an argument of type {type(value).__name__}")


def arguments_from(text: str) -> Arguments:
    """The arguments that :func:`takes_of` put into words, with unknown tensors.

    Raises:
        RewriteError: If the text says nothing, or nothing that can be read.
    """
    if not text:
        raise RewriteError(
            "it is called with arguments that differ from call to call or are no tensors or numbers, or a child of it "
            "returns something else than one tensor"
        )
    try:
        args, kwargs = json.loads(text)
        found = Arguments(tuple(map(_decode, args)), {key: _decode(value) for key, value in kwargs.items()})
    except (TypeError, ValueError, AttributeError, LookupError, RecursionError) as error:
        raise RewriteError(f"what the plan says of its arguments cannot be read ({text[:80]})") from error
    if not all(name.isidentifier() and not keyword.iskeyword(name) for name in kwargs):  # they become source
        raise RewriteError(f"it is called with keywords that are no names: {', '.join(map(repr, kwargs))}")
    return found


def _decode(value: Any) -> Any:
    if value == _TENSOR:
        return UnknownTensor()
    if isinstance(value, list):
        if value[0] == "str":
            return value[1]
        parts = map(_decode, value[1:])
        return tuple(parts) if value[0] == "tuple" else list(parts)
    return value
