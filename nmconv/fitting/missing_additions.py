"""Which number an addition has: in the reference, and in a model in which some of the forward's others are gone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from nmconv.finding import Element, Join
from nmconv.planning import Sum

__all__ = ["MissingAdditions"]

_Key = tuple[str, str, int]  # owner, label, number in the reference


class MissingAdditions:
    """The additions of the reference that the model does not make any more.

    Args:
        gone: By their numbers in the reference.
    """

    def __init__(self, gone: Iterable[Sum]) -> None:
        self._gone: frozenset[_Key] = frozenset((one.owner, one.label, one.number) for one in gone)

    def without(self, gone: Iterable[Sum]) -> MissingAdditions:
        """The same after these are gone too, by their numbers in the model as it is before that."""
        made = MissingAdditions(())
        made._gone = self._gone | {
            (one.owner, one.label, self._in_reference(one.owner, one.label, one.number)) for one in gone
        }
        return made

    def in_reference(self, elements: Iterable[Element]) -> tuple[Element, ...]:
        """Elements of the model with the numbers that their sums have in the reference."""
        return _renumbered(elements, self._in_reference)

    def in_model(self, elements: Iterable[Element]) -> tuple[Element, ...]:
        """Elements of the reference with the numbers that their sums have in the model."""
        return _renumbered(elements, self._in_model)

    def _in_model(self, owner: str, label: str, number: int) -> int:
        return number - sum(key[:2] == (owner, label) and key[2] < number for key in self._gone)

    def _in_reference(self, owner: str, label: str, number: int) -> int:
        for gone in sorted(key[2] for key in self._gone if key[:2] == (owner, label)):
            number += gone <= number
        return number


def _renumbered(elements: Iterable[Element], number: Callable[[str, str, int], int]) -> tuple[Element, ...]:
    found: list[Element] = []
    for element in elements:
        if isinstance(element, Join):
            one, two = (_renumbered(branch, number) for branch in element.branches)
            element = replace(element, branches=(one, two), number=number(element.owner, element.label, element.number))
        found.append(element)
    return tuple(found)
