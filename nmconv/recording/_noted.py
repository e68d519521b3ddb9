"""Whether a thread is recording."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["is_recording", "noted"]

_state = threading.local()


def is_recording() -> bool:
    """Whether this thread is recording a model's run."""
    return bool(getattr(_state, "depth", 0))


@contextmanager
def noted() -> Iterator[None]:
    """While a copy is made ready and runs."""
    _state.depth = getattr(_state, "depth", 0) + 1
    try:
        yield
    finally:
        _state.depth -= 1
