"""Policies that choose which activations a unit keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from nmconv.deprecation import current_value
from nmconv.errors import OptionError

__all__ = ["CONSEQUENCES", "DEFAULT_KEEP", "OLD_NAMES", "Keep", "Unit", "check_keep", "choose", "current_keep"]


@dataclass(frozen=True)
class Unit:
    """The argument of a ``keep`` function: one unit with more activations than it may keep.

    Attributes:
        chain: Number of the chain.
        unit: Number of the unit within the chain.
        pre: Whether activations precede their convolutions.
        convs: Qualified names of each convolution, in order; several if parallel ones are summed.
        sites: Ids of the unit's activations, in order of execution.
        owners: For each site the index into ``convs`` of the convolution that owns it.
        allowed: How many activations may stay: ceil(r * M / N) for r convolutions and a ratio of N:M.

    Example:
        >>> from torch import nn
        >>> import nmconv
        >>> def keep_last(unit: nmconv.Unit) -> range:
        ...     return range(len(unit.sites) - unit.allowed, len(unit.sites))
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        >>> [site.action for site in nmconv.make_plan(model, "2:1", keep=keep_last).sites]
        ['drop', 'keep']
    """

    chain: int
    unit: int
    pre: bool
    convs: tuple[tuple[str, ...], ...]
    sites: tuple[str, ...]
    owners: tuple[int, ...]
    allowed: int


Keep = str | Callable[[Unit], Iterable[int]]
FIRST, BOUNDARY = "first", "boundary"
DEFAULT_KEEP = FIRST  # it lost less accuracy in ResNet-20: docs/study.md
_NAMES = (FIRST, BOUNDARY, "spread")
OLD_NAMES = {"last": BOUNDARY}
CONSEQUENCES = dict.fromkeys(
    (FIRST, BOUNDARY),
    f"{BOUNDARY!r} leaves more to merge; {FIRST!r} lost less accuracy in ResNet-20, {BOUNDARY!r} in MobileNetV2 "
    "(docs/study.md)",
)


def current_keep(keep: Keep) -> Keep:
    """Return a policy under its current name, and warn with a DeprecationWarning if the old name was given."""
    return current_value("keep", keep, OLD_NAMES)


def check_keep(keep: object) -> None:
    """Raise OptionError unless ``keep`` is a known name or callable."""
    if not (callable(keep) or (isinstance(keep, str) and keep in _NAMES)):
        raise OptionError(f"keep={keep!r} is unknown: give one of {', '.join(map(repr, _NAMES))}, or a function")


def choose(keep: Keep, unit: Unit) -> frozenset[int]:
    """Return the positions in ``unit.sites`` that stay.

    ``first`` keeps the unit's first activations, or, if activations precede their convolutions, its last. ``boundary``
    keeps the other end; ``spread`` spaces them evenly with one at the boundary.

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
        if not all(type(position) is int and 0 <= position < count for position in positions):
            raise OptionError(f"keep returned {sorted(map(str, positions))} for {unit}: return positions below {count}")
        if len(positions) > allowed:
            raise OptionError(f"keep returned {len(positions)} positions for {unit}: at most {allowed} may stay")
        return positions
    if keep == "spread":
        if unit.pre:
            return frozenset(-(-step * count // allowed) for step in range(allowed))
        return frozenset((step + 1) * count // allowed - 1 for step in range(allowed))
    keeps_last = (keep == BOUNDARY) != unit.pre
    return frozenset(range(count - allowed, count) if keeps_last else range(allowed))
