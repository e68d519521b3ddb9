"""Which ratio holds where: patterns on qualified names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import translate

from nmconv.errors import PatternError, RatioError
from nmconv.planning.ratio import Ratio

__all__ = ["PatternTarget", "Rules", "listed"]


@dataclass(frozen=True)
class PatternTarget:
    """What a pattern is held against: the names of one convolution and its activation, and when it runs."""

    names: tuple[str, ...]
    order: int


class Rules:
    """The ratio of every spot of one model: the first pattern that matches wins.

    A pattern is a glob (``layer3.*``), ``re:`` and a regular expression, or ``stage:2`` (timm's ``feature_info[2]``:
    what runs after feature 1 up to and including feature 2). A glob or expression that matches a module's whole
    qualified name holds for everything inside that module.

    Args:
        ratio: What :meth:`Ratio.parse` takes, or an ordered mapping from pattern to that or None (untouched).
        include: Pattern or patterns; what none of them matches is left alone.
        exclude: Pattern or patterns of what is left alone.
        spots: Everything in the model that a pattern could match.
        stages: For each of ``feature_info``, in order, when the last of its module has run (-1: it never does).

    Raises:
        PatternError: If a pattern is malformed or matches no spot.
        RatioError: If a ratio is none.
    """

    def __init__(
        self,
        ratio: object,
        include: str | Iterable[str],
        exclude: str | Iterable[str],
        spots: Sequence[PatternTarget],
        stages: Sequence[int],
    ) -> None:
        self._spots = spots
        self._stages = stages
        parsed = self.parse(ratio)
        whole = not isinstance(ratio, Mapping)
        self.text = str(parsed["*"]) if whole else ", ".join(f"{key}={value}" for key, value in parsed.items())
        self._rules = [(value, self._match(pattern, "ratio")) for pattern, value in parsed.items()]
        self._include = [self._match(pattern, "include") for pattern in listed(include)]
        self._exclude = [self._match(pattern, "exclude") for pattern in listed(exclude)]

    @staticmethod
    def parse(ratio: object) -> dict[object, Ratio | None]:
        """The mapping from pattern to ratio; one ratio alone holds for everything.

        Raises:
            RatioError: If a ratio is none.
        """
        if not isinstance(ratio, Mapping):
            return {"*": Ratio.parse(ratio)}
        if not ratio:
            raise RatioError("an empty mapping is no ratio: map patterns to ratios, such as {'layer3': '2:1'}")
        return {pattern: None if value is None else Ratio.parse(value) for pattern, value in ratio.items()}

    def ratio(self, spot: PatternTarget) -> tuple[int, Ratio] | None:
        """The rule's number and its ratio, or None where the spot is left alone."""
        if not any(spot in matched for matched in self._include) or any(spot in matched for matched in self._exclude):
            return None
        for number, (ratio, matched) in enumerate(self._rules):
            if spot in matched:
                return None if ratio is None else (number, ratio)
        return None

    def _match(self, pattern: object, option: str) -> frozenset[PatternTarget]:
        if not isinstance(pattern, str):
            raise PatternError(f"{option}: {pattern!r} is no pattern; give a glob, 're:...' or 'stage:N'")
        if pattern == "*":
            return frozenset(self._spots)
        if pattern.startswith("stage:"):
            found = self._stage(pattern)
        else:
            try:
                test = re.compile(pattern[3:] if pattern.startswith("re:") else translate(pattern))
            except re.error as error:
                raise PatternError(f"{option}: {pattern!r} is no regular expression: {error}") from error
            found = frozenset(
                spot for spot in self._spots if any(test.fullmatch(name) for name in _with_parents(spot.names))
            )
        if not found:
            raise PatternError(
                f"{option}: {pattern!r} matches no convolution or activation of the model; names are qualified names "
                "as named_modules() gives them, for instance " + ", ".join(spot.names[0] for spot in self._spots[:3])
            )
        return found

    def _stage(self, pattern: str) -> frozenset[PatternTarget]:
        number = pattern.removeprefix("stage:")
        if not self._stages:
            raise PatternError(f"{pattern!r}: the model has no feature_info (timm); give a glob on qualified names")
        if not (number.isascii() and number.isdecimal()) or int(number) >= len(self._stages):
            raise PatternError(f"{pattern!r}: stages are numbered 0 to {len(self._stages) - 1} here")
        index = int(number)
        start = max(self._stages[:index], default=-1)
        return frozenset(spot for spot in self._spots if start < spot.order <= self._stages[index])


def listed(patterns: object) -> tuple[str, ...]:
    """One pattern or several as a tuple; an iterator is read once, here.

    Raises:
        PatternError: If it is neither.
    """
    if isinstance(patterns, str):
        return (patterns,)
    if not isinstance(patterns, Iterable):
        raise PatternError(f"{patterns!r} is no pattern; give one, or a list of them")
    return tuple(patterns)


def _with_parents(names: Iterable[str]) -> set[str]:
    found: set[str] = set()
    for path in (path for name in names for path in {name, name.partition(":")[0]}):
        parts = path.split(".")
        found.update(".".join(parts[:length]) for length in range(1, len(parts) + 1))
    return found
