"""One method of one module traced with torch.fx, on a copy, each child a single call: what rewriting starts from."""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from dataclasses import dataclass, replace
from types import FrameType, FunctionType
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node, Tracer
from torch.fx.node import map_arg
from torch.fx.proxy import Proxy, TraceError

from nmconv.flow import (
    ACT_KINDS,
    Arguments,
    Operation,
    containers,
    expressions_in,
    is_elementwise,
    is_inplace,
    map_given,
    operation_of_module,
)
from nmconv.recording import context_now
from nmconv.tracing.proxies import AttributeProxy, TensorProxy

__all__ = ["MethodAct", "MethodTracer"]


@dataclass(frozen=True)
class MethodAct:
    """One activation call in a method.

    Attributes:
        method: The innermost method of the module that makes it.
        name: The activation's name, relative to the module; "" for a function.
        function: The function's kind, or None.
        step: Which call of it in that method it is, from 1.
    """

    method: str
    name: str
    function: str | None
    step: int


class MethodTracer(Tracer):
    """Traces one method; control flow on tensors and shapes is refused, as are contexts that it enters.

    Args:
        root: Whose method, all of whose parts call :meth:`call_part` when they are called, and get their tensors from
            :meth:`tensor`.
        method: The method's name.
        arguments: What it is called with; tensors and numbers become placeholders.
        activations: Ids of the parts that are some.

    Attributes:
        labels: Of each call on what the method is given, what it is called, and which one of that label it is.
        acts: Of each activation call what identifies it.
        known: The values of numbers among arguments and attributes, and of what is computed from them alone.
        guards: From where numbers come from that something was decided by, to what they were.
        inputs: The arguments, with proxies.
        containers: Lists and dicts in them, each with a copy from before.
        returned: What the method returned, with proxies.
    """

    def __init__(self, root: nn.Module, method: str, arguments: Arguments, activations: frozenset[int]) -> None:
        super().__init__(param_shapes_constant=False)
        self.root = root
        self.graph = Graph(tracer_cls=Tracer)
        self._activations = activations
        self.traced_func_name = method
        self.labels: dict[Node, tuple[str, int]] = {}
        self.acts: dict[Node, MethodAct] = {}
        self.first_calls: dict[Any, set[int]] = {}
        self._calls: Counter[Any] = Counter()
        self._methods: dict[Node, str] = {}  # of calls that may be parts of expressions
        self._inner: dict[Node, frozenset[Node]] = {}
        self._names = {id(part): name for name, part in root.named_modules()}
        self._tensors: dict[int, str] = {}
        self.tensor_attrs = {}
        for name, part in root.named_modules():
            for space in (part._parameters, part._buffers, part.__dict__):
                for key, value in space.items():
                    path = f"{name}.{key}" if name else key
                    if isinstance(value, torch.Tensor):
                        self._tensors.setdefault(id(value), path)
                    elif isinstance(value, torch.ScriptObject):
                        self.tensor_attrs[value] = path
        self._proxies: dict[str, Proxy] = {}
        self._given: set[Node] = set()  # placeholders, and what is made of them
        self._numbers: set[Node] = set()  # shapes, and numbers made of them
        self._state = context_now()
        self.known: dict[Node, Any] = {}
        self.guards: dict[str, Any] = {}
        self._origins: dict[Node, str] = {}

        def placeholder(value: Any) -> Any:
            name = f"input_{len(self._origins)}"
            proxy = self.create_proxy("placeholder", name, (), {})
            self._origins[proxy.node] = name
            if not isinstance(value, torch.Tensor):
                self._numbers.add(proxy.node)
            if type(value) in (int, float):
                self.known[proxy.node] = value
            return proxy

        function = getattr(type(root), method, None)
        if not isinstance(function, FunctionType):
            raise TraceError(f"{method} is a {type(function).__name__}, no function")
        self._function = function
        given = _bound(function, root, arguments)
        given.apply_defaults()
        named = list(given.arguments.items())
        mapped = dict([named[0], *((name, map_given(value, placeholder)) for name, value in named[1:])])
        given.arguments = mapped
        self.inputs: tuple[Any, Any] = (given.args[1:], given.kwargs)
        self.containers = list(containers(self.inputs))
        self.returned: Any = None

    def run(self) -> MethodTracer:
        """Trace the method.

        Raises:
            Exception: Whatever it raises when it meets proxies.
        """
        args, kwargs = self.inputs
        self.returned = self._function(self.root, *args, **kwargs)
        self.create_node("output", "output", (self.create_arg(self.returned),), {})
        for node in reversed(list(self.graph.nodes)):  # questions that have been answered
            if node in self.known and not node.users and node.op != "placeholder":
                self.graph.erase_node(node)
        return self

    def note_expressions(self) -> None:
        """Let activations that the method works out by hand be calls like all others, and be counted with them."""
        found = expressions_in({node: self._operation(node) for node in self.graph.nodes})
        self._inner = {node: each.inner for node, each in found.items()}
        self.acts |= {node: MethodAct(self._methods[node], "", each.kind, 0) for node, each in found.items()}
        steps: Counter[MethodAct] = Counter()
        for node in self.graph.nodes if found else ():
            if node in self.acts:
                act = replace(self.acts.pop(node), step=0)
                steps[act] += 1
                self.acts[node] = replace(act, step=steps[act])

    def given_to(self, node: Node) -> Any:
        """What an activation call is applied to."""
        parts = {node, *self._inner.get(node, ())}
        if len(parts) == 1:
            return node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("x"))
        (value,) = {source for part in parts for source in part.all_input_nodes} - parts - self._numbers
        return value

    def parts_of(self, node: Node) -> list[Node]:
        """An activation call, and what it is worked out from, in order."""
        return sorted((node, *self._inner.get(node, ())))

    def erase_act(self, node: Node) -> None:
        """Erase an activation call that nobody reads any more."""
        for part in reversed(self.parts_of(node)):
            self.graph.erase_node(part)
            self.acts.pop(part, None)

    # -- what the copy's parts ask ------------------------------------------------------------------------------------

    def call_part(self, part: nn.Module, args: Any, kwargs: Any) -> Any:
        """A part is called: one node."""
        name = self._names.get(id(part))
        if not name:
            raise TraceError(f"a {type(part).__name__} is called that is no submodule")
        proxy = self.create_proxy("call_module", name, args, kwargs)
        self._label(proxy.node, name)
        self._methods[proxy.node] = self._running()
        if id(part) in self._activations:
            self._note_act(proxy.node, name, None)
        return proxy

    def tensor(self, value: torch.Tensor) -> Any:
        """A part's parameter or buffer is read."""
        name = self._tensors.get(id(value))
        if name is None:
            return value
        if name not in self._proxies:
            self._proxies[name] = self.create_proxy("get_attr", name, (), {})
        return self._proxies[name]

    def setting(self, part: nn.Module, name: str, value: Any) -> Any:
        """A number among a part's attributes is read."""
        path = self._names.get(id(part))
        if path is None:
            return value
        name = f"{path}.{name}" if path else name
        if name not in self._proxies:
            proxy = self._proxies[name] = self.create_proxy("get_attr", name, (), {})
            self.known[proxy.node] = value
            self._origins[proxy.node] = name
            self._numbers.add(proxy.node)
        return self._proxies[name]

    # -- what fx and the proxies ask ----------------------------------------------------------------------------------

    def proxy(self, node: Node) -> Proxy:
        """A proxy of the node."""
        return TensorProxy(node, self)

    def create_arg(self, a: Any) -> Any:
        """The argument as fx stores it; raise if it is a tensor that the forward made."""
        if type(a) is TensorProxy or type(a) is AttributeProxy:
            return a.node
        if isinstance(a, torch.Tensor):
            if id(a) not in self._tensors:
                raise TraceError("a tensor made inside the forward would be frozen into it")
            return self.create_node("get_attr", self._tensors[id(a)], (), {})
        return super().create_arg(a)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Proxy:
        """A proxy of a new node; raise if the forward has entered a context."""
        if kind.startswith("call_"):
            if context_now() != self._state:
                raise TraceError("the forward enters a context (autocast, no_grad, ...) that rewriting would lose")
            if _checkpoints():
                raise TraceError("it checkpoints a part of itself, which tracing would lose")
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        node = proxy.node
        sources = node.all_input_nodes
        if kind == "placeholder" or not self._given.isdisjoint(sources):
            self._given.add(node)
        if _tells_sizes(node) or (sources and self._numbers.issuperset(sources)):
            self._numbers.add(node)
        if kind == "call_function" and sources and all(source in self.known for source in sources):
            known = map_arg((node.args, node.kwargs), self.known.__getitem__)
            self.known[node] = target(*known[0], **known[1])
        if kind in ("call_function", "call_method"):
            label = self.label_of(node)
            if node in self._given and node not in self._numbers:
                self._label(node, label)
            if is_elementwise(label, node.args, node.kwargs):
                self._methods[node] = self._running()
            if label.rstrip("_") in ACT_KINDS:
                self._note_act(node, "", label.rstrip("_"))
        return proxy

    def label_of(self, node: Node) -> str:
        """What a call is called in a recording."""
        name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
        return _LABELS.get(name, name)

    def _operation(self, node: Node) -> Operation | None:
        """What a call does, if that may be a part of an expression: its numbers must be known."""
        method = self._methods.get(node)
        numbers = self._numbers.intersection(node.all_input_nodes)
        if method is None or not numbers <= self.known.keys():
            return None
        reads = tuple((source, None) for source in node.all_input_nodes if source not in numbers)
        if node.op == "call_module":
            part = self.root.get_submodule(str(node.target))
            return operation_of_module(
                node, (type(part).__module__, type(part).__qualname__, part.extra_repr()), method, reads
            )
        function: Any = getattr(torch.Tensor, node.target) if isinstance(node.target, str) else node.target
        arguments = map_arg((node.args, node.kwargs), lambda source: self.known.get(source, source))
        label = self.label_of(node)
        return Operation(label, method, reads, function, arguments, is_inplace(node, None, label))

    def is_number(self, node: Node) -> bool:
        """Whether the node is a number computed from shapes."""
        shape = node.op == "call_function" and node.target is getattr and node.args[1] == "shape"
        return node in self._numbers and not shape

    def to_bool(self, obj: Proxy) -> bool:
        """The truth of a value that a setting decides."""
        return bool(self.value_of(obj.node))

    def iter(self, obj: Proxy) -> Any:
        """The items of a value that a setting decides."""
        return iter(self.value_of(obj.node))

    def value_of(self, node: Node) -> Any:
        """The value of a number that is known: from now on it is frozen.

        Raises:
            TraceError: If it depends on what the method is given.
        """
        if node not in self.known:
            raise TraceError("the forward branches on a shape or value")
        todo = [node]
        while todo:
            at = todo.pop()
            if at in self._origins:
                self.guards[self._origins[at]] = self.known[at]
            todo += at.all_input_nodes
        return self.known[node]

    # -- inside -------------------------------------------------------------------------------------------------------

    def _label(self, node: Node, label: str) -> None:
        self._calls[label] += 1
        self.labels[node] = (label, self._calls[label])

    def _note_act(self, node: Node, name: str, function: str | None) -> None:
        method = self._running()
        self._calls[method, name, function] += 1
        self.acts[node] = MethodAct(method, name, function, self._calls[method, name, function])

    def _running(self) -> str:
        """The innermost method of the root that is running."""
        at: FrameType | None = sys._getframe(3)
        while at is not None:
            code = at.f_code
            if code.co_argcount and at.f_locals.get(code.co_varnames[0]) is self.root:
                found = getattr(type(self.root), code.co_name, None)
                wrapped = getattr(found, "__wrapped__", found)
                if code.co_name == "forward" or getattr(wrapped, "__code__", None) is code:
                    return code.co_name
            at = at.f_back
        return "forward"


def _bound(function: FunctionType, root: nn.Module, arguments: Arguments) -> inspect.BoundArguments:
    try:
        return inspect.signature(function).bind(root, *arguments.args, **arguments.kwargs)
    except TypeError as error:
        raise TraceError(f"it does not take what it is said to be called with ({error})") from error


# What operators are called in a recording.
_LABELS = {
    "truediv": "div",
    **{f"i{name}": f"{name}_" for name in ("add", "sub", "mul")},
    "itruediv": "div_",
}


def _tells_sizes(node: Node) -> bool:
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel", "stride")
    return node.op == "call_function" and node.target is getattr and node.args[1] in ("shape", "ndim")


def _checkpoints() -> bool:
    """Whether torch's checkpointing is what calls."""
    at: FrameType | None = sys._getframe(2)
    while at is not None:
        if at.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
        at = at.f_back
    return False
