"""Which activations a unit keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from nmconv.deprecation import warn_of_word
from nmconv.errors import OptionError

__all__ = ["BOUNDARY", "Keep", "Unit", "check_keep", "choose", "current_name"]


@dataclass(frozen=True)
class Unit:
    """What a ``keep`` function is asked about: one unit with more activations than it may keep.

    Attributes:
        chain: Number of the chain.
        unit: Number of the unit within the chain.
        pre: Whether activations stand before their convolutions.
        convs: The names of each convolution's modules, in order.
        sites: Ids of the unit's activations, in order of execution.
        owners: For each site the index into ``convs`` of the convolution that owns it.
        allowed: How many activations may stay: ceil(r * M / N).
    """

    chain: int
    unit: int
    pre: bool
    convs: tuple[tuple[str, ...], ...]
    sites: tuple[str, ...]
    owners: tuple[int, ...]
    allowed: int


Keep = str | Callable[[Unit], Iterable[int]]
BOUNDARY = "boundary"
_NAMES = (BOUNDARY, "first", "spread")
_OLD_NAMES = {"last": BOUNDARY}


def current_name(keep: Keep, stacklevel: int) -> Keep:
    """The policy under its name of today; a DeprecationWarning says where an old one was given.

    Args:
        keep: Any value.
        stacklevel: How many calls above this one the user's own is.
    """
    if isinstance(keep, str) and keep in _OLD_NAMES:
        warn_of_word("keep", keep, _OLD_NAMES[keep], stacklevel + 1)
        return _OLD_NAMES[keep]
    return keep


def check_keep(keep: object) -> None:
    """Raise OptionError unless ``keep`` is a known name or callable."""
    if not (callable(keep) or (isinstance(keep, str) and keep in _NAMES)):
        raise OptionError(f"keep={keep!r} is unknown: give one of {', '.join(map(repr, _NAMES))}, or a function")


def choose(keep: Keep, unit: Unit) -> frozenset[int]:
    """The positions in ``unit.sites`` that stay.

    ``boundary`` keeps the end of the unit: its last activations, or, where activations stand before their convolutions,
    its first. ``first`` keeps the other end, ``spread`` spaces them evenly with one at the boundary.

    Raises:
        OptionError: If a function returns positions that are not in the unit, or too many.
    """
    count, allowed = len(unit.sites), unit.allowed
    if callable(keep):
        answer = keep(unit)
        try:
            positions = frozenset(answer)
        except TypeError as error:
            raise OptionError(f"keep returned {answer!r} for {unit}: return positions in unit.sites") from error
        if not all(type(place) is int and 0 <= place < count for place in positions):
            raise OptionError(f"keep returned {sorted(map(str, positions))} for {unit}: return positions below {count}")
        if len(positions) > allowed:
            raise OptionError(f"keep returned {len(positions)} positions for {unit}: at most {allowed} may stay")
        return positions
    if keep == "spread":
        if unit.pre:
            return frozenset(-(-step * count // allowed) for step in range(allowed))
        return frozenset((step + 1) * count // allowed - 1 for step in range(allowed))
    at_end = (keep == BOUNDARY) != unit.pre
    return frozenset(range(count - allowed, count) if at_end else range(allowed))
