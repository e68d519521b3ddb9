"""What linear runs consist of, as plain data: modules in a row, and sums of branches."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

__all__ = ["Element", "Join", "LinearRun", "Step", "elements_from", "steps_of", "takes_in", "text_of", "without_end"]


@dataclass(frozen=True)
class Step:
    """One module of a run, called once.

    Attributes:
        kind: ``conv``, ``norm``, ``pad``, ``drop`` (dropout, drop-path), ``pass`` (identity) or ``pool`` (an average
            pool; the last of its run).
        name: Its qualified name.
        why: Why it cannot be replaced without changing something else, or "".
    """

    kind: str
    name: str
    why: str = ""

    @property
    def quiet(self) -> bool:
        """Whether it hands on what it gets in eval mode."""
        return self.kind in ("pass", "drop")

    @property
    def pools(self) -> bool:
        """Whether it is an average pool."""
        return self.kind == "pool"


@dataclass(frozen=True)
class Join:
    """A sum of two parallel branches of one value.

    Attributes:
        branches: The operands, each a sequence of elements; an empty one is the value itself.
        owner: Qualified name of the module whose forward adds.
        label: What the addition is called there.
        number: Which call of that label it is, from 1.
        takes: The structure of that forward's arguments, where that is known.
        why: Why the owner's forward cannot be rewritten, or "".
    """

    branches: tuple[tuple[Element, ...], tuple[Element, ...]]
    owner: str
    label: str
    number: int
    takes: str = ""
    why: str = ""

    @property
    def quiet(self) -> bool:
        """Whether it hands on what it gets: never."""
        return False

    @property
    def pools(self) -> bool:
        """Whether it is an average pool: never."""
        return False


Element: TypeAlias = "Step | Join"


@dataclass(frozen=True)
class LinearRun:
    """Elements that follow one another, each value between them read by the next one only.

    Attributes:
        elements: In order of execution.
        crossed: Qualified names of modules that begin or end inside the run: their hooks would see other values.
        source: Shape of the input without the batch, where it can be known: ``(channels, *sizes)``.
        flags: By which forwards go another way between its values: names of a module, and of its bool, number or text.
    """

    elements: tuple[Element, ...]
    crossed: tuple[str, ...] = ()
    source: tuple[int, ...] | None = None
    flags: tuple[tuple[str, str], ...] = ()


def steps_of(elements: Iterable[Element]) -> Iterator[Step]:
    """All modules of a run, those of branches too."""
    for element in elements:
        if isinstance(element, Step):
            yield element
        else:
            for branch in element.branches:
                yield from steps_of(branch)


def takes_in(elements: Iterable[Element]) -> dict[str, str]:
    """Of each module whose forward makes a sum of a run, the structure of that forward's arguments."""
    found: dict[str, str] = {}
    for element in elements:
        if isinstance(element, Join):
            found[element.owner] = element.takes
            for branch in element.branches:
                found |= takes_in(branch)
    return found


def without_end(elements: Sequence[Element]) -> Sequence[Element]:
    """The elements up to the last one that does something in eval mode."""
    end = len(elements)
    while end and elements[end - 1].quiet:
        end -= 1
    return elements[:end]


def text_of(elements: Iterable[Element]) -> str:
    """The elements of a run as JSON."""
    return json.dumps(_plain(elements))


def _plain(elements: Iterable[Element]) -> list[Any]:
    found: list[Any] = []
    for element in elements:
        if isinstance(element, Step):
            found.append([element.kind, element.name])
        else:
            branches = [_plain(branch) for branch in element.branches]
            found.append([element.owner, element.label, element.number, *branches])
    return found


def elements_from(text: str) -> tuple[Element, ...]:
    """Read what :func:`text_of` wrote.

    Raises:
        ValueError: If it is something else.
    """
    try:
        return _elements(json.loads(text))
    except (TypeError, RecursionError, KeyError, IndexError) as error:
        raise ValueError(f"these are no factors: {error}") from error


def _elements(parts: Any) -> tuple[Element, ...]:
    found: list[Element] = []
    for part in parts:
        if len(part) == 2 and part[0] in ("conv", "norm", "pad", "drop", "pass") and isinstance(part[1], str):
            found.append(Step(part[0], part[1]))
            continue
        owner, label, number, one, two = part
        if [type(value) for value in (owner, label, number)] != [str, str, int]:
            raise TypeError("a sum of another form")
        found.append(Join((_elements(one), _elements(two)), owner, label, number))
    return tuple(found)
