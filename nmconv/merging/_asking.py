"""Asking a model what was merged in it."""

from __future__ import annotations

from torch import nn

from nmconv.errors import ModelTypeError
from nmconv.merging._records import Merge
from nmconv.surgery import MERGED

__all__ = ["get_merges"]


def get_merges(model: nn.Module) -> tuple[tuple[Merge, ...], ...]:
    """What was merged in a model: one tuple for each call of :func:`nmconv.merge` or :func:`nmconv.fold_norms`.

    Folded norms are merges of a single convolution. Empty for a model in which nothing was merged.

    Raises:
        ModelTypeError: If ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise ModelTypeError(f"{type(model).__name__} is no nn.Module: give the model itself")
    rounds: tuple[tuple[Merge, ...], ...] = model.__dict__.get(MERGED, ())
    return rounds
