"""Budgets: a fraction of the original's cost, a number in the cost's unit, or a time with its unit."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from nmconv.errors import OptionError

__all__ = ["Budget", "budgets_of", "is_several"]

_TIME = re.compile(r"\s*(\d+\.?\d*(?:e[+-]?\d+)?|\.\d+(?:e[+-]?\d+)?)\s*(s|ms|us|µs|μs)\s*", re.ASCII | re.IGNORECASE)
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "μs": 1e-6}


@dataclass(frozen=True)
class Budget:
    """An upper bound of the cost.

    Attributes:
        value: As the user wrote it.
        amount: A fraction of the original's cost, or a number in the cost's unit.
        is_fraction: Whether it is a fraction.
    """

    value: float | str
    amount: float
    is_fraction: bool

    def of(self, total: float) -> float:
        """Return the bound in the cost's unit, for an original of this cost."""
        return self.amount * total if self.is_fraction else self.amount

    def text(self) -> str:
        """Return its text in a plan: ``"0.75"``, ``"300000000"`` or ``"8 ms"``."""
        if isinstance(self.value, str):
            return " ".join(self.value.split())
        return f"{self.value:g}" if self.is_fraction else f"{self.value:.12g}"


def budgets_of(budget: Any, cost: str) -> tuple[Budget, ...]:
    """Parse one or several budgets.

    Raises:
        OptionError: If one is invalid, or is a time although the cost is not latency.
    """
    values = tuple(budget) if is_several(budget) else (budget,)
    if not values:
        raise OptionError(_message(budget))
    return tuple(_budget(value, cost) for value in values)


def is_several(budget: Any) -> bool:
    """Return whether it is an iterable of budgets; a zero-dimensional tensor or array is a single one."""
    scalar = getattr(budget, "ndim", None) == 0
    return isinstance(budget, Iterable) and not scalar and not isinstance(budget, (str, bytes, Mapping))


def _budget(value: Any, cost: str) -> Budget:
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, str):
        time = _TIME.fullmatch(value)
        if time is None or not math.isfinite(float(time[1])):
            raise OptionError(_message(value))
        if cost != "latency":
            raise OptionError(f'budget={value!r} is a time, and cost={cost!r} is not: give a number, or cost="latency"')
        return Budget(value, float(time[1]) * _SECONDS[time[2].lower()], False)
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < math.inf:
        raise OptionError(_message(value))
    is_fraction = float(value) < 1 or (float(value) == 1 and not isinstance(value, Integral))
    return Budget(float(value), float(value), is_fraction)


def _message(value: Any) -> str:
    return (
        f"budget={value!r}: give a fraction of the original's cost such as 0.75, a number from 1 on, or a time such as "
        '"8 ms" for the latency of one image'
    )
