"""A progress bar where rich is installed and somebody is watching."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["progress"]


@contextmanager
def progress(total: int, what: str, quiet: bool) -> Iterator[Callable[[], None]]:
    """Gives what to call after each of ``total`` steps."""
    try:
        from rich.progress import Progress
    except ImportError:
        quiet = True
    if quiet or not total:
        yield lambda: None
        return
    with Progress(transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)
