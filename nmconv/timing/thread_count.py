"""How many threads torch computes with, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nmconv.errors import OptionError

__all__ = ["threads"]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with ``count`` threads within an operation, and afterwards with as many as before.

    Runners made inside keep that number: compiled code and ONNX Runtime's sessions hold on to it.

    Raises:
        OptionError: If ``count`` is no positive whole number.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise OptionError(f"threads={count!r}: give a positive whole number, such as 1")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
