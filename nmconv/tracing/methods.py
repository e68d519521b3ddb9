"""Methods of modules as fx graphs, for rewriting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nmconv.errors import RewriteError
from nmconv.flow import Arguments, arguments_from
from nmconv.recording import RngState, context_kept
from nmconv.tracing.attribute_writes import AttributeSnapshot
from nmconv.tracing.freezing import NoFrozenTensors, check_returned, frozen_attributes
from nmconv.tracing.stubs import Stubs
from nmconv.tracing.tracer import MethodTracer

__all__ = ["MethodSpec", "MethodTrace", "trace_methods"]

_TRIES = 5  # it may have been another thread that drew


@dataclass(eq=False)
class MethodTrace:
    """A method's traces.

    Attributes:
        eval: In eval mode.
        train: In train mode; the same object where the method never asks for the mode.
        arguments: What it was traced with.
        constants: Attributes of the module whose values are frozen into the traces.
    """

    eval: MethodTracer
    train: MethodTracer
    arguments: Arguments
    constants: dict[str, Any]


@dataclass(frozen=True)
class MethodSpec:
    """A method to trace.

    Attributes:
        module: Its owner; read only.
        path: The owner's qualified name.
        name: The method's name.
        takes: The structure of its arguments, see :func:`nmconv.flow.argument_specs.takes_of`.
    """

    module: nn.Module
    path: str
    name: str
    takes: str


def trace_methods(model: nn.Module, methods: Sequence[MethodSpec]) -> list[MethodTrace | RewriteError]:
    """Trace methods for rewriting, on a copy of the model.

    Args:
        model: Whose modules' methods; read only.
        methods: Which.

    Returns:
        For each its traces, or a RewriteError where a rewritten method could behave otherwise than the method does:
        control flow on tensors or shapes, attributes that the forward stores, random decisions, contexts that it
        enters, a mode that is not its own.
    """
    made: list[MethodTrace | RewriteError] = []
    stubs: Stubs | None = None
    for method in methods:
        if stubs is None or isinstance(made[-1], RewriteError):  # one that failed may have left something behind
            stubs = Stubs(model)
        made.append(_traced(method, stubs))
    return made


def _traced(method: MethodSpec, stubs: Stubs) -> MethodTrace | RewriteError:
    module = method.module
    try:
        if method.name in module.__dict__:
            raise RewriteError("it is set on the object itself, not on its class")
        arguments = arguments_from(method.takes)
        constants = frozen_attributes(module, method.name)
        stubs.asked.clear()
        first = _trace(method, stubs, training=False)
        if not stubs.asked:
            return MethodTrace(first, first, arguments, constants)
        if stubs.asked != {id(stubs.model.get_submodule(method.path))}:
            raise RewriteError("it asks for the mode of another module")
        return MethodTrace(first, _trace(method, stubs, training=True), arguments, constants)
    except RewriteError as error:
        text = str(error)
        what = f"{method.path or 'the model'}.{method.name} ({type(module).__name__})"
        made = RewriteError(f"{what} cannot be rewritten: {text}")
        made.__cause__ = error
        return made


def _trace(method: MethodSpec, stubs: Stubs, *, training: bool) -> MethodTracer:
    """The method's trace in one mode, which must be the same without gradients and under autocast."""
    stubs.model.train(training)
    grad, autocast = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
    made = _trace_that_draws_nothing(method, stubs)
    with torch.set_grad_enabled(not grad), torch.autocast("cpu", enabled=not autocast):
        other = _trace_that_draws_nothing(method, stubs)
    if str(made.graph) != str(other.graph):
        raise RewriteError("it asks for the context it is called in, which tracing would freeze")
    return made


def _trace_that_draws_nothing(method: MethodSpec, stubs: Stubs) -> MethodTracer:
    root = stubs.model.get_submodule(method.path)
    for _ in range(_TRIES):
        chance = RngState(root)
        made = _traced_once(method, stubs, root)
        if not chance.moved():
            return made
        chance.put_back()
    raise RewriteError("it draws random numbers that tracing would freeze")


def _traced_once(method: MethodSpec, stubs: Stubs, root: nn.Module) -> MethodTracer:
    stored = AttributeSnapshot(root)
    try:
        stubs.tracer = tracer = MethodTracer(root, method.name, arguments_from(method.takes), stubs.activations)
        with context_kept(), NoFrozenTensors():
            tracer.run()
    except Exception as error:  # whatever the method raises when it meets proxies
        raise RewriteError(str(error).strip().split("\n")[0]) from error
    finally:
        stubs.tracer = None
    check_returned(tracer.returned)
    changed = stored.changed()
    if changed:
        raise RewriteError(f"it stores attributes ({', '.join(changed[:3])})")
    tracer.note_expressions()
    return tracer
