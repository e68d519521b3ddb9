"""What a network may cost at most, as it is given: a part of the original's cost, a figure, or a time with its unit."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from nmconv.errors import OptionError

__all__ = ["Budget", "budgets_of", "several"]

_TIME = re.compile(r"\s*(\d+\.?\d*(?:e[+-]?\d+)?|\.\d+(?:e[+-]?\d+)?)\s*(s|ms|us|µs|μs)\s*", re.ASCII | re.IGNORECASE)
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "μs": 1e-6}


@dataclass(frozen=True)
class Budget:
    """What is left at most.

    Attributes:
        given: As the user wrote it.
        amount: A part of the original's cost, or a figure in the cost's unit.
        part: Whether it is a part.
    """

    given: float | str
    amount: float
    part: bool

    def of(self, total: float) -> float:
        """The figure, for an original of this cost."""
        return self.amount * total if self.part else self.amount

    def named(self) -> str:
        """As a plan has it: ``"0.75"``, ``"300000000"`` or ``"8 ms"``."""
        if isinstance(self.given, str):
            return " ".join(self.given.split())
        return f"{self.given:g}" if self.part else f"{self.given:.12g}"


def budgets_of(budget: Any, cost: str) -> tuple[Budget, ...]:
    """Each of the budgets given.

    Raises:
        OptionError: For what is none, and for a time where no time is what it costs.
    """
    given = tuple(budget) if several(budget) else (budget,)
    if not given:
        raise OptionError(_refused(budget))
    return tuple(_budget(one, cost) for one in given)


def several(budget: Any) -> bool:
    """Whether it is more than one budget; a tensor or array without dimensions is one."""
    scalar = getattr(budget, "ndim", None) == 0
    return isinstance(budget, Iterable) and not scalar and not isinstance(budget, (str, bytes, Mapping))


def _budget(one: Any, cost: str) -> Budget:
    if getattr(one, "ndim", None) == 0 and hasattr(one, "item"):
        one = one.item()
    if isinstance(one, str):
        time = _TIME.fullmatch(one)
        if time is None or not math.isfinite(float(time[1])):
            raise OptionError(_refused(one))
        if cost != "latency":
            raise OptionError(f'budget={one!r}: a time, and cost={cost!r} has none; give a figure, or cost="latency"')
        return Budget(one, float(time[1]) * _SECONDS[time[2].lower()], False)
    if isinstance(one, bool) or not isinstance(one, Real) or not 0 <= float(one) < math.inf:
        raise OptionError(_refused(one))
    part = float(one) < 1 or (float(one) == 1 and not isinstance(one, Integral))
    return Budget(float(one), float(one), part)


def _refused(given: Any) -> str:
    return (
        f"budget={given!r}: give a part of the original's cost such as 0.75, a figure from 1 on, or a time such as "
        '"8 ms" for the latency of one image'
    )
