"""Subclasses with rewritten methods that pass for their base: isinstance, name, pickling and copying still work."""

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

__all__ = ["RewrittenMethod", "is_rewritten", "rewritten_class"]

_file_numbers = itertools.count()  # a file name per method: each removes its lines from linecache on its own


@dataclass(frozen=True)
class RewrittenMethod:
    """A method as source code: pickled and copied as such, compiled on demand.

    Attributes:
        name: The method's name.
        source: Python source that defines it, and the helpers it calls.
        names: Globals that can be imported: pairs of a name and ``module:attribute.path``.
        values: All other globals: pairs of a name and a picklable value.
    """

    name: str
    source: str
    names: tuple[tuple[str, str], ...] = ()
    values: tuple[tuple[str, Any], ...] = ()

    @staticmethod
    def with_globals(name: str, source: str, namespace: dict[str, Any]) -> RewrittenMethod:
        """Return a method with the given globals; those that can be imported are stored by name."""
        names, values = [], []
        for key, value in namespace.items():
            path = _import_path(value)
            if path is None:
                values.append((key, value))
            else:
                names.append((key, path))
        return RewrittenMethod(name, source, tuple(names), tuple(values))

    def compile(self) -> FunctionType:
        """Return the method as a function, whose source shows in tracebacks as long as the function exists."""
        namespace: dict[str, Any] = {"__builtins__": builtins}
        namespace.update((key, _imported(path)) for key, path in self.names)
        namespace.update(self.values)
        file = f"<nmconv {self.name} {next(_file_numbers)}>"
        exec(compile(self.source, file, "exec"), namespace)
        function: FunctionType = namespace[self.name]
        linecache.cache[file] = (len(self.source), None, self.source.splitlines(keepends=True), file)
        weakref.finalize(function, linecache.cache.pop, file, None).atexit = False
        return function


def _import_path(value: Any) -> str | None:
    """Return the ``module:name`` under which an object can be imported, or None."""
    short_name = getattr(value, "__name__", None)
    for module in (getattr(value, "__module__", None), "torch", "torch.nn.functional", "torch._C._nn", "builtins"):
        for name in (getattr(value, "__qualname__", None) or short_name, short_name):
            if module and isinstance(name, str) and "<" not in name:
                with suppress(ImportError, AttributeError, ValueError):
                    if _imported(f"{module}:{name}") is value:
                        return f"{module}:{name}"
    return None


def _imported(path: str) -> Any:
    module, _, name = path.partition(":")
    value: Any = importlib.import_module(module)
    for part in name.split("."):
        value = getattr(value, part)
    return value


class _Rewritten:
    """Base of all rewritten classes: instances pickle as their original class and the methods' source."""

    _nmconv_base: type[nn.Module]
    _nmconv_methods: tuple[RewrittenMethod, ...]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: tuple[Any, ...] = super().__reduce_ex__(protocol)  # type: ignore[assignment]
        return (_new, (self._nmconv_base, self._nmconv_methods), *reduced[2:])


def _new(base: type[nn.Module], methods: tuple[RewrittenMethod, ...]) -> Any:
    cls = rewritten_class(base, methods)
    return cls.__new__(cls)


def is_rewritten(module: nn.Module) -> bool:
    """Return whether a module's class was made by :func:`rewritten_class`."""
    return isinstance(module, _Rewritten)


def rewritten_class(base: type[nn.Module], methods: tuple[RewrittenMethod, ...]) -> type[nn.Module]:
    """Return the subclass of ``base`` with these methods in place of its own.

    Equal arguments give the same class, as long as it is in use. A ``base`` that is rewritten itself keeps its other
    rewritten methods.

    Raises:
        RewriteError: If ``base`` customizes copying or pickling, which would lose the rewritten methods.
    """
    for name in ("__deepcopy__", "__reduce__", "__reduce_ex__", "__copy__"):
        if getattr(base, name, None) is not getattr(nn.Module, name, None) and not issubclass(base, _Rewritten):
            raise RewriteError(f"{base.__name__} defines {name}: its copies would not be rewritten")
    if issubclass(base, _Rewritten):
        other = tuple(method for method in base._nmconv_methods if method.name not in {new.name for new in methods})
        base, methods = base._nmconv_base, (*other, *methods)
    key = (base, tuple((method, _nested_types(method.values)) for method in methods))
    try:
        cached = _classes.get(key)
    except TypeError:  # a global is not hashable
        return _subclass(base, methods)
    return _classes.setdefault(key, _subclass(base, methods)) if cached is None else cached


def _subclass(base: type[nn.Module], methods: tuple[RewrittenMethod, ...]) -> type[nn.Module]:
    attributes: dict[str, Any] = {method.name: method.compile() for method in methods}
    for name, function in attributes.items():
        original: Any = getattr(base, name, None)
        with suppress(TypeError, ValueError):
            function.__signature__ = inspect.signature(original)
        function.__doc__ = getattr(original, "__doc__", None)
        function.__qualname__ = f"{base.__qualname__}.{name}"
        function.__module__ = __name__  # never torch's, even if that of the base is
    attributes |= {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_nmconv_base": base,
        "_nmconv_methods": methods,
    }
    metaclass: Any = type(base)
    try:
        return metaclass(base.__name__, (_Rewritten, base), attributes)
    except Exception as error:
        raise RewriteError(f"no subclass of {base.__name__} can be made: {error}") from error


_classes: weakref.WeakValueDictionary[Any, type[nn.Module]] = weakref.WeakValueDictionary()


def _nested_types(value: Any) -> Any:
    """Return the types in a nested tuple: 1, 1.0 and True compare equal, and so do named tuples of two classes."""
    return (type(value), *map(_nested_types, value)) if isinstance(value, tuple) else type(value)
