"""Classes with other methods that are still themselves: isinstance, name, pickling and copying stay."""

from __future__ import annotations

import builtins
import importlib
import inspect
import itertools
import linecache
import weakref
from contextlib import suppress
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from torch import nn

from nmconv.errors import RewriteError

__all__ = ["RewrittenMethod", "is_rewritten", "rewritten"]


_numbers = itertools.count()  # no two methods share a file: one's lines go while the other's are still needed


@dataclass(frozen=True)
class RewrittenMethod:
    """A method as source: pickled and copied as such, compiled where it is needed.

    Attributes:
        name: The method's name.
        source: Python source that defines it, and the helpers it calls.
        names: What its globals are bound to: pairs of a name and ``module:attribute.path``.
        values: What its globals are bound to otherwise: pairs of a name and a picklable value.
    """

    name: str
    source: str
    names: tuple[tuple[str, str], ...] = ()
    values: tuple[tuple[str, Any], ...] = ()

    @staticmethod
    def with_globals(name: str, source: str, bound: dict[str, Any]) -> RewrittenMethod:
        """A method whose globals are objects; those that can be imported are kept by name."""
        names, values = [], []
        for key, value in bound.items():
            path = _import_path(value)
            if path is None:
                values.append((key, value))
            else:
                names.append((key, path))
        return RewrittenMethod(name, source, tuple(names), tuple(values))

    def compile(self) -> FunctionType:
        """The method itself; its source shows in tracebacks for as long as it is there."""
        space: dict[str, Any] = {"__builtins__": builtins}
        space.update((key, _imported(path)) for key, path in self.names)
        space.update(self.values)
        file = f"<nmconv {self.name} {next(_numbers)}>"
        exec(compile(self.source, file, "exec"), space)
        function: FunctionType = space[self.name]
        linecache.cache[file] = (len(self.source), None, self.source.splitlines(keepends=True), file)
        weakref.finalize(function, linecache.cache.pop, file, None).atexit = False
        return function


def _import_path(value: Any) -> str | None:
    """``module:name`` under which the very object can be imported, or None."""
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
    for module in (getattr(value, "__module__", None), "torch", "torch.nn.functional", "torch._C._nn", "builtins"):
        candidates: tuple[Any, ...] = (name, getattr(value, "__name__", None))
        for candidate in candidates:
            if module and isinstance(candidate, str) and "<" not in candidate:
                try:
                    if _imported(f"{module}:{candidate}") is value:
                        return f"{module}:{candidate}"
                except (ImportError, AttributeError, ValueError):
                    pass
    return None


def _imported(path: str) -> Any:
    module, _, name = path.partition(":")
    value: Any = importlib.import_module(module)
    for part in name.split("."):
        value = getattr(value, part)
    return value


class _Rewritten:
    """Marks rewritten classes, and makes their instances pickle as base class and source."""

    _nmconv_base: type[nn.Module]
    _nmconv_methods: tuple[RewrittenMethod, ...]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: tuple[Any, ...] = super().__reduce_ex__(protocol)  # type: ignore[assignment]
        return (_new, (self._nmconv_base, self._nmconv_methods), *reduced[2:])


def _new(base: type[nn.Module], methods: tuple[RewrittenMethod, ...]) -> Any:
    cls = rewritten(base, methods)
    return cls.__new__(cls)


def is_rewritten(module: nn.Module) -> bool:
    """Whether the module's class is one of ours."""
    return isinstance(module, _Rewritten)


def rewritten(base: type[nn.Module], methods: tuple[RewrittenMethod, ...]) -> type[nn.Module]:
    """The subclass of ``base`` with these methods in place of its own; one class for all who ask for the same.

    It goes when nobody has it any more.

    Raises:
        RewriteError: If instances of ``base`` copy or pickle in a way of their own, which would undo the rewriting.
    """
    for name in ("__deepcopy__", "__reduce__", "__reduce_ex__", "__copy__"):
        if getattr(base, name, None) is not getattr(nn.Module, name, None) and not issubclass(base, _Rewritten):
            raise RewriteError(f"{base.__name__} defines {name}: its copies would not be rewritten")
    if issubclass(base, _Rewritten):
        kept = tuple(method for method in base._nmconv_methods if method.name not in {new.name for new in methods})
        base, methods = base._nmconv_base, (*kept, *methods)
    key = (base, tuple((method, _kinds(method.values)) for method in methods))
    try:
        known = _made.get(key)
    except TypeError:  # a global that cannot be hashed
        return _make(base, methods)
    return _made.setdefault(key, _make(base, methods)) if known is None else known


def _make(base: type[nn.Module], methods: tuple[RewrittenMethod, ...]) -> type[nn.Module]:
    space: dict[str, Any] = {method.name: method.compile() for method in methods}
    for name, function in space.items():
        original: Any = getattr(base, name, None)
        with suppress(TypeError, ValueError):
            function.__signature__ = inspect.signature(original)
        function.__doc__ = getattr(original, "__doc__", None)
        function.__qualname__ = f"{base.__qualname__}.{name}"
        function.__module__ = __name__  # not torch's, whatever the base is
    space |= {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_nmconv_base": base,
        "_nmconv_methods": methods,
    }
    metaclass: Any = type(base)
    try:
        return metaclass(base.__name__, (_Rewritten, base), space)
    except Exception as error:
        raise RewriteError(f"no subclass of {base.__name__} can be made: {error}") from error


_made: weakref.WeakValueDictionary[Any, type[nn.Module]] = weakref.WeakValueDictionary()


def _kinds(value: Any) -> Any:
    """The types in a value: 1, 1.0 and True are equal, and so are named tuples of two classes."""
    return (type(value), *map(_kinds, value)) if isinstance(value, tuple) else type(value)
