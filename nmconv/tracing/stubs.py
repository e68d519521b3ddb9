"""A model's copy whose modules report their calls to a tracer, so that tracing patches nothing in the process."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch
from torch import nn

from nmconv.copying import meta_copy
from nmconv.errors import RewriteError
from nmconv.flow import is_activation
from nmconv.tracing.shadowed_builtins import ShadowedBuiltins
from nmconv.tracing.tracer import MethodTracer

__all__ = ["Stubs"]

_MODE = "_nmconv_mode"


class _Stub:
    """Base of all stub classes; hides them from the ``__init_subclass__`` of the model's own classes."""

    def __init_subclass__(cls, **_: Any) -> None:
        pass


class Stubs:
    """A copy of a model on the meta device, in which each module's class is replaced by a stub subclass.

    Args:
        model: The model; only read.

    Attributes:
        model: The copy.
        tracer: To whom modules report calls and reads of tensors and numbers; if None, they behave as usual.
        mode_queries: Ids of the modules whose mode was read.
        activations: Ids of the modules that are activations.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tracer: MethodTracer | None = None
        self.mode_queries: set[int] = set()
        self._shadows = ShadowedBuiltins()
        self.model = meta_copy(model).model
        self.activations = frozenset(id(module) for module in self.model.modules() if is_activation(module))
        stubs: dict[type[nn.Module], type[nn.Module]] = {}
        for module in self.model.modules():
            cls = type(module)
            if cls not in stubs:
                stubs[cls] = self._stub_of(cls)
            module.__dict__[_MODE] = module.__dict__.pop("training", False)
            module.__class__ = stubs[cls]

    def _stub_of(self, cls: type[nn.Module]) -> type[nn.Module]:
        metaclass: Any = type(cls)
        try:
            stub: type[nn.Module] = metaclass(cls.__name__, (_Stub, cls), self._namespace(cls))
        except TypeError as error:
            raise RewriteError(f"no subclass of {cls.__name__} can be made: {error}") from error
        return stub

    def _namespace(self, cls: type[nn.Module]) -> dict[str, Any]:
        """Return the stub's attributes: copies of all methods, and special methods that report to the tracer."""
        original_call: Any = cls.__call__
        original_getattr: Any = cls.__getattr__
        original_getattribute: Any = cls.__getattribute__

        def call(module: Any, *args: Any, **kwargs: Any) -> Any:
            if self.tracer is None:
                return original_call(module, *args, **kwargs)
            return self.tracer.call_part(module, args, kwargs)

        def getattr_(module: Any, name: str) -> Any:
            value = original_getattr(module, name)
            return self.tracer.tensor(value) if self.tracer is not None and isinstance(value, torch.Tensor) else value

        def getattribute(module: Any, name: str) -> Any:
            value = original_getattribute(module, name)
            if self.tracer is None or type(value) not in (int, float) or name.startswith("_"):
                return value
            return self.tracer.setting(module, name, value)

        def get_mode(module: Any) -> bool:
            self.mode_queries.add(id(module))
            return bool(module.__dict__[_MODE])

        def set_mode(module: Any, value: bool) -> None:
            module.__dict__[_MODE] = value

        methods = {
            name: self._shadows.copy_of(value)
            for base in reversed(cls.__mro__)
            for name, value in vars(base).items()
            if base is not nn.Module and type(value) is FunctionType and not name.startswith("__")
        }
        return {
            **methods,
            "__call__": call,
            "__getattr__": getattr_,
            "__getattribute__": getattribute,
            "training": property(get_mode, set_mode),
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
        }
