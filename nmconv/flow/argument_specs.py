"""The structure of a method's arguments as text, so that a plan can say how a method is called."""

from __future__ import annotations

import json
import keyword
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from nmconv.errors import RewriteError
from nmconv.flow.arguments import Arguments, UnknownNumber, UnknownTensor
from nmconv.flow.flow_graph import Flow, ModuleCall
from nmconv.recording import Spec

__all__ = ["arguments_from", "takes_by_forward", "takes_of"]

_TENSOR = "T"
_NUMBER = "N"


def takes_of(calls: Iterable[ModuleCall | Arguments]) -> str:
    """JSON of the arguments that all ``calls`` of a method have in common, "" if there is no such thing.

    Numbers may differ: those that do have no value.
    """
    try:
        seen = [[_encode(list(call.args))[1:], _encode_kwargs(call.kwargs)] for call in calls]
        common = seen[0]
        for other in seen[1:]:
            common = _common(common, other)
    except (TypeError, IndexError):
        return ""
    return json.dumps(common)


def takes_by_forward(flows: Sequence[Flow], owners: Iterable[str]) -> dict[str, str]:
    """For each of some modules, by qualified name, :func:`takes_of` all calls of its forward."""
    odd = frozenset[str]().union(*(flow.odd for flow in flows))
    frames = [frame for flow in flows for frame in flow.frames]
    return {
        owner: "" if owner in odd else takes_of(frame for frame in frames if frame.path == owner)
        for owner in dict.fromkeys(owners)
    }


def _common(one: Any, other: Any) -> Any:
    """What two encoded calls have in common.

    Raises:
        TypeError: If they differ in more than numbers.
    """
    if type(one) is type(other) is list and len(one) == len(other):
        return [_common(mine, its) for mine, its in zip(one, other, strict=True)]
    if type(one) is type(other) is dict and one.keys() == other.keys():
        return {key: _common(value, other[key]) for key, value in one.items()}
    if one == other and type(one) is type(other):
        return one
    if all(value == _NUMBER or type(value) in (int, float) for value in (one, other)):
        return _NUMBER
    raise TypeError("arguments that differ")


def _encode_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: _encode(value) for key, value in sorted(kwargs.items())}


def _encode(value: Any) -> Any:
    if isinstance(value, (Spec, torch.Tensor)):
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
    if value == _NUMBER:
        return UnknownNumber()
    if isinstance(value, list):
        if value[0] == "str":
            return value[1]
        parts = map(_decode, value[1:])
        return tuple(parts) if value[0] == "tuple" else list(parts)
    return value
