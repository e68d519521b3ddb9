"""The elements of linear runs as plain data: modules in sequence, and sums of parallel branches."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

__all__ = [
    "Element",
    "LinearRun",
    "ParallelSum",
    "Step",
    "argument_structures",
    "conv_names",
    "elements_from_json",
    "elements_to_json",
    "steps_of",
    "without_trailing_identities",
]


@dataclass(frozen=True)
class Step:
    """One module of a run, called once.

    Attributes:
        kind: ``conv``, ``norm``, ``pad``, ``drop`` (dropout, drop-path), ``pass`` (identity) or ``pool`` (an average
            pool, which ends its run).
        name: Its qualified name.
        why: Why it cannot be replaced without changing something else, or "".
    """

    kind: str
    name: str
    why: str = ""

    @property
    def is_identity(self) -> bool:
        """Whether it is the identity in eval mode."""
        return self.kind in ("pass", "drop")

    @property
    def is_pool(self) -> bool:
        """Whether it is an average pool."""
        return self.kind == "pool"


@dataclass(frozen=True)
class ParallelSum:
    """A sum of two parallel branches of one value.

    Attributes:
        branches: The operands, each a sequence of elements; an empty one is the value itself.
        owner: Qualified name of the module whose forward adds.
        label: The addition's label in that forward.
        number: Which call of that label it is, from 1.
        argument_structure: The structure of that forward's arguments, or "" if unknown.
        why: Why the owner's forward cannot be rewritten, or "".
    """

    branches: tuple[tuple[Element, ...], tuple[Element, ...]]
    owner: str
    label: str
    number: int
    argument_structure: str = ""
    why: str = ""

    @property
    def is_identity(self) -> bool:
        """Whether it is the identity in eval mode: never."""
        return False

    @property
    def is_pool(self) -> bool:
        """Whether it is an average pool: never."""
        return False


Element: TypeAlias = "Step | ParallelSum"


@dataclass(frozen=True)
class LinearRun:
    """Consecutive elements; each value between two of them has the next one as its only reader.

    Attributes:
        elements: In order of execution.
        crossed: Qualified names of modules that begin or end inside the run: merging changes what their hooks see.
        source: Shape of the input without the batch, ``(channels, *sizes)``, or None if unknown.
        flags: Control-flow guards inside the run: names of modules, each with the name of an attribute (a bool, number
            or text) that its forward branches on.
    """

    elements: tuple[Element, ...]
    crossed: tuple[str, ...] = ()
    source: tuple[int, ...] | None = None
    flags: tuple[tuple[str, str], ...] = ()


def steps_of(elements: Iterable[Element]) -> Iterator[Step]:
    """Yield all modules of a run, including those of branches."""
    for element in elements:
        if isinstance(element, Step):
            yield element
        else:
            for branch in element.branches:
                yield from steps_of(branch)


def conv_names(elements: Iterable[Element]) -> tuple[str, ...]:
    """Return the qualified names of all convolutions in the elements, in order of execution."""
    return tuple(step.name for step in steps_of(elements) if step.kind == "conv")


def argument_structures(elements: Iterable[Element]) -> dict[str, str]:
    """Return the argument structure of each forward that computes a sum of a run, by the module's name."""
    argument_structure: dict[str, str] = {}
    for element in elements:
        if isinstance(element, ParallelSum):
            argument_structure[element.owner] = element.argument_structure
            for branch in element.branches:
                argument_structure |= argument_structures(branch)
    return argument_structure


def without_trailing_identities(elements: Sequence[Element]) -> Sequence[Element]:
    """Return the elements without the identities at their end."""
    end = len(elements)
    while end and elements[end - 1].is_identity:
        end -= 1
    return elements[:end]


def elements_to_json(elements: Iterable[Element]) -> str:
    """Return the elements of a run as JSON."""
    return json.dumps(_to_plain(elements))


def _to_plain(elements: Iterable[Element]) -> list[Any]:
    rows: list[Any] = []
    for element in elements:
        if isinstance(element, Step):
            rows.append([element.kind, element.name])
        else:
            branches = [_to_plain(branch) for branch in element.branches]
            rows.append([element.owner, element.label, element.number, *branches])
    return rows


def elements_from_json(text: str) -> tuple[Element, ...]:
    """Read the text that :func:`elements_to_json` returned.

    Raises:
        ValueError: If the text is anything else.
    """
    try:
        return _from_plain(json.loads(text))
    except (TypeError, RecursionError, KeyError, IndexError) as error:
        raise ValueError(f"not the elements of a run: {error}") from error


def _from_plain(rows: Any) -> tuple[Element, ...]:
    elements: list[Element] = []
    for row in rows:
        if len(row) == 2 and row[0] in ("conv", "norm", "pad", "drop", "pass") and isinstance(row[1], str):
            elements.append(Step(row[0], row[1]))
            continue
        owner, label, number, one, two = row
        if [type(value) for value in (owner, label, number)] != [str, str, int]:
            raise TypeError("a sum of another form")
        elements.append(ParallelSum((_from_plain(one), _from_plain(two)), owner, label, number))
    return tuple(elements)
