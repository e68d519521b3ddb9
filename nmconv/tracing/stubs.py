"""A model's copy whose modules, when called, tell a tracer: so that no trace patches ``nn.Module`` for the process."""

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


class _Stub:
    """Keeps the classes of stubs from those who want to know of subclasses."""

    def __init_subclass__(cls, **_: Any) -> None:
        pass


class Stubs:
    """A copy on the meta device, each of whose modules is of a subclass of its class.

    Args:
        model: Read only.

    Attributes:
        tracer: Who is told of calls and reads of tensors; None: modules do what they do.
        asked: Ids of the modules that were asked for their mode.
        activations: Ids of the modules that are some.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tracer: MethodTracer | None = None
        self.asked: set[int] = set()
        self._shadows = ShadowedBuiltins()
        self.model = meta_copy(model).model
        self.activations = frozenset(id(module) for module in self.model.modules() if is_activation(module))
        classes: dict[type[nn.Module], type[nn.Module]] = {}
        for module in self.model.modules():
            cls = type(module)
            if cls not in classes:
                classes[cls] = self._stub_of(cls)
            module.__dict__["_nmconv_mode"] = module.__dict__.pop("training", False)
            module.__class__ = classes[cls]

    def _stub_of(self, cls: type[nn.Module]) -> type[nn.Module]:
        def call(module: Any, *args: Any, **kwargs: Any) -> Any:
            if self.tracer is None:
                return plain_call(module, *args, **kwargs)
            return self.tracer.call_part(module, args, kwargs)

        def get(module: Any, name: str) -> Any:
            value = plain_get(module, name)
            return self.tracer.tensor(value) if self.tracer is not None and isinstance(value, torch.Tensor) else value

        def read(module: Any, name: str) -> Any:
            value = plain_read(module, name)
            if self.tracer is None or type(value) not in (int, float) or name.startswith("_"):
                return value
            return self.tracer.setting(module, name, value)

        def mode(module: Any) -> bool:
            self.asked.add(id(module))
            return bool(module.__dict__["_nmconv_mode"])

        def set_mode(module: Any, value: bool) -> None:
            module.__dict__["_nmconv_mode"] = value

        plain_call: Any = cls.__call__
        plain_get: Any = cls.__getattr__
        plain_read: Any = cls.__getattribute__
        methods = {
            name: self._shadows.of(value)
            for base in reversed(cls.__mro__)
            for name, value in vars(base).items()
            if base is not nn.Module and type(value) is FunctionType and not name.startswith("__")
        }
        space = {
            **methods,
            "__call__": call,
            "__getattr__": get,
            "__getattribute__": read,
            "training": property(mode, set_mode),
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
        }
        metaclass: Any = type(cls)
        try:
            made: type[nn.Module] = metaclass(cls.__name__, (_Stub, cls), space)
        except TypeError as error:
            raise RewriteError(f"no subclass of {cls.__name__} can be made: {error}") from error
        return made
