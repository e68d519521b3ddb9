"""Deep copies of models by ``copy.deepcopy``, as a user would make them."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from nmconv.copying.copy_checks import check_copy
from nmconv.copying.held_objects import uncopyable_objects
from nmconv.errors import ModelTypeError

__all__ = ["copy_model"]


def copy_model(model: nn.Module, shared: Iterable[Tensor | nn.Module] = ()) -> nn.Module:
    """Return a deep copy, even if modules hold non-leaf tensors of autograd (old-style weight norm).

    Objects that cannot be copied (locks, open files) are shared.

    Args:
        model: Read only.
        shared: Tensors and modules to share instead of copying, because the caller will remove them from the copy.

    Raises:
        ModelTypeError: If the model cannot be copied, or the copy shares modules with it or differs from it.
    """
    shared = list(shared)
    memo: dict[int, Any] = {id(value): value for value in (*shared, *uncopyable_objects(model))}
    for module in model.modules():
        for value in module.__dict__.values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone().requires_grad_(value.requires_grad)
    try:
        model_copy = copy.deepcopy(model, memo)
    except Exception as error:  # a class's own __deepcopy__ may raise anything
        raise ModelTypeError(
            f"this {type(model).__name__} cannot be copied ({type(error).__name__}: {error}): pass inplace=True"
        ) from error
    check_copy(model, model_copy, {id(value) for value in shared})
    return model_copy
