"""One method of one module traced with torch.fx, on a copy, with each child's call as a single node."""

from __future__ import annotations

import inspect
import keyword
from collections import Counter
from dataclasses import dataclass, replace
from types import FunctionType
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
    map_leaves,
    operation_of_module,
)
from nmconv.recording import current_context
from nmconv.tracing.call_stack import in_checkpoint, running_method
from nmconv.tracing.known_numbers import Numbers
from nmconv.tracing.proxies import AttributeProxy, TensorProxy

__all__ = ["MethodAct", "MethodTracer"]

# The labels of operators in a recording.
_LABELS = {
    "truediv": "div",
    **{f"i{name}": f"{name}_" for name in ("add", "sub", "mul")},
    "itruediv": "div_",
}


@dataclass(frozen=True)
class MethodAct:
    """One activation call in a method.

    Attributes:
        method: The innermost method of the module that makes the call.
        name: The activation's name relative to the module; "" for a function.
        function: The function's kind, or None.
        step: Which call of it in that method it is, from 1.
    """

    method: str
    name: str
    function: str | None
    step: int


class MethodTracer(Tracer):
    """Traces one method; raises TraceError if its control flow depends on tensors or shapes, or if it enters a context.

    Args:
        root: The module whose method is traced. Each of its parts must report its calls to :meth:`call_part`, reads of
            its tensors to :meth:`tensor` and reads of its numbers to :meth:`setting`.
        method: The method's name.
        arguments: The method's arguments; tensors and numbers become placeholders.
        activations: Ids of the parts that are activations.

    Attributes:
        labels: From each call on data to its label and which call of that label it is, from 1.
        acts: The activation calls.
        first_calls: The numbers of each activation's calls before the first edit; filled in by ``method_edits``.
        known: The values of known numbers, see :class:`Numbers`.
        guards: The arguments and settings that the trace depends on, see :class:`Numbers`.
        inputs: The arguments, with proxies.
        containers: The lists and dicts in them, each with a copy of what it held before the method ran.
        returned: What the method returned, with proxies.
    """

    def __init__(self, root: nn.Module, method: str, arguments: Arguments, activations: frozenset[int]) -> None:
        super().__init__(param_shapes_constant=False)
        self.root = root
        self.graph = Graph(tracer_cls=Tracer)
        self.traced_func_name = method
        self.labels: dict[Node, tuple[str, int]] = {}
        self.acts: dict[Node, MethodAct] = {}
        self.first_calls: dict[Any, set[int]] = {}
        self.returned: Any = None
        self._activations = activations
        self._calls: Counter[Any] = Counter()
        self._methods: dict[Node, str] = {}  # of calls that may be part of an expression
        self._inner: dict[Node, frozenset[Node]] = {}  # the calls inside each expression
        self._data: set[Node] = set()  # placeholders, and what is computed from them
        self._numbers = Numbers()
        self.known = self._numbers.known
        self.guards = self._numbers.guards
        self._context = current_context()
        self._proxies: dict[str, Proxy] = {}  # of tensors and settings
        self._names = {id(part): name for name, part in root.named_modules()}
        self._tensors: dict[int, str] = {}
        self.tensor_attrs = {}
        self._name_tensors()
        function = getattr(type(root), method, None)
        if not isinstance(function, FunctionType):
            raise TraceError(f"{method} is a {type(function).__name__}, not a plain function")
        self._function = function
        self.inputs = self._placeholders(arguments)
        self.containers = list(containers(self.inputs))

    def _name_tensors(self) -> None:
        for name, part in self.root.named_modules():
            for space in (part._parameters, part._buffers, part.__dict__):
                for key, value in space.items():
                    path = f"{name}.{key}" if name else key
                    if isinstance(value, torch.Tensor):
                        self._tensors.setdefault(id(value), path)
                    elif isinstance(value, torch.ScriptObject):
                        self.tensor_attrs[value] = path

    def _placeholders(self, arguments: Arguments) -> tuple[Any, Any]:
        """Return the positional and keyword arguments, with placeholders for tensors and numbers."""

        def placeholder(value: Any) -> Any:
            name = f"input_{len(self.graph.nodes)}"
            proxy = self.create_proxy("placeholder", name, (), {})
            if not isinstance(value, torch.Tensor):
                self._numbers.add(proxy.node, name, value)
            return proxy

        try:
            bound = inspect.signature(self._function).bind(self.root, *arguments.args, **arguments.kwargs)
        except TypeError as error:
            raise TraceError(f"it does not take the arguments that it is said to be called with ({error})") from error
        bound.apply_defaults()
        self_argument, *others = bound.arguments.items()
        bound.arguments = dict([self_argument, *((name, map_leaves(value, placeholder)) for name, value in others)])
        return bound.args[1:], bound.kwargs

    def run(self) -> MethodTracer:
        """Trace the method.

        Raises:
            Exception: Whatever the method raises when it meets proxies.
        """
        args, kwargs = self.inputs
        self.returned = self._function(self.root, *args, **kwargs)
        self.create_node("output", "output", (self.create_arg(self.returned),), {})
        for node in reversed(list(self.graph.nodes)):  # known numbers that were only asked for their value
            if node in self.known and not node.users and node.op != "placeholder":
                self.graph.erase_node(node)
        return self

    # -- activations --------------------------------------------------------------------------------------------------

    def note_expressions(self) -> None:
        """Add activations that are written out as expressions to :attr:`acts`, and count calls anew."""
        expressions = expressions_in({node: self._operation(node) for node in self.graph.nodes})
        self._inner = {node: each.inner for node, each in expressions.items()}
        self.acts |= {node: MethodAct(self._methods[node], "", each.kind, 0) for node, each in expressions.items()}
        steps: Counter[MethodAct] = Counter()
        for node in self.graph.nodes if expressions else ():
            if node in self.acts:
                act = replace(self.acts.pop(node), step=0)
                steps[act] += 1
                self.acts[node] = replace(act, step=steps[act])

    def input_of(self, node: Node) -> Any:
        """Return the input of an activation call."""
        parts = {node, *self._inner.get(node, ())}
        if len(parts) == 1:
            return node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("x"))
        sources = {source for part in parts for source in part.all_input_nodes} - parts
        (value,) = (source for source in sources if source not in self._numbers)
        return value

    def parts_of(self, node: Node) -> list[Node]:
        """Return an activation call and the calls inside its expression, in order."""
        return sorted((node, *self._inner.get(node, ())))

    def erase_act(self, node: Node) -> None:
        """Erase an activation call that has no readers left."""
        for part in reversed(self.parts_of(node)):
            self.graph.erase_node(part)
            self.acts.pop(part, None)

    # -- called by the copy's modules ---------------------------------------------------------------------------------

    def call_part(self, part: nn.Module, args: Any, kwargs: Any) -> Any:
        """Record the call of a part as one node."""
        name = self._names.get(id(part))
        if not name:
            raise TraceError(f"it calls a {type(part).__name__} that is not a submodule")
        proxy = self.create_proxy("call_module", name, args, kwargs)
        self._label(proxy.node, name)
        self._methods[proxy.node] = running_method(self.root)
        if id(part) in self._activations:
            self._note_act(proxy.node, name, None)
        return proxy

    def tensor(self, value: torch.Tensor) -> Any:
        """Return a proxy of a part's parameter or buffer."""
        name = self._tensors.get(id(value))
        if name is None:
            return value
        if name not in self._proxies:
            self._proxies[name] = self.create_proxy("get_attr", name, (), {})
        return self._proxies[name]

    def setting(self, part: nn.Module, name: str, value: Any) -> Any:
        """Return a proxy of a number among a part's attributes."""
        path = self._names.get(id(part))
        if path is None:
            return value
        name = f"{path}.{name}" if path else name
        if name not in self._proxies:
            proxy = self._proxies[name] = self.create_proxy("get_attr", name, (), {})
            self._numbers.add(proxy.node, name, value)
        return self._proxies[name]

    # -- called by fx and the proxies ---------------------------------------------------------------------------------

    def proxy(self, node: Node) -> Proxy:
        """Return a proxy of the node."""
        return TensorProxy(node, self)

    def create_arg(self, a: Any) -> Any:
        """Return the argument as fx stores it; raise TraceError for a tensor that the forward has made."""
        if type(a) is TensorProxy or type(a) is AttributeProxy:
            return a.node
        if isinstance(a, torch.Tensor):
            if id(a) not in self._tensors:
                raise TraceError("a tensor made inside the forward would be frozen into it")
            return self.create_node("get_attr", self._tensors[id(a)], (), {})
        if isinstance(a, float) and type(a) is not float:  # numpy's, whose repr is no expression
            a = float(a)
        return super().create_arg(a)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Proxy:
        """Return a proxy of a new node; raise TraceError if the generated source would lose something."""
        names = target.split(".") if kind in ("call_module", "get_attr") else []
        if any(keyword.iskeyword(name) or name == "self" for name in names):
            raise TraceError(f"{target!r} cannot stand in generated source: give this child another name")
        if kind.startswith("call_"):
            if current_context() != self._context:
                raise TraceError("the forward enters a context (autocast, no_grad, ...) that rewriting would lose")
            if in_checkpoint():
                raise TraceError("it checkpoints a part of itself, which tracing would lose")
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        node = proxy.node
        if kind == "placeholder" or not self._data.isdisjoint(node.all_input_nodes):
            self._data.add(node)
        self._numbers.infer(node)
        if kind in ("call_function", "call_method"):
            label = self.label_of(node)
            if node in self._data and node not in self._numbers:
                self._label(node, label)
            if is_elementwise(label, node.args, node.kwargs):
                self._methods[node] = running_method(self.root)
            if label.rstrip("_") in ACT_KINDS:
                self._note_act(node, "", label.rstrip("_"))
        return proxy

    def to_bool(self, obj: Proxy) -> bool:
        """Return the truth value of a known number."""
        return bool(self.value_of(obj.node))

    def iter(self, obj: Proxy) -> Any:
        """Return an iterator over a known value."""
        return iter(self.value_of(obj.node))

    def value_of(self, node: Node) -> Any:
        """Return the value of a known number, on which the trace depends from now on.

        Raises:
            TraceError: If it depends on the method's data.
        """
        return self._numbers.value_of(node)

    def is_number(self, node: Node) -> bool:
        """Return whether the node is a number computed from shapes."""
        is_shape = node.op == "call_function" and node.target is getattr and node.args[1] == "shape"
        return node in self._numbers and not is_shape

    def label_of(self, node: Node) -> str:
        """Return the label that a call has in a recording."""
        name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
        return _LABELS.get(name, name)

    # -- notes --------------------------------------------------------------------------------------------------------

    def _label(self, node: Node, label: str) -> None:
        self._calls[label] += 1
        self.labels[node] = (label, self._calls[label])

    def _note_act(self, node: Node, name: str, function: str | None) -> None:
        method = running_method(self.root)
        self._calls[method, name, function] += 1
        self.acts[node] = MethodAct(method, name, function, self._calls[method, name, function])

    def _operation(self, node: Node) -> Operation | None:
        """Return a call's operation if it may be part of an expression, which needs all its numbers to be known."""
        method = self._methods.get(node)
        numbers = {source for source in node.all_input_nodes if source in self._numbers}
        if method is None or not numbers <= self.known.keys():
            return None
        reads = tuple((source, None) for source in node.all_input_nodes if source not in numbers)
        if node.op == "call_module":
            part = self.root.get_submodule(str(node.target))
            settings = (type(part).__module__, type(part).__qualname__, part.extra_repr())
            return operation_of_module(node, settings, method, reads)
        function: Any = getattr(torch.Tensor, node.target) if isinstance(node.target, str) else node.target
        arguments = map_arg((node.args, node.kwargs), lambda source: self.known.get(source, source))
        label = self.label_of(node)
        return Operation(label, method, reads, function, arguments, is_inplace(node, None, label))
