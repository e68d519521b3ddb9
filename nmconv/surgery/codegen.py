"""From a traced method, its graphs edited, to Python source."""

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

__all__ = ["method_source", "return_changed_lists", "shown_parameters"]


def method_source(module: nn.Module, name: str, trace: MethodTrace, mutated: list[str]) -> RewrittenMethod:
    """The method that does what the graphs of ``trace`` say, with the signature of the one it replaces.

    Arguments that are neither tensors nor numbers, attributes that are no numbers, and numbers that something was
    decided by have the values they were traced with; a call with others raises RewriteError. ``mutated`` is what
    :func:`return_changed_lists` gave.
    """
    signature = inspect.signature(getattr(type(module), name))
    bound: dict[str, Any] = {"_check": runtime.check, "_tensor": runtime.check_tensor}
    parts = [_function("_eval", trace.eval, bound)]
    two = trace.train is not trace.eval
    if two:
        parts.append(_function("_train", trace.train, bound))
    head, passed = _arguments(signature, trace, name, bound)
    call = f"(_train if self.training else _eval)(self{passed})" if two else f"_eval(self{passed})"
    body = [f"    result = {call}"] if mutated else [f"    return {call}"]
    if mutated:
        body = [f"    result, lists = {call}"]
        body += [f"    {target}[:] = lists[{at}]" for at, target in enumerate(mutated)]
        body += ["    return result"]
    source = "\n\n".join([*parts, "\n".join([*head, *body])]) + "\n"
    used = set(re.findall(r"\w+", source))
    return RewrittenMethod.with_globals(name, source, {key: value for key, value in bound.items() if key in used})


def _function(name: str, tracer: MethodTracer, bound: dict[str, Any]) -> str:
    graph = tracer.graph
    _keep_numbers_apart(graph)
    code = graph.python_code("self")
    for key, value in code.globals.items():
        if key in bound and bound[key] is not value:
            raise RewriteError(f"two meanings of the name {key}")
        bound[key] = value
    lines = [line for line in code.src.strip("\n").split("\n") if line.strip()]
    start = next(index for index, line in enumerate(lines) if line.startswith("def "))
    arguments = lines[start].partition("(")[2].rpartition(")")[0]
    first = "(".join(["def " + name, arguments])
    return "\n".join([first.partition(")")[0] + "):", *lines[start + 1 :]])


def _keep_numbers_apart(graph: Graph) -> None:
    """Fx writes ``a += b`` as a statement, which for a number would change every later reading of ``a``."""
    for node in graph.nodes:
        if node.op == "call_function" and getattr(node.target, "__module__", "") == "_operator":
            name = getattr(node.target, "__name__", "")
            if hasattr(runtime, name):
                node.target = getattr(runtime, name)


_STARS: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


def shown_parameters(parameters: Iterable[inspect.Parameter], bound: dict[str, Any]) -> list[str]:
    """Parameters as a def line has them; defaults are added to ``bound``, the globals of what is written."""
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


def _arguments(
    signature: inspect.Signature, trace: MethodTrace, method: str, bound: dict[str, Any]
) -> tuple[list[str], str]:
    """The def line and the checks of the method, and the arguments it passes on."""
    names = list(signature.parameters.values())[1:]
    shown = shown_parameters(names, bound)
    head = [f"def {method}(self{''.join(', ' + text for text in shown)}):"]
    given = signature.bind(None, *trace.arguments.args, **trace.arguments.kwargs)
    given.apply_defaults()
    passing = _Passing(method, head, bound)
    for expression, value in trace.constants.items():
        passing.check(value, expression)
    for parameter in names:
        passing.add(given.arguments[parameter.name], parameter.name)
    texts = {f"input_{at}": text for at, text in enumerate(passing.passed)}
    for name, value in {**trace.eval.guards, **trace.train.guards}.items():
        passing.check(value, texts.get(name) or _attribute(name))
    return head, "".join(f", {text}" for text in passing.passed)


def _attribute(path: str) -> str:
    """The expression for ``blocks.0.rate``."""
    text = "self"
    for part in path.split("."):
        text = f"{text}.{part}" if part.isidentifier() else f"getattr({text}, {part!r})"
    return text


@dataclass
class _Passing:
    """Passes on the tensors in the arguments, and writes the checks that the rest is as it was traced."""

    method: str
    head: list[str]
    bound: dict[str, Any]
    passed: list[str] = field(default_factory=list)

    def add(self, value: Any, text: str) -> None:
        """One argument, or a part of one."""
        if type(value) in (int, float) or isinstance(value, UnknownNumber):
            self.passed.append(text)
        elif isinstance(value, torch.Tensor):
            self.head.append(f"    _tensor({text}, {self.method!r}, {text!r})")
            self.passed.append(text)
        elif isinstance(value, (list, tuple, dict)):
            self.head.append(f"    _check(len({text}), {len(value)}, {self.method!r}, 'len({text})')")
            for key, part in value.items() if isinstance(value, dict) else enumerate(value):
                self.add(part, f"{text}[{key!r}]")
        else:
            self.check(value, text)

    def check(self, value: Any, text: str) -> None:
        """That an expression is still what it was. What that is, is bound to a name: not every ``repr`` is source."""
        name = f"_expected_{len(self.bound)}"
        self.bound[name] = value
        self.head.append(f"    _check({text}, {name}, {self.method!r}, {text!r})")


def return_changed_lists(module: nn.Module, method: str, trace: MethodTrace) -> list[str]:
    """Names of lists among the arguments whose content the method replaces; the graphs are made to return them too."""
    signature = inspect.signature(getattr(type(module), method))
    tracers = list(dict.fromkeys((trace.eval, trace.train)))
    changed = [dict(_changed(tracer, signature)) for tracer in tracers]
    if any(set(found) != set(changed[0]) for found in changed):
        raise RewriteError("it changes a list it was given in one mode only")
    if changed[0]:
        for tracer, found in zip(tracers, changed, strict=True):
            lists = [tracer.create_arg(list(found[name])) for name in changed[0]]
            output = next(node for node in reversed(tracer.graph.nodes) if node.op == "output")
            output.args = ((output.args[0], lists),)
    return list(changed[0])


def _changed(tracer: MethodTracer, signature: inspect.Signature) -> Iterator[tuple[str, Any]]:
    given = signature.bind(None, *tracer.inputs[0], **tracer.inputs[1]).arguments
    for now, before in tracer.containers:
        keys = before.keys() if isinstance(before, dict) else range(len(before))
        if len(now) == len(before) and all(now[key] is before[key] for key in keys):
            continue
        name = next((name for name, value in given.items() if value is now and isinstance(value, list)), None)
        if name is not None:
            yield name, now
        elif now is not tracer.inputs[1]:
            raise RewriteError("it changes a container inside its arguments")
