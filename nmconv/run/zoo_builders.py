"""The zoos' builders, each replaced wherever it is known, as soon as the script imports the zoo."""

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

Build = Callable[..., nn.Module]
Built = Callable[[str, nn.Module], nn.Module]  # from a name and a model to the model that the caller gets

_building: ContextVar[bool] = ContextVar("_building", default=False)


def watch_builders(built: Built) -> None:
    """From now on, hand each model that a zoo builds to ``built`` first, with its name.

    A builder that another one calls is part of that one: only the outermost call counts. The zoos are not imported
    here, since a script may first set where they are found and what they read from the environment.
    """
    for zoo in ZOOS:
        if zoo in sys.modules:
            _patch(zoo, built)
        else:
            sys.meta_path.insert(0, _AfterImport(zoo, functools.partial(_patch, zoo, built)))


class _AfterImport(MetaPathFinder):
    """Calls a function when a package has been imported, parts and all."""

    def __init__(self, package: str, then: Callable[[], None]) -> None:
        self._package = package
        self._then = then

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
                self._then()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _patch(zoo: str, built: Built) -> None:
    by_name, registry = builders(zoo)
    first = next(iter(signature(by_name).parameters))
    watched = {id(build): _watched(build, functools.partial(_same, name), built) for name, build in registry.items()}
    watched[id(by_name)] = _watched(by_name, functools.partial(_argument, first), built)
    registry.update({name: watched[id(build)] for name, build in registry.items()})
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == zoo:
            space = vars(module)
            space.update({key: watched[id(value)] for key, value in space.items() if id(value) in watched})


def _watched(build: Build, name_of: Callable[..., str], built: Built) -> Build:
    @functools.wraps(build)
    def outermost(*args: Any, **kwargs: Any) -> nn.Module:
        if _building.get():
            return build(*args, **kwargs)
        token = _building.set(True)
        try:
            model = build(*args, **kwargs)
        finally:
            _building.reset(token)
        return built(name_of(*args, **kwargs), model)

    return outermost


def _same(name: str, *args: Any, **kwargs: Any) -> str:
    return name


def _argument(first: str, *args: Any, **kwargs: Any) -> str:
    """The first argument, given by position or by name."""
    return str(args[0] if args else kwargs[first])
