"""Tracing with torch.fx: whole models for analysis, one method of one module for rewriting."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node, Tracer
from torch.fx.proxy import Proxy, TraceError

from nmconv.graph import _zoo
from nmconv.graph._exits import Lines, lines_of
from nmconv.graph._frozen import NoFrozenTensors
from nmconv.graph._looks import looks_noted
from nmconv.graph._modules import leaf_op
from nmconv.graph._ops import ACT_FUNCTIONS, ACT_METHODS, Op
from nmconv.graph._proxy import AttributeProxy, TensorProxy, patched_isinstance
from nmconv.graph._records import ActCall, Arguments, Frame, UnknownTensor, collect, containers, map_proxies
from nmconv.graph._sizes import Sizes
from nmconv.graph._values import Unknown, Values

__all__ = ["FlowTracer"]


class FlowTracer(Tracer):
    """Traces a module and keeps, for every node, which module's forward made it.

    Control flow on shapes is answered from fake tensors, evaluated only when asked for. A module whose forward
    cannot be traced becomes one opaque node, and is noted in ``broken``. ``looked_at`` has the ids of modules
    that a forward does not just call.

    Args:
        deep: Trace into modules that are no leaves; else every module is a leaf.
        method: The method of the root to trace.
    """

    def __init__(self, *, deep: bool, method: str = "forward") -> None:
        super().__init__(param_shapes_constant=False)
        self.proxy_buffer_attributes = True
        self.trace_asserts = True
        self.traced_func_name = method
        self.deep = deep
        self.where: dict[Node, tuple[Frame, str, int]] = {}
        self.lines: dict[Node, Lines] = {}  # of the frame's module, where the call is made
        self.acts: dict[Node, ActCall] = {}
        self.methods: dict[Node, str] = {}
        self.dead: set[Node] = set()
        self.finished = False
        self.sizes = Sizes()
        self.questions: list[int] = []  # about sizes: how many nodes there were when each was asked
        self.opaque: set[Node] = set()
        self.broken: dict[str, BaseException] = {}
        self.constants: dict[str, torch.Tensor] = {}
        self.completed: dict[str, list[Arguments]] = {}
        self.first_calls: dict[Any, set[int]] = {}
        self.looked_at: set[int] = set()
        self.odd: dict[str, str] = {}
        self.helped: dict[tuple[str, str], list[Arguments]] = {}
        self.values: Values
        self._named: dict[str, nn.Module] = {}
        self.proxies: dict[str, Proxy] = {}  # of parameters and buffers, in a method
        self.stack: list[Frame] = []
        self._methods_of: dict[type, frozenset[CodeType]] = {}
        self._attributes: dict[int, str] = {}
        self._arguments: Arguments | None = None
        self._made: Any = None
        self._size = 0

    # -- entry --------------------------------------------------------------------------------------------------------

    def run(self, root: nn.Module, arguments: Arguments, path: str = "") -> Graph:
        """Trace ``root`` called with ``arguments``, in which tensors become placeholders.

        Returns:
            The graph; its output is the tuple of all proxies found in what the method returned.

        Raises:
            Exception: Whatever the forward raises when it meets proxies.
        """
        self._prepare(root, arguments, path)
        with looks_noted(root, self.looked_at), patched_isinstance(self.looked_at) as self._patch_isinstance:
            self._patch_isinstance(type(root))
            return self.trace(root)

    def run_in(self, call_in: Callable[..., Any], root: nn.Module, arguments: Arguments) -> Graph:
        """The same for one method, where fx's patches are in place: what its own ``trace`` does.

        Without what only it needs: annotations, where the code is from, modules compiled late. ``call_in`` is
        :meth:`nmconv.graph._patches.Patches.call`.
        """
        self._prepare(root, arguments, "")
        function = getattr(type(root), self.traced_func_name)
        if not isinstance(function, FunctionType):
            raise TraceError(f"{self.traced_func_name} is a {type(function).__name__}, no function")
        self.root = root
        self.graph = Graph(tracer_cls=type(self))
        self.submodule_paths = {module: name for name, module in root.named_modules()}
        self.tensor_attrs = {
            value: _join(name, key)
            for name, module in root.named_modules()
            for key, value in module.__dict__.items()
            if isinstance(value, (torch.Tensor, torch.ScriptObject))
        }
        call, _ = self.create_args_for_root(function, True)
        made = call_in(self, function, call)
        self.create_node("output", "output", (self.create_arg(made),), {})
        self.submodule_paths = None
        return self.graph

    def _prepare(self, root: nn.Module, arguments: Arguments, path: str) -> None:
        self.values = Values(root, self.module)
        self._arguments = arguments
        tensors = [*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)]
        self._attributes = {id(value): name for name, value in reversed(tensors)}
        self._state = self._ambient()
        self.stack = [Frame(root, path)]
        self.prefix = f"{path}." if path else ""

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Build the root's arguments from the structure given to :meth:`run`; overrides fx's."""
        assert self._arguments is not None
        count = 0

        def placeholder(value: Any) -> Any:
            nonlocal count
            proxy = self.create_proxy("placeholder", f"input_{count}", (), {})
            count += 1
            if not isinstance(value, (Proxy, UnknownTensor)):
                self.values.set(proxy.node, value)
            return proxy

        args = map_proxies(self._arguments.args, placeholder)
        kwargs = map_proxies(self._arguments.kwargs, placeholder)
        self.inputs = (args, kwargs)
        self.given = Arguments(map_proxies(args, _same), map_proxies(kwargs, _same))
        self.containers = list(containers((args, kwargs)))

        def call() -> Any:
            if not self.deep:
                with NoFrozenTensors():
                    self._made = root_fn(self.root, *args, **kwargs)
                return self._made
            self._made = root_fn(self.root, *args, **kwargs)
            found: list[Any] = []
            collect(self._made, found, set())
            self.stack[0].result = self._made.node if type(self._made) is TensorProxy else None
            return tuple(found)

        return call, []

    @property
    def returned(self) -> Any:
        """What the method returned, with proxies for tensors."""
        return self._made

    # -- what fx asks -------------------------------------------------------------------------------------------------

    def proxy(self, node: Node) -> Proxy:
        return TensorProxy(node, self)

    def create_arg(self, a: Any) -> Any:
        kind = type(a)
        if kind is TensorProxy or kind is AttributeProxy:
            return a.node
        if isinstance(a, torch.Tensor):
            name = self._attributes.get(id(a)) or self.tensor_attrs.get(a)
            if name is None:
                if not self.deep:
                    raise TraceError("a tensor made inside the forward would be frozen into it")
                name = f"constant_{len(self.constants)}"
                self.constants[name] = a
                node = self.create_node("get_attr", name, (), {})
                self.values.set(node, a)
                return node
            return self.create_node("get_attr", name, (), {})
        if isinstance(a, nn.Module) or (callable(a) and not isinstance(a, type)):
            return super().create_arg(a) if not self.deep else repr(type(a))
        return super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        node = super().create_node(*args, **kwargs)
        self._size += 1
        self.sizes.note(node)
        return node

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Proxy:
        if not self.deep and kind.startswith("call_") and self._ambient() != self._state:
            raise TraceError("the forward enters a context (autocast, no_grad, ...) that rewriting would lose")
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        if kind == "call_function" or kind == "call_method":
            name = target if kind == "call_method" else getattr(target, "__name__", str(target))
            self._note(proxy.node, name)
            function = ACT_METHODS.get(target) if kind == "call_method" else ACT_FUNCTIONS.get(target)
            if function is not None:
                self._note_act(proxy.node, None, self.stack[-1].path, function)
        return proxy

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Proxy]) -> Any:
        if isinstance(attr_val, torch.Tensor):
            name = self._attributes.get(id(attr_val))
            if name is not None:
                if name not in parameter_proxy_cache:
                    parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
                return parameter_proxy_cache[name]
        return attr_val

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        name = self.submodule_paths.get(m) if self.submodule_paths else None
        if name is None:  # not part of the root: nothing to name it by
            if self.deep:
                return m.forward(*args, **kwargs)
            raise TraceError(f"a {type(m).__name__} is called that is no submodule")
        frame = self.stack[-1]
        self._named[name] = m
        op = leaf_op(m)
        if op is not None or not self.deep:
            proxy = self.create_proxy("call_module", name, args, kwargs)
            label = _relative(frame.module, m, name)
            self._note(proxy.node, label)
            if op is Op.ACT:
                path = self.prefix + name if label.startswith("/") else _join(frame.path, label)
                self._note_act(proxy.node, m, path, None)
            return proxy
        return self._descend(m, name, frame, args, kwargs)

    # -- control flow -------------------------------------------------------------------------------------------------

    def value_of(self, node: Node) -> Any:
        """The node's value, which a forward asks for, and may go another way for; fake tensors carry shapes only.

        Raises:
            Unknown: See :meth:`Values.get`; always where a method is traced for rewriting, which must hold for every
                shape.
        """
        if self.sizes.is_sized(node):
            self._asked(self.stack[-1])
        return self._known(node)

    def _asked(self, frame: Frame) -> None:
        frame.asks = True
        self.questions.append(self._size)

    def _known(self, node: Node) -> Any:
        if not self.deep:
            raise Unknown("the forward branches on a shape or value")
        with _Undisturbed():
            return self.values.get(node)

    def to_bool(self, obj: Proxy) -> bool:
        value = self.value_of(obj.node)
        if isinstance(value, torch.Tensor):
            raise Unknown("the forward branches on data")
        return bool(value)

    def iter(self, obj: Proxy) -> Iterator[Any]:
        return iter([obj[index] for index in range(self.length_of(obj))])  # type: ignore[index]

    def refuse_text(self) -> None:
        """What a forward writes about its input it may also branch on."""
        if not self.deep:
            raise TraceError("the forward makes text of a tensor or a shape")

    def known_device(self) -> torch.device | None:
        """The model's device, for analysis; a rewritten method must ask its input."""
        return self.values.device if self.deep else None

    def module(self, name: str) -> nn.Module:
        """The root's submodule of that name; torch finds it anew each time, step by step."""
        if name not in self._named:
            self._named[name] = self.root.get_submodule(name)
        return self._named[name]

    def is_number(self, node: Node) -> bool:
        """Whether the node is a number computed from shapes."""
        return self.sizes.is_number(node)

    def length_of(self, obj: Proxy) -> int:
        """What ``len`` gives for a proxy; a shape's is no matter of sizes."""
        return len(self._known(obj.node) if self.sizes.is_shape(obj.node) else self.value_of(obj.node))

    # -- inside -------------------------------------------------------------------------------------------------------

    def _descend(self, m: nn.Module, name: str, parent: Frame, args: Any, kwargs: Any) -> Any:
        label = _relative(parent.module, m, name)
        parent.labels[label] += 1
        given = Arguments(map_proxies(args, _same), map_proxies(kwargs, _same))  # the forward may change its lists
        frame = Frame(m, self.prefix + name, parent, label, parent.labels[label], self._size)
        frame.lines = lines_of(parent.module, self._methods_of)
        questions = len(self.questions)
        if any(above.asks for above in self.stack) and _tells((args, kwargs)):
            self._asked(frame)
        self.stack.append(frame)
        before = len(self.graph.nodes)
        divided = _zoo.is_norm_act(m)
        if not divided:
            self._patch_isinstance(type(m))
        try:
            # not m(...): hooks are the user's, and are not to see proxies
            result = self._norm_act(m, name, args, kwargs) if divided else m.forward(*args, **kwargs)
        except Exception as error:
            result = None
            for node in list(self.graph.nodes)[before:]:
                self.dead.add(node)
            self.broken.setdefault(frame.path, error)
        finally:
            while self.stack.pop() is not frame:
                pass
        if frame.path in self.broken:
            return self._opaque_call(name, label, args, kwargs)
        self.completed.setdefault(frame.path, []).append(given)
        if len(self.questions) > questions and _tells(result):
            self._asked(parent)
        if not isinstance(result, Proxy):
            self.odd.setdefault(parent.path, label)
        frame.result = result.node if type(result) is TensorProxy else None
        return result

    def _opaque_call(self, name: str, label: str, args: Any, kwargs: Any) -> Proxy:
        """One node for a call that could not be traced."""
        try:
            proxy = self.create_proxy("call_module", name, args, kwargs)
        except (NotImplementedError, RuntimeError, TypeError, ValueError):
            # arguments that fx has no words for: what flows in is all that can be said
            found: list[Any] = []
            collect((args, kwargs), found, set())
            proxy = self.create_proxy("call_module", name, tuple(found), {})
            self.values.forget(proxy.node)
        self._note(proxy.node, label, counted=True)
        self.opaque.add(proxy.node)
        return proxy

    def _norm_act(self, m: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Timm's norm + act, in its three parts; its own code would inline the norm."""
        proxy: Any = self.create_proxy("call_module", name, args, kwargs)
        self._note(proxy.node, "norm")
        drop = getattr(m, "drop", None)
        for part in (drop, m.act):
            if isinstance(part, nn.Module) and not isinstance(part, nn.Identity):
                proxy = part(proxy)
        return proxy

    def _note(self, node: Node, label: str, counted: bool = False) -> None:
        frame = self.stack[-1]
        if not counted:
            frame.labels[label] += 1
        self.where[node] = (frame, label, frame.labels[label])
        if self.deep:
            self.lines[node] = lines_of(frame.module, self._methods_of)
        if frame.parent is None and self.deep:
            self.methods[node] = self._method(frame)

    def _note_act(self, node: Node, module: nn.Module | None, name: str, function: str | None) -> None:
        frame = self.stack[-1]
        method = self._method(frame, arguments=True)
        what = function or id(module)
        frame.acts[what] += 1
        frame.acts[what, method] += 1
        self.acts[node] = ActCall(frame, method, module, name, function, frame.acts[what], frame.acts[what, method])

    def _method(self, frame: Frame, arguments: bool = False) -> str:
        """The name of the innermost method of the frame's module that is running.

        With ``arguments``, those of a method other than forward are noted as they are now.
        """
        at: FrameType | None = None if _zoo.is_norm_act(frame.module) else sys._getframe(3)
        while at:
            code = at.f_code
            if code.co_argcount and at.f_locals.get(code.co_varnames[0]) is frame.module:
                found = getattr(type(frame.module), code.co_name, None)
                wrapped = getattr(found, "__wrapped__", found)
                if code.co_name == "forward" or getattr(wrapped, "__code__", None) is code:
                    if arguments and code.co_name != "forward":
                        held = [at.f_locals.get(name) for name in code.co_varnames[1 : code.co_argcount]]
                        given = Arguments(tuple(map_proxies(held, _same)), {})
                        self.helped.setdefault((frame.path, code.co_name), []).append(given)
                    return code.co_name
            at = at.f_back
        return "forward"

    @staticmethod
    def _ambient() -> tuple[Any, ...]:
        return (
            _GRAD(),
            _INFERENCE(),
            _AUTOCAST("cpu"),
            _AUTOCAST("cuda"),
        )


class _Undisturbed:
    """nn.Module as it is without fx's patches, for real calls in the middle of a trace."""

    def __enter__(self) -> None:
        cls: Any = nn.Module
        self._patched = cls.__call__, cls.__getattr__
        cls.__call__, cls.__getattr__ = _CALL, _GETATTR

    def __exit__(self, *_: object) -> None:
        cls: Any = nn.Module
        cls.__call__, cls.__getattr__ = self._patched


_GRAD, _INFERENCE, _AUTOCAST = torch.is_grad_enabled, torch.is_inference_mode_enabled, torch.is_autocast_enabled
_CALL, _GETATTR = nn.Module.__call__, nn.Module.__getattr__


def _same(value: Any) -> Any:
    return value


def _tells(value: Any) -> bool:
    """Whether there is more than tensors in what is handed on: it may say what has been found out about sizes."""
    if isinstance(value, (tuple, list)):
        return any(map(_tells, value))
    return any(map(_tells, value.values())) if isinstance(value, dict) else not isinstance(value, Proxy)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _relative(owner: nn.Module, child: nn.Module, name: str) -> str:
    """The child's name inside ``owner``: its own slot if it has one, else where it is found below, else ``name``."""
    for slot, module in owner._modules.items():
        if module is child:
            return slot
    for path, module in owner.named_modules(remove_duplicate=False):
        if module is child and path:
            return path
    return f"/{name}"
