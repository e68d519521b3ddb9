"""Changing a model as a whole or not at all: what takes each change back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = [
    "Undo",
    "restoring",
    "restoring_children",
    "restoring_class",
    "restoring_tensor",
    "set_children",
    "undone",
    "undone_on_failure",
]

Undo = list[Callable[[], object]]


def undone(undo: Undo) -> None:
    """Take the changes back."""
    for step in reversed(undo):
        step()


@contextmanager
def undone_on_failure() -> Iterator[Undo]:
    """A list of what takes each change back, run backwards if something fails."""
    undo: Undo = []
    try:
        yield undo
    except BaseException:
        undone(undo)
        raise


def restoring_children(parent: nn.Module) -> Callable[[], object]:
    """What gives the module the children that it has now."""
    before = dict(parent._modules)
    return lambda: set_children(parent, before)


def set_children(parent: nn.Module, children: dict[str, nn.Module | None]) -> None:
    """Give the module these children, in this order."""
    parent._modules.clear()
    parent._modules.update(children)


def restoring_class(module: nn.Module) -> Callable[[], object]:
    """What gives the module the class that it has now."""
    before = type(module)
    return lambda: object.__setattr__(module, "__class__", before)


def restoring(module: nn.Module) -> Callable[[], object]:
    """What gives the module the class and the attributes that it has now."""
    before, class_again = dict(module.__dict__), restoring_class(module)

    def restore() -> None:
        class_again()
        module.__dict__.clear()
        module.__dict__.update(before)

    return restore


def restoring_tensor(tensor: Tensor) -> Callable[[], object]:
    """What gives the tensor the numbers that it has now."""
    before = tensor.detach().clone()

    def restore() -> None:
        with torch.no_grad():
            tensor.copy_(before)

    return restore
