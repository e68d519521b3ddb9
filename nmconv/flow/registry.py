"""Classes whose kind the user has registered: for modules that cannot be looked into."""

from __future__ import annotations

import threading
from types import TracebackType

from torch import nn

from nmconv.errors import OptionError
from nmconv.flow import zoo
from nmconv.flow.ops import MODULES, Op, has_torch_forward

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
_registered: dict[type[nn.Module], tuple[str, int]] = {}  # the kind, and the number of active registrations


class Registration:
    """A registered class; as a context manager, it withdraws the registration at its end."""

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
            name, count = _registered[cls]
            if count > 1:
                _registered[cls] = (name, count - 1)
            else:
                del _registered[cls]


def register(cls: type[nn.Module], kind: str) -> Registration:
    """Declare the kind of all modules of a class, for classes that nmconv cannot look into.

    For autograd functions, compiled code and the like. Each call of such a module is one step, whatever happens inside.
    The registration holds for all models and all threads, and for subclasses that do not override ``forward``.

    Args:
        cls: The class.
        kind: ``"activation"``: elementwise and nonlinear, so that plans may drop it. ``"norm"`` or ``"conv"``: counted
            as one, and never merged or folded, since its weights are not known. ``"identity"``: returns its input in
            eval mode. ``"leaf"``: anything else.

    Returns:
        A context manager that withdraws the registration at its end. Without ``with``, the registration stays.

    Raises:
        OptionError: If ``cls`` is not a module class, is a container or is already known as another kind, or if
            ``kind`` is invalid.

    Example:
        >>> import nmconv
        >>> from torch import nn
        >>> class Spike(nn.Module):  # not recognized as an activation, since it has no derivative
        ...     def forward(self, x):
        ...         return (x > 0).to(x.dtype)
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), Spike(), nn.Conv2d(8, 8, 3), Spike())
        >>> with nmconv.register(Spike, "activation"):
        ...     nmconv.make_plan(model, "2:1").counts.activations_before
        2
    """
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        what = f"an object of {type(cls).__name__}" if isinstance(cls, nn.Module) else repr(cls)
        raise OptionError(f"{what} is not a class of modules: register the class itself, a subclass of nn.Module")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise OptionError(f"kind={kind!r}: give one of {', '.join(map(repr, _KINDS))}")
    if cls in _CONTAINERS:
        raise OptionError(f"{cls.__name__} is a container of other modules: register a class of your own")
    known = _built_in_op(cls)
    if known not in (None, _KINDS[kind]):
        name = next((name for name, op in _KINDS.items() if op is known), known.name.lower())
        raise OptionError(f"{_name_of(cls)} is known as {name!r} already: register a class of your own")
    with _lock:
        before, count = _registered.get(cls, (kind, 0))
        if before != kind:
            raise OptionError(
                f"{_name_of(cls)} is registered as {before!r} already, and cannot be {kind!r}, too: end the first "
                "registration first"
            )
        _registered[cls] = (kind, count + 1)
    return Registration(cls)


def registered_kind(module: nn.Module) -> str:
    """Return the registered kind of the module's class, or ""."""
    cls = type(module)
    for base in cls.__mro__ if _registered else ():
        kind, _ = _registered.get(base, ("", 0))
        if kind:
            return kind if cls.forward is getattr(base, "forward", None) and "forward" not in module.__dict__ else ""
    return ""


def registered_op(module: nn.Module) -> Op | None:
    """Return the operation of the module's registered kind, or None."""
    return _KINDS.get(registered_kind(module))


def registered_names(model: nn.Module) -> tuple[tuple[str, str], ...]:
    """Return the sorted qualified names and kinds of the registered classes in a model."""
    return tuple(sorted({(_name_of(type(part)), kind) for part in model.modules() if (kind := registered_kind(part))}))


def _name_of(cls: type[nn.Module]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _built_in_op(cls: type[nn.Module]) -> Op | None:
    """Return the kind that nmconv knows without registration, or None."""
    known = zoo.module_op(cls)
    if known is None and has_torch_forward(cls):
        known = next((op for base in cls.__mro__ if (op := MODULES.get(base)) is not None), None)
    return known
