"""Intercept the model builders of timm and torchvision, once the script has imported them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from inspect import signature
from types import ModuleType
from typing import Any

from torch import nn

from nmconv.flow import ZOOS, builders

__all__ = ["watch_builders"]

Builder = Callable[..., nn.Module]
OnBuilt = Callable[[str, nn.Module], nn.Module]  # takes a name and a model, returns the model that the caller gets

_is_building: ContextVar[bool] = ContextVar("_is_building", default=False)


def watch_builders(on_built: OnBuilt) -> None:
    """From now on, pass each model that a zoo builds through ``on_built``, with its name.

    Only the outermost builder call counts: builders call each other. The zoos are not imported here, because a script
    may first set their import path and the environment variables that they read.
    """
    for zoo in ZOOS:
        if zoo in sys.modules:
            _patch(zoo, on_built)
        else:
            sys.meta_path.insert(0, _AfterImport(zoo, functools.partial(_patch, zoo, on_built)))


class _AfterImport(MetaPathFinder):
    """A finder that calls a function once a package has been imported completely."""

    def __init__(self, package: str, callback: Callable[[], None]) -> None:
        self._package = package
        self._callback = callback

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._package:
            return None
        sys.meta_path.remove(self)
        try:
            spec = find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self._callback()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _patch(zoo: str, on_built: OnBuilt) -> None:
    """Replace a zoo's builders in its registry and in each of its modules that holds them."""
    by_name, registry = builders(zoo)
    name_parameter = next(iter(signature(by_name).parameters))
    watched = {
        id(builder): _watched(builder, functools.partial(_fixed_name, name), on_built)
        for name, builder in registry.items()
    }
    watched[id(by_name)] = _watched(by_name, functools.partial(_name_argument, name_parameter), on_built)
    registry.update({name: watched[id(builder)] for name, builder in registry.items()})
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] == zoo:
            namespace = vars(module)
            namespace.update({key: watched[id(value)] for key, value in namespace.items() if id(value) in watched})


def _watched(builder: Builder, name_of_call: Callable[..., str], on_built: OnBuilt) -> Builder:
    """Return a builder that passes its models through ``on_built``, except in calls made by other builders.

    Args:
        builder: The original builder.
        name_of_call: Returns the model's name, given the arguments of the call.
        on_built: As for :func:`watch_builders`.
    """

    @functools.wraps(builder)
    def build(*args: Any, **kwargs: Any) -> nn.Module:
        if _is_building.get():
            return builder(*args, **kwargs)
        token = _is_building.set(True)
        try:
            model = builder(*args, **kwargs)
        finally:
            _is_building.reset(token)
        return on_built(name_of_call(*args, **kwargs), model)

    return build


def _fixed_name(name: str, /, *args: Any, **kwargs: Any) -> str:
    return name


def _name_argument(parameter: str, /, *args: Any, **kwargs: Any) -> str:
    """Return the first argument, which is passed by position or by name."""
    return str(args[0] if args else kwargs[parameter])
