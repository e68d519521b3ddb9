"""A progress bar, if rich is installed and output is wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["progress"]


@contextmanager
def progress(total: int, description: str, quiet: bool) -> Iterator[Callable[[], None]]:
    """Show a progress bar; yields a function to call after each of ``total`` steps."""
    try:
        from rich.progress import Progress
    except ImportError:
        quiet = True
    if quiet or not total:
        yield lambda: None
        return
    with Progress(transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda: bar.advance(task)
