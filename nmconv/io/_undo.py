"""A model changed as a whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["undone_if_failing"]


@contextmanager
def undone_if_failing(model: nn.Module) -> Iterator[None]:
    """Put everything back if the body raises: classes, attributes, children, and the values of all tensors.

    It keeps a copy of the parameters and buffers meanwhile.
    """
    undo = [_restoring(module) for module in model.modules()]
    undo += [_restoring_value(value) for value in {id(value): value for value in _tensors(model)}.values()]
    try:
        yield
    except BaseException:
        for step in undo:
            step()
        raise


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _restoring(module: nn.Module) -> Callable[[], None]:
    cls, space = type(module), module.__dict__
    held = [(part, dict(part)) for part in (space["_parameters"], space["_buffers"], space["_modules"], space)]

    def restore() -> None:
        object.__setattr__(module, "__class__", cls)
        for part, before in held:
            part.clear()
            part.update(before)

    return restore


def _restoring_value(tensor: Tensor) -> Callable[[], None]:
    data, before, wants = tensor.data, tensor.detach().clone(), tensor.requires_grad
    version = tensor._version

    def restore() -> None:
        if tensor.requires_grad != wants:
            tensor.requires_grad_(wants)
        if tensor._version != version or tensor.data_ptr() != data.data_ptr():
            with torch.no_grad():
                tensor.data = data
                tensor.copy_(before)

    return restore
