"""Who looks at a leaf while forwards run: at its settings, its parameters or its class, and does not just call it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

from torch import nn

from nmconv.graph._modules import leaf_op

__all__ = ["looks_noted"]

_OURS = __name__.partition(".")[0]


@contextmanager
def looks_noted(root: nn.Module, found: set[int]) -> Iterator[None]:
    """Note the ids of leaves of which Python code that is neither torch's nor ours reads an attribute.

    ``training`` is not noted: what replaces a module is in its mode. Code that asks through torch (``parameters()``,
    ``state_dict()``) is noted for all leaves that torch looks at for it.

    Args:
        root: Whose forward runs meanwhile.
        found: Gets the ids.
    """
    classes = {type(module) for module in root.modules() if leaf_op(module) is not None}
    with ExitStack() as stack:
        for cls in classes:
            stack.enter_context(_spied(cls, found))
        yield


@contextmanager
def _spied(cls: type[nn.Module], found: set[int]) -> Iterator[None]:
    plain = cls.__getattribute__
    own = cls.__dict__.get("__getattribute__")

    def reading(self: nn.Module, name: str) -> Any:
        if name != "training" and _is_anothers(sys._getframe(1)):
            found.add(id(self))
        return plain(self, name)

    cls.__getattribute__ = reading  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        if own is None:
            del cls.__getattribute__
        else:
            cls.__getattribute__ = own  # type: ignore[method-assign]


def _is_anothers(frame: FrameType | None) -> bool:
    """Whether neither torch's code nor ours is what asks; modules ask modules on behalf of whoever called them."""
    while frame is not None:
        name = frame.f_globals.get("__name__") or ""
        if not name.startswith("torch.nn."):
            return name.partition(".")[0] not in ("torch", _OURS)
        frame = frame.f_back
    return False
