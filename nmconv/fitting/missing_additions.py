"""Numbers of additions in the reference, and in a model that lacks some of the reference's additions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from nmconv.finding import Element, ParallelSum
from nmconv.planning import ReplacedSum

__all__ = ["MissingAdditions"]

_Addition = tuple[str, str, int]  # owner, label, number in the reference


class MissingAdditions:
    """The additions of the reference that the model no longer computes.

    A forward's additions are numbered in order of execution, so every missing one shifts the numbers after it.

    Args:
        missing: The additions, with their numbers in the reference.
    """

    def __init__(self, missing: Iterable[ReplacedSum]) -> None:
        self._missing: frozenset[_Addition] = frozenset((one.owner, one.label, one.number) for one in missing)

    def without(self, removed: Iterable[ReplacedSum]) -> MissingAdditions:
        """Return the missing additions after more are removed; those are given with their numbers in the model."""
        result = MissingAdditions(())
        result._missing = self._missing | {
            (one.owner, one.label, self._reference_number(one.owner, one.label, one.number)) for one in removed
        }
        return result

    def in_reference(self, elements: Iterable[Element]) -> tuple[Element, ...]:
        """Renumber the sums of a model's elements as in the reference."""
        return _renumbered(elements, self._reference_number)

    def in_model(self, elements: Iterable[Element]) -> tuple[Element, ...]:
        """Renumber the sums of the reference's elements as in the model."""
        return _renumbered(elements, self._model_number)

    def _model_number(self, owner: str, label: str, number: int) -> int:
        return number - sum(one[:2] == (owner, label) and one[2] < number for one in self._missing)

    def _reference_number(self, owner: str, label: str, number: int) -> int:
        for missing in sorted(one[2] for one in self._missing if one[:2] == (owner, label)):
            number += missing <= number
        return number


def _renumbered(elements: Iterable[Element], number: Callable[[str, str, int], int]) -> tuple[Element, ...]:
    result: list[Element] = []
    for element in elements:
        if isinstance(element, ParallelSum):
            first, second = (_renumbered(branch, number) for branch in element.branches)
            new_number = number(element.owner, element.label, element.number)
            element = replace(element, branches=(first, second), number=new_number)
        result.append(element)
    return tuple(result)
