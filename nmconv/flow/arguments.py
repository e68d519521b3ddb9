"""The arguments of a method's calls: their structure, and that structure as text, which plans store."""

from __future__ import annotations

import json
import keyword
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nmconv.errors import RewriteError
from nmconv.flow.flow_graph import Flow, ModuleCall
from nmconv.recording import Spec

__all__ = [
    "ATOMS",
    "Arguments",
    "UnknownNumber",
    "argument_structure",
    "containers",
    "forward_argument_structures",
    "map_leaves",
    "parse_arguments",
]

# Types whose values hold no references that could matter.
ATOMS = frozenset((bool, int, float, str, bytes, type(None), torch.Tensor, torch.dtype, torch.device, torch.Size))

# The text of a tensor, and of a number that differs from call to call.
_TENSOR = "T"
_NUMBER = "N"


class _UnknownTensor(torch.Tensor):
    """A tensor argument of unknown shape."""


class UnknownNumber:
    """A number that differs from call to call."""


@dataclass(frozen=True)
class Arguments:
    """The structure of a call's arguments; its tensors are proxies, specs or unknown."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def map_leaves(value: Any, function: Callable[[Any], Any]) -> Any:
    """Return a copy of nested tuples, lists and dicts with ``function`` applied to every tensor and number."""
    if isinstance(value, (torch.Tensor, UnknownNumber)) or type(value) in (int, float):
        return function(value)
    if isinstance(value, tuple):
        parts = [map_leaves(part, function) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, list):
        return [map_leaves(part, function) for part in value]
    if isinstance(value, dict):
        return type(value)((key, map_leaves(part, function)) for key, part in value.items())
    return value


def containers(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every list and dict in a value, with a shallow copy of it."""
    if isinstance(value, (list, dict)):
        yield value, value.copy()
    if isinstance(value, (list, tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from containers(part)


def argument_structure(calls: Iterable[ModuleCall | Arguments]) -> str:
    """Return, as JSON, the argument structure that all ``calls`` of a method share; "" if they share none.

    Numbers may differ between calls; those that do are stored without a value.
    """
    try:
        encoded = [[_encode(list(call.args))[1:], _encode_kwargs(call.kwargs)] for call in calls]
        common = encoded[0]
        for other in encoded[1:]:
            common = _common(common, other)
    except (TypeError, IndexError):
        return ""
    return json.dumps(common)


def forward_argument_structures(flows: Sequence[Flow], owners: Iterable[str]) -> dict[str, str]:
    """Return the :func:`argument_structure` of all calls of each module's forward, by the modules' names."""
    unknown = frozenset[str]().union(*(flow.non_tensor_parents for flow in flows))
    frames = [frame for flow in flows for frame in flow.frames]
    return {
        owner: "" if owner in unknown else argument_structure(frame for frame in frames if frame.path == owner)
        for owner in dict.fromkeys(owners)
    }


def parse_arguments(text: str) -> Arguments:
    """Return the arguments that :func:`argument_structure` has written, with unknown tensors.

    Raises:
        RewriteError: If the text is empty or cannot be read.
    """
    if not text:
        raise RewriteError(
            "it is called with arguments that differ from call to call or are neither tensors nor numbers, or one of "
            "its children returns something other than one tensor"
        )
    try:
        args, kwargs = json.loads(text)
        arguments = Arguments(tuple(map(_decode, args)), {key: _decode(value) for key, value in kwargs.items()})
    except (TypeError, ValueError, AttributeError, LookupError, RecursionError) as error:
        raise RewriteError(f"the structure of its arguments cannot be read ({text[:80]})") from error
    if not all(name.isidentifier() and not keyword.iskeyword(name) for name in kwargs):  # they become source
        raise RewriteError(f"it is called with keywords that are not identifiers: {', '.join(map(repr, kwargs))}")
    return arguments


def _common(one: Any, other: Any) -> Any:
    """Return the structure that two encoded calls share.

    Raises:
        TypeError: If they differ in more than numbers.
    """
    if type(one) is type(other) is list and len(one) == len(other):
        return [_common(*parts) for parts in zip(one, other, strict=True)]
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


def _decode(value: Any) -> Any:
    if value == _TENSOR:
        return _UnknownTensor()
    if value == _NUMBER:
        return UnknownNumber()
    if isinstance(value, list):
        if value[0] == "str":
            return value[1]
        parts = map(_decode, value[1:])
        return tuple(parts) if value[0] == "tuple" else list(parts)
    return value
