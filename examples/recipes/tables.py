"""Numbers and tables as text."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence


def spread(values: Sequence[float], digits: int = 2, sign: bool = False) -> str:
    """Format mean ± standard deviation; the mean alone for one value."""
    if not values:
        return "not measured"
    mean = f"{statistics.fmean(values):{'+' if sign else ''}.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def markdown(headings: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    cells = [headings, ["---"] * len(headings), *lines]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in cells)
