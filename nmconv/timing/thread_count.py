"""Set torch's number of threads temporarily."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nmconv.errors import OptionError

__all__ = ["thread_count"]


@contextmanager
def thread_count(count: int) -> Iterator[None]:
    """Let torch use ``count`` intra-op threads, and restore the previous number on exit.

    Runners created inside keep that number, as compiled code and ONNX Runtime sessions store it.

    Raises:
        OptionError: If ``count`` is not a positive integer.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise OptionError(f"threads={count!r}: give a positive whole number, such as 1")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
