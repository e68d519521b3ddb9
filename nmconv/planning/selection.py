"""Select the ratio for each convolution by patterns on qualified names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import translate

from nmconv.errors import PatternError, RatioError
from nmconv.planning.ratio import Ratio

__all__ = ["PatternTarget", "Rules", "as_patterns"]


@dataclass(frozen=True)
class PatternTarget:
    """What a pattern can match: the names of one convolution and its activation, and their position in the order."""

    names: tuple[str, ...]
    order: int


class Rules:
    """The ratio of every convolution of one model: the first pattern that matches decides.

    A pattern is a glob (``layer3.*``), ``re:`` and a regular expression, or ``stage:2`` (timm's ``feature_info[2]``:
    what runs after feature 1 up to and including feature 2). A glob or expression that matches a module's whole
    qualified name holds for everything inside that module.

    Args:
        ratio: A value that :meth:`Ratio.parse` accepts, or an ordered mapping from pattern to such a value or None
            (untouched).
        include: Pattern or patterns; what none of them matches is left alone.
        exclude: Pattern or patterns of what is left alone.
        targets: All convolutions of the model.
        stages: For each of ``feature_info``, in order, the position at which the last of its module runs (-1: it never
            does).

    Raises:
        PatternError: If a pattern is malformed or matches nothing.
        RatioError: If a ratio is invalid.
    """

    def __init__(
        self,
        ratio: object,
        include: str | Iterable[str],
        exclude: str | Iterable[str],
        targets: Sequence[PatternTarget],
        stages: Sequence[int],
    ) -> None:
        self._targets = targets
        self._stages = stages
        parsed = self.parse(ratio)
        if isinstance(ratio, Mapping):
            self.text = ", ".join(f"{pattern}={value}" for pattern, value in parsed.items())
        else:
            self.text = str(parsed["*"])
        self._rules = [(value, self._match(pattern, "ratio")) for pattern, value in parsed.items()]
        self._include = [self._match(pattern, "include") for pattern in as_patterns(include)]
        self._exclude = [self._match(pattern, "exclude") for pattern in as_patterns(exclude)]

    @staticmethod
    def parse(ratio: object) -> dict[object, Ratio | None]:
        """Return a mapping from pattern to ratio; a single ratio holds for ``*``.

        Raises:
            RatioError: If a ratio is invalid.
        """
        if not isinstance(ratio, Mapping):
            return {"*": Ratio.parse(ratio)}
        if not ratio:
            raise RatioError("an empty mapping is not a ratio: map patterns to ratios, such as {'layer3': '2:1'}")
        return {pattern: None if value is None else Ratio.parse(value) for pattern, value in ratio.items()}

    def ratio(self, target: PatternTarget) -> tuple[int, Ratio] | None:
        """Return the number of the rule that decides and its ratio, or None if the target is left alone."""
        if not any(target in included for included in self._include):
            return None
        if any(target in excluded for excluded in self._exclude):
            return None
        for number, (ratio, matched) in enumerate(self._rules):
            if target in matched:
                return None if ratio is None else (number, ratio)
        return None

    def _match(self, pattern: object, option: str) -> frozenset[PatternTarget]:
        if not isinstance(pattern, str):
            raise PatternError(f"{option}: {pattern!r} is not a pattern; give a glob, 're:...' or 'stage:N'")
        if pattern == "*":
            return frozenset(self._targets)
        matched = self._in_stage(pattern) if pattern.startswith("stage:") else self._named(pattern, option)
        if not matched:
            raise PatternError(
                f"{option}: {pattern!r} matches no convolution or activation of the model; names are qualified names "
                "as named_modules() gives them, for instance "
                + ", ".join(target.names[0] for target in self._targets[:3])
            )
        return matched

    def _named(self, pattern: str, option: str) -> frozenset[PatternTarget]:
        try:
            regex = re.compile(pattern[3:] if pattern.startswith("re:") else translate(pattern))
        except re.error as error:
            raise PatternError(f"{option}: {pattern!r} is not a regular expression: {error}") from error
        return frozenset(target for target in self._targets if any(map(regex.fullmatch, _with_parents(target.names))))

    def _in_stage(self, pattern: str) -> frozenset[PatternTarget]:
        number = pattern.removeprefix("stage:")
        if not self._stages:
            raise PatternError(f"{pattern!r}: the model has no feature_info (timm); give a glob on qualified names")
        if not (number.isascii() and number.isdecimal()) or int(number) >= len(self._stages):
            raise PatternError(f"{pattern!r}: this model's stages are stage:0 to stage:{len(self._stages) - 1}")
        index = int(number)
        start = max(self._stages[:index], default=-1)
        return frozenset(target for target in self._targets if start < target.order <= self._stages[index])


def as_patterns(patterns: object) -> tuple[str, ...]:
    """Return one pattern or several as a tuple; an iterator is consumed.

    Raises:
        PatternError: If it is neither.
    """
    if isinstance(patterns, str):
        return (patterns,)
    if not isinstance(patterns, Iterable):
        raise PatternError(f"{patterns!r} is not a pattern; give one, or a list of them")
    return tuple(patterns)


def _with_parents(names: Iterable[str]) -> set[str]:
    """Return the names, with and without a function's name after ``:``, and the names of all parents."""
    prefixes: set[str] = set()
    for path in (path for name in names for path in {name, name.partition(":")[0]}):
        parts = path.split(".")
        prefixes.update(".".join(parts[:length]) for length in range(1, len(parts) + 1))
    return prefixes
