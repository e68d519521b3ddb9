"""The ratio N:M of a proportional unit: N convolutions share M activations (arXiv 1709.06247, section 3)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from nmconv.errors import RatioError

__all__ = ["Ratio"]

_HINT = 'give "N:M" or a pair (N, M) of whole numbers with N >= M >= 1, such as "2:1"'


@dataclass(frozen=True)
class Ratio:
    """The ratio of a unit: ``n`` convolutions to ``m`` activations (arXiv 1709.06247).

    Args:
        n: Convolutions in a unit.
        m: Activations that a full unit keeps.

    Raises:
        RatioError: If not n >= m >= 1.

    Example:
        >>> import nmconv
        >>> ratio = nmconv.Ratio.parse("3:1")
        >>> ratio == nmconv.Ratio(3, 1)
        True
        >>> [ratio.kept(convs) for convs in (1, 2, 3, 4)]
        [1, 1, 1, 2]
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not self.n >= self.m >= 1:
            raise RatioError(f"ratio {self.n}:{self.m} is out of range: {_HINT}")

    @classmethod
    def parse(cls, value: object) -> Ratio:
        """Read ``"2:1"``, ``(2, 1)`` or a Ratio.

        Raises:
            RatioError: If ``value`` is none of these.
        """
        if isinstance(value, Ratio):
            return value
        if isinstance(value, str):
            match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", value, re.ASCII)
            if match is None:
                raise RatioError(f"{value!r} is not a ratio: {_HINT}")
            return cls(int(match[1]), int(match[2]))
        if (
            isinstance(value, Sequence)
            and not isinstance(value, (bytes, bytearray))
            and len(value) == 2
            and all(type(part) is int for part in value)
        ):
            return cls(value[0], value[1])
        raise RatioError(f"{value!r} is not a ratio: {_HINT}")

    def kept(self, convs: int) -> int:
        """Return how many activations a unit of ``convs`` convolutions may keep: ceil(convs * m / n)."""
        return -(-convs * self.m // self.n)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"
