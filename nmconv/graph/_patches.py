"""Fx's patches, made once for many traces of single methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

from torch import nn
from torch.fx import Tracer
from torch.fx.proxy import Proxy

from nmconv.graph._proxy import patched_isinstance
from nmconv.graph._tracer import FlowTracer

__all__ = ["Patches"]


class Patches(Tracer):
    """The patches that fx makes for one trace, kept for many: making them takes longer than tracing a block.

    They are a trace of an empty module during which methods are traced by :meth:`FlowTracer.run_in`. While one is, its
    tracer is asked instead of this one. What fx patches besides ``nn.Module`` it finds in the globals of what is
    called; so that no method depends on which others are traced, it is shown those of all classes to begin with.

    Args:
        classes: Of all the model's modules.
    """

    def __init__(self, classes: Iterable[type[nn.Module]]) -> None:
        super().__init__()
        self._classes = list(dict.fromkeys(classes))
        self._outer = nn.Module()
        self._running: FlowTracer | None = None
        self._do: Callable[[], Any]

    def keep(self, do: Callable[[], None]) -> None:
        """Call ``do``, which traces methods."""
        with patched_isinstance(set()) as shadow:
            for cls in self._classes:
                shadow(cls)
            self._do = do
            self.trace(self._outer)

    def create_args_for_root(self, *_: Any, **__: Any) -> tuple[Any, list[Any]]:
        """What fx calls under its patches."""
        do = self._do

        def begin() -> None:
            for function in _of_each_file(self._classes):
                self._called(function, lambda: None)
            do()

        return begin, []

    def call(self, tracer: FlowTracer, function: Callable[..., Any], do: Callable[[], Any]) -> Any:
        """``do``, which runs ``function``, while modules and attributes are the tracer's."""
        self._running = tracer
        try:
            return self._called(function, do)
        finally:
            self._running = None

    def _called(self, function: Callable[..., Any], do: Callable[[], Any]) -> Any:
        """``do`` as the forward of a module that fx sees called, whose globals are those of ``function``."""
        self._outer.__dict__["forward"] = function
        self._do = do
        return self._outer()

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Proxy]) -> Any:
        tracer = self._running
        return attr_val if tracer is None else tracer.getattr(attr, attr_val, tracer.proxies)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if m is self._outer:
            return self._do()
        if self._running is None:
            return forward(*args, **kwargs)
        return self._running.call_module(m, forward, args, kwargs)


def _of_each_file(classes: Iterable[type]) -> Iterable[FunctionType]:
    """One method for every file that the classes' methods are from."""
    bases = dict.fromkeys(base for cls in classes for base in cls.__mro__)
    methods = (value for base in bases for value in vars(base).values() if isinstance(value, FunctionType))
    return {id(method.__globals__): method for method in methods}.values()
