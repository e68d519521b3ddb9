"""Matplotlib axes to plot into: the user's, new ones, or those of a figure that is saved."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nmconv.errors import OptionError

__all__ = ["axes_for_plot"]


@contextmanager
def axes_for_plot(where: Any, *, width: float, height: float = 4.0) -> Iterator[Any]:
    """Yield axes, and save their figure on exit if ``where`` is a path.

    Args:
        where: A path, matplotlib axes, or None for new axes.
        width: Width of a new figure, in inches.
        height: Height of a new figure, in inches.

    Raises:
        OptionError: If ``where`` is something else, or matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OptionError("plot needs matplotlib: pip install 'nmconv[demo]', or draw rows() by other means") from error
    is_path = isinstance(where, (str, os.PathLike))
    if where is None or is_path:
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure.subplots()
        if is_path:
            figure.savefig(where)
    elif hasattr(where, "plot") and hasattr(where, "imshow"):
        yield where
    else:
        raise OptionError(f"where={where!r:.80}: give a path, matplotlib's axes, or None for new ones")
