"""Classes of which the user says what they are: for modules that cannot be looked into."""

from __future__ import annotations

import threading
from types import TracebackType

from torch import nn

from nmconv.errors import OptionError
from nmconv.flow import zoo
from nmconv.flow.ops import MODULES, Op, is_torchs

__all__ = ["Registration", "register", "registered_kind", "registered_names", "registered_op"]

_KINDS = {
    "activation": Op.ACT,
    "norm": Op.NORM,
    "conv": Op.CONV,
    "identity": Op.PASS,
    "leaf": Op.OTHER,
}
_CONTAINERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)
_lock = threading.Lock()
_registered: dict[type[nn.Module], tuple[str, int]] = {}  # the kind, and how often it was said and not taken back


class Registration:
    """What :func:`register` returns: as a context manager, it takes the registration back at its end."""

    def __init__(self, cls: type[nn.Module]) -> None:
        self._cls: type[nn.Module] | None = cls

    def __enter__(self) -> Registration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        cls, self._cls = self._cls, None
        if cls is None:
            return
        with _lock:
            name, times = _registered[cls]
            if times > 1:
                _registered[cls] = (name, times - 1)
            else:
                del _registered[cls]


def register(cls: type[nn.Module], kind: str) -> Registration:
    """Say what modules of a class are, for all models and all threads, where nmconv cannot see it.

    For autograd functions, compiled code and the like. Each call of such a module is one step, whatever is in it;
    subclasses count as well, unless they bring a forward of their own.

    Args:
        cls: The class.
        kind: ``"activation"``: elementwise and bent, so that plans may drop it. ``"norm"`` or ``"conv"``: counted as
            one, and never merged or folded, since its numbers are not known. ``"identity"``: hands on what it gets in
            eval mode. ``"leaf"``: anything else, not to be looked into.

    Returns:
        A context manager that takes the registration back at its end. Without ``with`` it stays.

    Raises:
        OptionError: If ``cls`` is no class of modules, a container, or known as another kind already, or if ``kind``
            is none of these.
    """
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        what = f"an object of {type(cls).__name__}" if isinstance(cls, nn.Module) else repr(cls)
        raise OptionError(f"{what} is no class of modules: register the class itself, a subclass of nn.Module")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise OptionError(f"kind is {kind!r}; give one of {', '.join(map(repr, _KINDS))}")
    if cls in _CONTAINERS:
        raise OptionError(f"{cls.__name__} is what other modules are made of: register a class of your own")
    known = _known(cls)
    if known not in (None, _KINDS[kind]):
        raise OptionError(f"{_name_of(cls)} is known as {known.name.lower()} already: register a class of your own")
    with _lock:
        before, times = _registered.get(cls, (kind, 0))
        if before != kind:
            raise OptionError(
                f"{_name_of(cls)} is registered as {before!r} already, and cannot be {kind!r} too: leave the context "
                "of the first registration before"
            )
        _registered[cls] = (kind, times + 1)
    return Registration(cls)


def _name_of(cls: type[nn.Module]) -> str:
    """The class's full name."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _known(cls: type[nn.Module]) -> Op | None:
    """What nmconv knows of a class by itself."""
    known = zoo.module_op(cls)
    if known is None and is_torchs(cls):
        known = next((op for base in cls.__mro__ if (op := MODULES.get(base)) is not None), None)
    return known


def registered_kind(module: nn.Module) -> str:
    """As what the module's class is registered, or ""."""
    cls = type(module)
    for base in cls.__mro__ if _registered else ():
        kind, _ = _registered.get(base, ("", 0))
        if kind:
            return kind if cls.forward is getattr(base, "forward", None) and "forward" not in module.__dict__ else ""
    return ""


def registered_op(module: nn.Module) -> Op | None:
    """The same as an operation, or None."""
    return _KINDS.get(registered_kind(module))


def registered_names(model: nn.Module) -> tuple[tuple[str, str], ...]:
    """The full names of all registered classes that are in a model, and as what, sorted."""
    return tuple(sorted({(_name_of(type(part)), kind) for part in model.modules() if (kind := registered_kind(part))}))
