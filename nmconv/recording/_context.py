"""The context that a thread is in: gradients, inference mode, autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["context_kept", "context_now"]

_KINDS = ("cpu", "cuda")


def context_now() -> tuple[bool, ...]:
    """Whether gradients, inference mode and autocast are on in this thread."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(kind) for kind in _KINDS),
    )


@contextmanager
def context_kept() -> Iterator[None]:
    """Leave what a model's code has entered by hand, and not left since it raised in between.

    Autocast counts how deep it is, and keeps the weights that it has cast until it is left: with a wrong count a thread
    would go on training with old ones.
    """
    grad, cached = torch.is_grad_enabled(), torch.is_autocast_cache_enabled()
    autocast = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in _KINDS]
    depth = torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.set_grad_enabled(grad)
        for kind, on, dtype in autocast:
            torch.set_autocast_enabled(kind, on)
            torch.set_autocast_dtype(kind, dtype)
        torch.set_autocast_cache_enabled(cached)
        while torch.autocast_decrement_nesting() >= depth:
            torch.clear_autocast_cache()
