"""The Pareto front of loss and savings: exact interval dynamic programming over segments that share no convolution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Option", "choose", "frontier"]

_ROUNDING = 1e-12  # relative


@dataclass(frozen=True)
class Option:
    """One candidate to choose.

    Attributes:
        first, last: The positions that it occupies, both inclusive.
        loss: Its loss; losses add up.
        saves: What it saves; savings add up.
    """

    first: int
    last: int
    loss: float
    saves: float


@dataclass(frozen=True)
class _Choice:
    """A set of options, as a linked list from the last to the first."""

    loss: float
    saves: float
    option: int = -1
    previous: _Choice | None = None

    def options(self) -> tuple[int, ...]:
        indices: list[int] = []
        choice: _Choice | None = self
        while choice is not None and choice.previous is not None:
            indices.append(choice.option)
            choice = choice.previous
        return tuple(reversed(indices))


def frontier(options: Sequence[Option]) -> list[tuple[float, float, tuple[int, ...]]]:
    """Return all choices that no other dominates: (loss, saved, indices of the options), by increasing loss.

    Dynamic programming over positions: the front up to a position is the front up to the previous one, extended by
    every option that ends there, each appended to the front up to where the option begins.
    """
    ending_at: dict[int, list[int]] = {}
    for index, option in enumerate(options):
        ending_at.setdefault(option.last, []).append(index)
    ends = sorted(ending_at)
    fronts: list[list[_Choice]] = [[_Choice(0.0, 0.0)]]
    for end in ends:
        choices = list(fronts[-1])
        for index in ending_at[end]:
            option = options[index]
            front_before = fronts[sum(other < option.first for other in ends)]
            choices += [
                _Choice(previous.loss + option.loss, previous.saves + option.saves, index, previous)
                for previous in front_before
            ]
        fronts.append(_undominated(choices))
    return [(choice.loss, choice.saves, choice.options()) for choice in fronts[-1]]


def choose(front: Sequence[tuple[float, float, tuple[int, ...]]], needed: float) -> tuple[int, ...] | None:
    """Return the options of a :func:`frontier` with the least loss that save at least ``needed``, or None."""
    for _, saves, chosen in front:
        if saves >= needed * (1 - _ROUNDING):
            return chosen
    return None


def _undominated(choices: list[_Choice]) -> list[_Choice]:
    """Return the choices by increasing loss, each saving more than all before it."""
    front: list[_Choice] = []
    for choice in sorted(choices, key=lambda choice: (choice.loss, -choice.saves)):
        if not front or choice.saves > front[-1].saves:
            front.append(choice)
    return front
