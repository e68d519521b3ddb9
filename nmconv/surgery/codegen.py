"""Generating Python source from the edited graphs of a traced method."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import Graph

from nmconv.errors import RewriteError
from nmconv.flow import UnknownNumber
from nmconv.surgery import runtime
from nmconv.surgery.rewritten_classes import RewrittenMethod
from nmconv.tracing import MethodTrace, MethodTracer

__all__ = ["format_parameters", "method_source", "return_changed_lists"]


def method_source(module: nn.Module, name: str, trace: MethodTrace, changed_lists: list[str]) -> RewrittenMethod:
    """Generate the method that runs the graphs of a trace, with the signature of the method that it replaces.

    Arguments other than tensors and numbers, attributes other than numbers, and numbers that control flow depends on
    are constants with the values they were traced with; a call with other values raises RewriteError.

    Args:
        module: The method's owner.
        name: The method's name.
        trace: Its graphs in eval and in train mode.
        changed_lists: The result of :func:`return_changed_lists`.
    """
    signature = inspect.signature(getattr(type(module), name))
    namespace: dict[str, Any] = {"_check": runtime.check, "_tensor": runtime.check_tensor}
    functions = [_function("_eval", trace.eval, namespace)]
    has_train_graph = trace.train is not trace.eval
    if has_train_graph:
        functions.append(_function("_train", trace.train, namespace))
    head, arguments = _head(signature, trace, name, namespace)
    call = f"(_train if self.training else _eval)(self{arguments})" if has_train_graph else f"_eval(self{arguments})"
    if changed_lists:
        body = [f"    result, lists = {call}"]
        body += [f"    {target}[:] = lists[{index}]" for index, target in enumerate(changed_lists)]
        body += ["    return result"]
    else:
        body = [f"    return {call}"]
    source = "\n\n".join([*functions, "\n".join([*head, *body])]) + "\n"
    words = set(re.findall(r"\w+", source))
    return RewrittenMethod.with_globals(name, source, {key: value for key, value in namespace.items() if key in words})


def _function(name: str, tracer: MethodTracer, namespace: dict[str, Any]) -> str:
    """Generate a function from a graph; add its globals to ``namespace``."""
    graph = tracer.graph
    _replace_augmented_assignments(graph)
    code = graph.python_code("self")
    for key, value in code.globals.items():
        if key in namespace and namespace[key] is not value:
            raise RewriteError(f"the name {key} has two meanings in it")
        namespace[key] = value
    lines = [line for line in code.src.strip("\n").split("\n") if line.strip()]
    start = next(index for index, line in enumerate(lines) if line.startswith("def "))
    parameters = lines[start].partition("(")[2].rpartition(")")[0]
    def_line = f"def {name}({parameters}".partition(")")[0] + "):"
    return "\n".join([def_line, *lines[start + 1 :]])


def _replace_augmented_assignments(graph: Graph) -> None:
    """Replace ``operator.iadd`` and its kin by functions: fx writes ``a += b``, which rebinds ``a`` for a number."""
    for node in graph.nodes:
        if node.op == "call_function" and getattr(node.target, "__module__", "") == "_operator":
            name = getattr(node.target, "__name__", "")
            if hasattr(runtime, name):
                node.target = getattr(runtime, name)


_STARS: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


def format_parameters(parameters: Iterable[inspect.Parameter], bound: dict[str, Any]) -> list[str]:
    """Return parameters as they stand in a def line; add their defaults to ``bound``, the function's globals."""
    shown: list[str] = []
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not any(text.startswith("*") for text in shown):
            shown.append("*")
        text = _STARS.get(parameter.kind, "") + parameter.name
        if parameter.default is not parameter.empty:
            bound[f"_default_{parameter.name}"] = parameter.default
            text += f"=_default_{parameter.name}"
        shown.append(text)
    return shown


def _head(
    signature: inspect.Signature, trace: MethodTrace, method: str, namespace: dict[str, Any]
) -> tuple[list[str], str]:
    """Return the def line with the checks that follow it, and the arguments to pass on."""
    parameters = list(signature.parameters.values())[1:]
    def_line = f"def {method}(self{''.join(', ' + text for text in format_parameters(parameters, namespace))}):"
    traced = signature.bind(None, *trace.arguments.args, **trace.arguments.kwargs)
    traced.apply_defaults()
    head = _Head(method, [def_line], namespace)
    for expression, value in trace.constants.items():
        head.check(value, expression)
    for parameter in parameters:
        head.add_argument(traced.arguments[parameter.name], parameter.name)
    inputs = {f"input_{index}": expression for index, expression in enumerate(head.arguments)}
    for name, value in {**trace.eval.guards, **trace.train.guards}.items():
        head.check(value, inputs.get(name) or _attribute_expression(name))
    return head.lines, "".join(f", {expression}" for expression in head.arguments)


def _attribute_expression(path: str) -> str:
    """Return the expression for an attribute of the module, such as ``blocks.0.rate``."""
    text = "self"
    for part in path.split("."):
        text = f"{text}.{part}" if part.isidentifier() else f"getattr({text}, {part!r})"
    return text


@dataclass
class _Head:
    """The first lines of a generated method: check its arguments, and collect the tensors and numbers in them.

    Attributes:
        method: The method's name.
        lines: The lines so far.
        namespace: The method's globals.
        arguments: Expressions for the arguments to pass on.
    """

    method: str
    lines: list[str]
    namespace: dict[str, Any]
    arguments: list[str] = field(default_factory=list)

    def add_argument(self, value: Any, expression: str) -> None:
        """Add an argument that was traced with the given value, or a part of one."""
        if type(value) in (int, float) or isinstance(value, UnknownNumber):
            self.arguments.append(expression)
        elif isinstance(value, torch.Tensor):
            self.lines.append(f"    _tensor({expression}, {self.method!r}, {expression!r})")
            self.arguments.append(expression)
        elif isinstance(value, (list, tuple, dict)):
            self.lines.append(f"    _check(len({expression}), {len(value)}, {self.method!r}, 'len({expression})')")
            for key, part in value.items() if isinstance(value, dict) else enumerate(value):
                self.add_argument(part, f"{expression}[{key!r}]")
        else:
            self.check(value, expression)

    def check(self, value: Any, expression: str) -> None:
        """Add a check that an expression still has the value it was traced with."""
        name = f"_expected_{len(self.namespace)}"
        self.namespace[name] = value  # a global, because not every repr is an expression
        self.lines.append(f"    _check({expression}, {name}, {self.method!r}, {expression!r})")


def return_changed_lists(module: nn.Module, method: str, trace: MethodTrace) -> list[str]:
    """Return the names of the list arguments that the method mutates, and make the graphs return their new content.

    Raises:
        RewriteError: If it mutates a list in one mode only, or any other container in its arguments.
    """
    signature = inspect.signature(getattr(type(module), method))
    tracers = list(dict.fromkeys((trace.eval, trace.train)))
    changed = [dict(_changed_lists(tracer, signature)) for tracer in tracers]
    if any(set(lists) != set(changed[0]) for lists in changed):
        raise RewriteError("it changes a list it was given in one mode only")
    if changed[0]:
        for tracer, lists in zip(tracers, changed, strict=True):
            contents = [tracer.create_arg(list(lists[name])) for name in changed[0]]
            output = next(node for node in reversed(tracer.graph.nodes) if node.op == "output")
            output.args = ((output.args[0], contents),)
    return list(changed[0])


def _changed_lists(tracer: MethodTracer, signature: inspect.Signature) -> Iterator[tuple[str, Any]]:
    arguments = signature.bind(None, *tracer.inputs[0], **tracer.inputs[1]).arguments
    for current, before in tracer.containers:
        keys = before.keys() if isinstance(before, dict) else range(len(before))
        if len(current) == len(before) and all(current[key] is before[key] for key in keys):
            continue
        name = next((name for name, value in arguments.items() if value is current and isinstance(value, list)), None)
        if name is not None:
            yield name, current
        elif current is not tracer.inputs[1]:
            raise RewriteError("it changes a container inside its arguments")
