"""Deep copies of models, as a user would make them."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from nmconv.copying.copies import check_copy, shared_on_copy
from nmconv.errors import ModelTypeError

__all__ = ["copy_of"]


def copy_of(model: nn.Module, spare: Iterable[Tensor | nn.Module] = ()) -> nn.Module:
    """A deep copy, also where modules hold tensors that are no leaves of autograd (old-style weight norm).

    What cannot be copied (locks, open files) is shared.

    Args:
        model: Read only.
        spare: What is not copied: the copy will not keep it.

    Raises:
        ModelTypeError: If the copy is none, or the model cannot be copied.
    """
    spare = list(spare)
    memo: dict[int, Any] = {id(value): value for value in (*spare, *shared_on_copy(model))}
    for module in model.modules():
        for value in module.__dict__.values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone().requires_grad_(value.requires_grad)
    try:
        made = copy.deepcopy(model, memo)
    except Exception as error:  # a __deepcopy__ of one of its classes
        raise ModelTypeError(
            f"this {type(model).__name__} cannot be copied ({type(error).__name__}: {error}): pass inplace=True"
        ) from error
    check_copy(model, made, {id(value) for value in spare})
    return made
