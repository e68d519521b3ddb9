"""Methods of modules as fx graphs, for rewriting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nmconv.errors import RewriteError
from nmconv.flow import Arguments, parse_arguments
from nmconv.recording import RngState, context_restored
from nmconv.tracing.attribute_writes import AttributeSnapshot
from nmconv.tracing.freezing import NoFrozenTensors, check_returned, frozen_attributes
from nmconv.tracing.stubs import Stubs
from nmconv.tracing.tracer import MethodTracer

__all__ = ["MethodSpec", "MethodTrace", "trace_methods"]

_ATTEMPTS = 5  # another thread may have drawn the random numbers


@dataclass(eq=False)
class MethodTrace:
    """The traces of a method.

    Attributes:
        eval: The trace in eval mode.
        train: The trace in train mode; the same object if the method never reads the mode.
        arguments: The arguments that the method was traced with.
        constants: The attributes of the module whose values the traces freeze.
    """

    eval: MethodTracer
    train: MethodTracer
    arguments: Arguments
    constants: dict[str, Any]


@dataclass(frozen=True)
class MethodSpec:
    """A method to trace.

    Attributes:
        module: The module whose method it is; only read.
        path: The module's qualified name.
        name: The method's name.
        argument_structure: The structure of the method's arguments, see :func:`nmconv.flow.argument_structure`.
    """

    module: nn.Module
    path: str
    name: str
    argument_structure: str


def trace_methods(model: nn.Module, methods: Sequence[MethodSpec]) -> list[MethodTrace | RewriteError]:
    """Trace methods for rewriting, on a copy of the model.

    Args:
        model: The model; only read.
        methods: Methods of its modules.

    Returns:
        For each method its traces, or a RewriteError if a rewritten method could behave differently: control flow on
        tensors or shapes, attributes that the forward writes, randomness, contexts that it enters, another module's
        mode.
    """
    traces: list[MethodTrace | RewriteError] = []
    stubs: Stubs | None = None
    for method in methods:
        if stubs is None or isinstance(traces[-1], RewriteError):  # a failed trace may leave a changed copy
            stubs = Stubs(model)
        traces.append(_trace(method, stubs))
    return traces


def _trace(method: MethodSpec, stubs: Stubs) -> MethodTrace | RewriteError:
    try:
        return _trace_in_modes(method, stubs)
    except RewriteError as error:
        name = f"{method.path or 'the model'}.{method.name} ({type(method.module).__name__})"
        named = RewriteError(f"{name} cannot be rewritten: {error}")
        named.__cause__ = error
        return named


def _trace_in_modes(method: MethodSpec, stubs: Stubs) -> MethodTrace:
    if method.name in method.module.__dict__:
        raise RewriteError("it is set on the module itself, not on its class")
    arguments = parse_arguments(method.argument_structure)
    constants = frozen_attributes(method.module, method.name)
    stubs.mode_queries.clear()
    in_eval = _trace_in_contexts(method, stubs, training=False)
    if not stubs.mode_queries:
        return MethodTrace(in_eval, in_eval, arguments, constants)
    if stubs.mode_queries != {id(stubs.model.get_submodule(method.path))}:
        raise RewriteError("it reads the mode of another module")
    return MethodTrace(in_eval, _trace_in_contexts(method, stubs, training=True), arguments, constants)


def _trace_in_contexts(method: MethodSpec, stubs: Stubs, *, training: bool) -> MethodTracer:
    """Return the method's trace in one mode, which must not depend on gradients or autocast."""
    stubs.model.train(training)
    grad, autocast = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
    tracer = _trace_without_randomness(method, stubs)
    with torch.set_grad_enabled(not grad), torch.autocast("cpu", enabled=not autocast):
        other = _trace_without_randomness(method, stubs)
    if str(tracer.graph) != str(other.graph):
        raise RewriteError("it queries the gradient mode or autocast, which tracing would freeze")
    return tracer


def _trace_without_randomness(method: MethodSpec, stubs: Stubs) -> MethodTracer:
    root = stubs.model.get_submodule(method.path)
    for _ in range(_ATTEMPTS):
        rng_state = RngState(root)
        tracer = _trace_once(method, stubs, root)
        if not rng_state.changed():
            return tracer
        rng_state.restore()
    raise RewriteError("it draws random numbers that tracing would freeze")


def _trace_once(method: MethodSpec, stubs: Stubs, root: nn.Module) -> MethodTracer:
    attributes = AttributeSnapshot(root)
    try:
        stubs.tracer = tracer = MethodTracer(
            root, method.name, parse_arguments(method.argument_structure), stubs.activations
        )
        with context_restored(), NoFrozenTensors():
            tracer.run()
    except Exception as error:  # whatever the method raises when it meets proxies
        raise RewriteError(str(error).strip().split("\n")[0]) from error
    finally:
        stubs.tracer = None
    check_returned(tracer.returned)
    changed = attributes.changed()
    if changed:
        raise RewriteError(f"it stores attributes ({', '.join(changed[:3])})")
    tracer.note_expressions()
    return tracer
