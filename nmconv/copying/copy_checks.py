"""The check that a copy of a model is independent of the model and equal to it."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import nn

from nmconv.errors import ModelTypeError

__all__ = ["check_copy"]

_HINT = "(does a class define __deepcopy__?): pass inplace=True"


def check_copy(model: nn.Module, model_copy: nn.Module, shareable: Container[int] = ()) -> None:
    """Raise ModelTypeError unless a copy is independent of its model and equal to it.

    Args:
        model: The model that was copied.
        model_copy: The copy.
        shareable: Ids of modules that the two may share.

    Raises:
        ModelTypeError: If the copy shares other modules, or differs in structure or in values.
    """
    subject = f"a copy of this {type(model).__name__}"
    unshareable = {id(module) for module in model.modules() if id(module) not in shareable}
    for name, module in model_copy.named_modules():
        if id(module) in unshareable:
            raise ModelTypeError(f"{subject} shares {name or 'everything'} with it {_HINT}")
    _check_structure(model, model_copy, subject)
    if any(hasattr(type(module), "__deepcopy__") for module in model.modules()):
        for (name, one), (_, other) in zip(_named_tensors(model), _named_tensors(model_copy), strict=True):
            if one.shape != other.shape or not (other.is_meta or torch.equal(_bytes_of(one), _bytes_of(other))):
                raise ModelTypeError(f"{subject} has other values in {name!r} than the model {_HINT}")


def _check_structure(model: nn.Module, model_copy: nn.Module, subject: str) -> None:
    """Raise ModelTypeError unless names and classes of all modules, and names of all tensors, are equal."""
    modules, modules_copied = (
        [(name, type(part).__module__, type(part).__qualname__) for name, part in each.named_modules()]
        for each in (model, model_copy)
    )
    tensors, tensors_copied = ([(name, "", "") for name, _ in _named_tensors(each)] for each in (model, model_copy))
    if (modules, tensors) == (modules_copied, tensors_copied):
        return
    pairs = (*zip(modules, modules_copied, strict=False), *zip(tensors, tensors_copied, strict=False))
    first = next((one[0] for one, other in pairs if one != other), "")
    beginning = f", beginning with {first!r}" if first else ""
    raise ModelTypeError(f"{subject} has another structure than the model{beginning} {_HINT}")


def _named_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _bytes_of(value: torch.Tensor) -> torch.Tensor:
    return value.detach().reshape(-1).contiguous().view(torch.uint8)
