"""The least total loss under a budget: exact dynamic programming over segments that share no convolution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["Option", "choose", "frontier"]

T = TypeVar("T")


@dataclass(frozen=True)
class Option:
    """One candidate to choose.

    Attributes:
        first, last: The places it takes, both included.
        loss: What it costs in accuracy; added up.
        saves: What it saves; added up.
    """

    first: int
    last: int
    loss: float
    saves: float


@dataclass(frozen=True)
class _Choice:
    """A set of options as a list from the last to the first."""

    loss: float
    saves: float
    option: int = -1
    before: _Choice | None = None

    def options(self) -> tuple[int, ...]:
        found: list[int] = []
        at: _Choice | None = self
        while at is not None and at.before is not None:
            found.append(at.option)
            at = at.before
        return tuple(reversed(found))


def frontier(options: Sequence[Option]) -> list[tuple[float, float, tuple[int, ...]]]:
    """Every choice that no other beats: (loss, saved, indices of the options), by growing loss.

    The places are gone through in order; at each, what is kept is the choices up to there of which none saves as much
    for as little. An option that ends there is put behind every choice that ends before it begins.
    """
    ends: dict[int, list[int]] = {}
    for index, option in enumerate(options):
        ends.setdefault(option.last, []).append(index)
    places = sorted({option.last for option in options})
    kept: list[list[_Choice]] = [[_Choice(0.0, 0.0)]]
    for place in places:
        found = list(kept[-1])
        for index in ends[place]:
            option = options[index]
            free = sum(other < option.first for other in places)  # places that end before it begins
            found += [
                _Choice(before.loss + option.loss, before.saves + option.saves, index, before) for before in kept[free]
            ]
        kept.append(_unbeaten(found))
    return [(choice.loss, choice.saves, choice.options()) for choice in kept[-1]]


def choose(front: Sequence[tuple[float, float, tuple[int, ...]]], needed: float) -> tuple[int, ...] | None:
    """Of a :func:`frontier`, the options with the least total loss that save at least ``needed``; None if none do."""
    for _, saves, chosen in front:
        if saves >= needed * (1 - 1e-12):
            return chosen
    return None


def _unbeaten(choices: list[_Choice]) -> list[_Choice]:
    """By growing loss, each saving more than all before it."""
    found: list[_Choice] = []
    for choice in sorted(choices, key=lambda one: (one.loss, -one.saves)):
        if not found or choice.saves > found[-1].saves:
            found.append(choice)
    return found
