"""Methods of modules as fx graphs, each child a single call: what rewriting starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from nmconv.errors import RewriteError
from nmconv.graph._constants import frozen_attributes
from nmconv.graph._frozen import check_returned
from nmconv.graph._patches import Patches
from nmconv.graph._quiet import in_mode, left_as_found, mode_hidden
from nmconv.graph._records import Arguments
from nmconv.graph._takes import arguments_from
from nmconv.graph._tracer import FlowTracer

__all__ = ["Method", "MethodTrace", "trace_methods"]


@dataclass(eq=False)
class MethodTrace:
    """A method's traces.

    Attributes:
        eval: In eval mode.
        train: In train mode; the same object where the method never asks for the mode.
        arguments: What it was traced with.
        constants: Attributes of the module whose values are frozen into the traces.
    """

    eval: FlowTracer
    train: FlowTracer
    arguments: Arguments
    constants: dict[str, Any]


@dataclass(frozen=True)
class Method:
    """A method to trace.

    Attributes:
        module: Its owner; read only.
        path: The owner's qualified name, for messages.
        name: The method's name.
        takes: The structure of its arguments, see :func:`nmconv.graph._takes.takes_of`.
    """

    module: nn.Module
    path: str
    name: str
    takes: str


def trace_methods(model: nn.Module, methods: Sequence[Method]) -> list[MethodTrace | RewriteError]:
    """Trace methods for rewriting.

    Args:
        model: Whose modules' methods.
        methods: Which.

    Returns:
        For each its traces, or a RewriteError where a rewritten method could behave otherwise than the method does:
        control flow on tensors or shapes, attributes that the forward stores, random decisions, contexts that it
        enters, a mode that is not its own.
    """
    made: list[MethodTrace | RewriteError] = []
    if not methods:
        return made
    patches = Patches(type(module) for module in model.modules())

    def trace() -> None:
        made.extend(_traced(method, patches) for method in methods)

    with mode_hidden():
        patches.keep(trace)
    return made


def _traced(method: Method, patches: Patches) -> MethodTrace | RewriteError:
    module = method.module
    try:
        if method.name in module.__dict__:
            raise RewriteError("it is set on the object itself, not on its class")
        arguments = arguments_from(method.takes)
        constants = frozen_attributes(module, method.name)
        readers: set[int] = set()
        first = _trace(method, False, readers, patches)
        if not readers:
            return MethodTrace(first, first, arguments, constants)
        if readers != {id(module)}:
            raise RewriteError("it asks for the mode of another module")
        return MethodTrace(first, _trace(method, True, readers, patches), arguments, constants)
    except RewriteError as error:
        text = str(error)
        what = f"{method.path or 'the model'}.{method.name} ({type(module).__name__})"
        made = RewriteError(f"{what} cannot be rewritten: {text}")
        made.__cause__ = error
        return made


def _trace(method: Method, training: bool, readers: set[int], patches: Patches) -> FlowTracer:
    tracer = FlowTracer(deep=False, method=method.name)
    with left_as_found(method.module) as found, in_mode(training, readers):
        arguments = arguments_from(method.takes)
        try:
            tracer.run_in(patches.call, method.module, arguments)
        except Exception as error:  # whatever the method raises when it meets proxies
            raise RewriteError(str(error).strip().split("\n")[0]) from error
        check_returned(tracer.returned)
        changed, drew = found.changed(), found.drew()
    if changed:
        raise RewriteError(f"it stores attributes ({', '.join(changed[:3])})")
    if drew:
        raise RewriteError("it draws random numbers that tracing would freeze")
    return tracer
