"""Numbers and tables as text."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence


def spread(values: Sequence[float], digits: int = 2, sign: bool = False) -> str:
    """Mean ± standard deviation over seeds; one value as it is."""
    if not values:
        return "not measured"
    mean = f"{statistics.fmean(values):{'+' if sign else ''}.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def markdown(headings: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A table."""
    cells = [headings, ["---"] * len(headings), *lines]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in cells)
