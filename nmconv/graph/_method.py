"""One method of one module as fx graphs, each child a single call: what rewriting starts from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from nmconv.errors import RewriteError
from nmconv.graph._constants import frozen_attributes
from nmconv.graph._frozen import check_returned
from nmconv.graph._quiet import changed_attributes, drew_random_numbers, in_mode, left_as_found, snapshot
from nmconv.graph._records import Arguments
from nmconv.graph._takes import arguments_from
from nmconv.graph._tracer import FlowTracer

__all__ = ["MethodTrace", "trace_method"]


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


def trace_method(module: nn.Module, path: str, method: str, takes: str) -> MethodTrace:
    """Trace a method for rewriting.

    Args:
        module: Its owner; read only.
        path: The owner's qualified name, for messages.
        method: The method's name.
        takes: The structure of its arguments, see :func:`nmconv.graph._takes.takes_of`.

    Raises:
        RewriteError: If a rewritten method could behave otherwise than the method does: control flow on tensors or
            shapes, attributes that the forward stores, random decisions, contexts that it enters, a mode that is not
            its own.
    """
    what = f"{path or 'the model'}.{method} ({type(module).__name__})"
    try:
        if method in module.__dict__:
            raise RewriteError("it is set on the object itself, not on its class")
        arguments = arguments_from(takes)
        constants = frozen_attributes(module, method)
        readers: set[int] = set()
        first = _trace(module, method, takes, False, readers)
        if not readers:
            return MethodTrace(first, first, arguments, constants)
        if readers != {id(module)}:
            raise RewriteError("it asks for the mode of another module")
        return MethodTrace(first, _trace(module, method, takes, True, readers), arguments, constants)
    except Exception as error:
        text = str(error).strip().split("\n")[0]
        raise RewriteError(f"{what} cannot be rewritten: {text}") from error


def _trace(module: nn.Module, method: str, takes: str, training: bool, readers: set[int]) -> FlowTracer:
    tracer = FlowTracer(deep=False, method=method)
    with left_as_found(module), drew_random_numbers(module) as random, in_mode(training, readers):
        before = snapshot(module)
        tracer.run(module, arguments_from(takes))
        check_returned(tracer.returned)
        changed = changed_attributes(before)
    if changed:
        raise RewriteError(f"it stores attributes ({', '.join(changed[:3])})")
    if random[0]:
        raise RewriteError("it draws random numbers that tracing would freeze")
    return tracer
