"""The whole analysis: trace a model in both modes, find chains, and put it all down as plain data."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nmconv.graph import _zoo
from nmconv.graph._alias import must_copy
from nmconv.graph._chains import Ownership, own
from nmconv.graph._flow import Flow
from nmconv.graph._gates import resolve_gates
from nmconv.graph._lower import lower
from nmconv.graph._modules import leaf_op
from nmconv.graph._ops import Op
from nmconv.graph._parallel import fold_parallel
from nmconv.graph._quiet import in_mode, left_as_found
from nmconv.graph._records import Arguments, UnknownTensor, map_proxies
from nmconv.graph._tracer import FlowTracer
from nmconv.graph._values import Unknown, Values, fake_input

__all__ = ["Analysis", "Called", "Traced", "act_calls", "analyse", "calls_by_kind", "counted", "trace_parts"]

_COUNTED = {Op.CONV, Op.NORM, Op.ACT, Op.ADD, Op.MUL, Op.PAD, Op.LINEAR, Op.POOL, Op.DROP, Op.BOUNDED}
# Owner, name and kind of function of an activation call.
Called = tuple[str, str, "str | None"]


@dataclass(eq=False)
class Traced:
    """One root, traced and understood."""

    tracer: FlowTracer
    flow: Flow
    ownership: Ownership
    copies: set[int]


@dataclass(eq=False)
class Analysis:
    """A model in one mode.

    Attributes:
        traced: What was understood (:class:`Traced`) of the model itself, or of its parts that could be traced.
        broken: From the qualified name of a module whose forward cannot be traced to the complaint.
        mode_readers: Ids of modules whose ``training`` was read on the way.
        lone: Names of convolutions that only such modules call.
        tracers: Of all attempts, failed ones too.
    """

    traced: list[Any]
    broken: dict[str, BaseException]
    mode_readers: set[int]
    lone: list[str]
    tracers: list[FlowTracer]


def act_calls(model: nn.Module, *, training: bool, example_inputs: Any) -> Counter[Called]:
    """How often each activation is called by whom, in one mode; without the rest of the analysis."""
    return counted(trace_parts(model, training, example_inputs, None, lambda tracer: None))


def counted(found: Analysis) -> Counter[Called]:
    """How often each activation is called by whom."""
    return Counter(
        (call.frame.path, call.name, call.function)
        for tracer in found.tracers
        if tracer.finished
        for node, call in tracer.acts.items()
        if node not in tracer.dead
    )


def calls_by_kind(model: nn.Module, *, training: bool, example_inputs: Any = None) -> Counter[str]:
    """How often each convolution, norm, activation and sum on the way to an output is called, by name.

    Functions are named by the module that calls them: ``layer1.0:add``.
    """
    found: Counter[str] = Counter()
    analysis = trace_parts(model, training, example_inputs, None, lambda tracer: lower(tracer, linear=False))
    for flow in analysis.traced:
        flow.link()
        for node in flow.nodes:
            if node.op in _COUNTED and (flow.main[node.index] or flow.gating[node.index]):
                found[node.name.partition("#")[0]] += 1
    return found


def analyse(
    model: nn.Module, *, training: bool, linear: bool, example_inputs: Any, before: Analysis | None = None
) -> Analysis:
    """Trace ``model`` as if it were in the mode given, and find its chains.

    Nothing of the model changes, and no data runs through it.

    Args:
        model: Read only.
        training: The mode.
        linear: Whether linear layers count as convolutions.
        example_inputs: What the model is called with, or None.
        before: The other mode's analysis: what it saw modules called with helps where this one does not get there.
    """
    return trace_parts(model, training, example_inputs, before, lambda tracer: _understand(tracer, linear))


def trace_parts(
    model: nn.Module,
    training: bool,
    example_inputs: Any,
    before: Analysis | None,
    understand: Callable[[FlowTracer], Any],
) -> Analysis:
    """Trace the model, or, where its forward cannot be traced, its parts; ``understand`` what each trace says."""
    found = Analysis([], {}, set(), [], [])
    done: set[int] = set()
    with left_as_found(model), in_mode(training, found.mode_readers):
        todo: list[tuple[nn.Module, str, Arguments | None]] = [(model, "", _root_arguments(model, example_inputs))]
        while todo:
            module, path, arguments = todo.pop(0)
            if id(module) in done:
                continue
            done.add(id(module))
            if leaf_op(module) is not None and path:
                if leaf_op(module) is Op.CONV:
                    found.lone.append(path)
                continue
            if not any(leaf_op(part) in (Op.ACT, Op.CONV) for part in module.modules()) and path:
                continue
            tracer = FlowTracer(deep=True)
            found.tracers.append(tracer)
            broken = [path]
            if _has_forward(module):
                given = arguments or _unknown_arguments(module)
                try:
                    tracer.run(module, given, path)
                except Exception as error:
                    found.broken.setdefault(path, error)
                else:
                    broken = list(tracer.broken)
                    understood = understand(tracer)
                    tracer.finished = True
                    if understood is not None:
                        found.traced.append(understood)
            for name, problem in tracer.broken.items():
                found.broken.setdefault(name, problem)
            for name in broken:
                parent = module if name == path else model.get_submodule(name)
                for label, child in parent.named_children():
                    inner = f"{name}.{label}" if name else label
                    todo.append((child, inner, _detached(found.tracers + (before.tracers if before else []), inner)))
    return found


def _understand(tracer: FlowTracer, linear: bool) -> Traced:
    flow = lower(tracer, linear=linear)
    resolve_gates(flow, tracer.values)
    copies = must_copy(flow)
    fold_parallel(flow)
    return Traced(tracer, flow, own(flow), copies)


def _has_forward(module: nn.Module) -> bool:
    return getattr(type(module).forward, "__name__", "") != "_forward_unimplemented"


def _root_arguments(model: nn.Module, example_inputs: Any) -> Arguments:
    if example_inputs is None:
        return _unknown_arguments(model, _zoo.default_input_size(model), first=True)
    values = Values(model)

    def fake(value: Any) -> Any:
        return map_proxies(value, values.like)

    if isinstance(example_inputs, dict):
        return Arguments((), fake(example_inputs))
    if isinstance(example_inputs, tuple):
        return Arguments(fake(example_inputs), {})
    return Arguments((fake(example_inputs),), {})


def _unknown_arguments(module: nn.Module, size: tuple[int, ...] | None = None, first: bool = False) -> Arguments:
    """One tensor for every required parameter of the forward, or else for the first; defaults for the others."""
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        return Arguments((UnknownTensor(),), {})
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for parameter in parameters:
        if parameter.default is not parameter.empty or parameter.kind in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            if parameter.kind is parameter.VAR_POSITIONAL and not args:
                args.append(UnknownTensor())
            continue
        if parameter.kind is parameter.KEYWORD_ONLY:
            kwargs[parameter.name] = UnknownTensor()
        else:
            args.append(UnknownTensor())
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if not args and any(parameter.kind in positional for parameter in parameters):
        args.append(UnknownTensor())
    if first and args:
        known = fake_input(module, Values(module), size)
        args[0] = args[0] if known is None else known
    return Arguments(tuple(args), kwargs)


def _detached(tracers: list[FlowTracer], path: str) -> Arguments | None:
    """The arguments that a completed call of a module had, with fake tensors where the values can be known."""
    tracer = next((tracer for tracer in tracers if path in tracer.completed), None)
    if tracer is None:
        return None
    arguments = tracer.completed[path][0]

    def value(proxy: Any) -> Any:
        try:
            known = tracer.values.get(proxy.node)
        except Unknown:
            return UnknownTensor()
        return known if isinstance(known, torch.Tensor) else UnknownTensor()

    return Arguments(map_proxies(arguments.args, value), map_proxies(arguments.kwargs, value))
