"""The function mode that records a copy's run, and what it answers where meta tensors would tell another story."""

from __future__ import annotations

import hashlib
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from nmconv.errors import InternalError, ModelTypeError
from nmconv.recording._answers import ASKS_DATA, Answers, ModelRaised, NeedsData
from nmconv.recording._context import context_now
from nmconv.recording._copy import Copy
from nmconv.recording._disguise import disguise
from nmconv.recording._methods import methods_of
from nmconv.recording._outcomes import Outcome, Outcomes, key_of_function, key_of_module, outcome_of_norm
from nmconv.recording._records import Call, Fact, Frame, Lines, Read, Recording, Spec, map_tensors, memory_of
from nmconv.recording._sizes import SizeQuestions

__all__ = [
    "TENSOR",
    "Recorder",
    "hook_sees",
    "is_recording",
    "label_of",
    "not_recorded",
    "noted",
    "unknown",
    "wrap",
]

_state = threading.local()


def is_recording() -> bool:
    """Whether this thread is recording a model's run."""
    return bool(getattr(_state, "depth", 0))


def hook_sees(*_: Any) -> None:
    """What stands in a recording for a user's hook that was shown tensors."""


def unknown(*_: Any) -> None:
    """What stands in a recording for whatever made a tensor out of sight: compiled code, other threads."""


TENSOR = "\0tensor"  # stands for a tensor in a form
_MAKERS = _device_constructors()
_VALUE_MAKERS = (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, torch.scalar_tensor)
_DEVICE, _IS_CPU, _IS_META, _IS_CUDA = (getattr(Tensor, name) for name in ("device", "is_cpu", "is_meta", "is_cuda"))
_SIZES = ("size", "stride", "numel", "nelement", "__len__")
_MEASURES = (Tensor.shape, Tensor.nbytes)
_MOVES = ("cpu", "cuda", "xpu")
_VIEWS = frozenset(
    getattr(Tensor, name) for name in ("T", "mT", "H", "mH", "data", "real", "imag") if hasattr(Tensor, name)
)
_ABOUT = frozenset(
    ("size", "dim", "ndimension", "__len__", "numel", "nelement", "stride", "element_size", "is_contiguous",
     "is_floating_point", "is_complex", "is_signed", "get_device", "storage_offset", "requires_grad_", "is_tensor",
     "is_inference", "is_same_size", "__hash__", "untyped_storage", "register_hook", "retain_grad", "__dir__",
     "__repr__", "_set_grad_enabled")
)  # fmt: skip
_INSIDE = ("torch._refs", "torch._prims", "torch._meta_registrations", "torch._decomp", "torch._inductor")


class Recorder(TorchFunctionMode):
    """Records one run of a copy.

    Args:
        copy: Of the model.
        call: How it is called.
        path: Which part of it is called.
        is_leaf: Whether a module is one node.
        device: What the model's tensors are asked for.
        answers: What data decide.
        outcomes: What leaves gave before; added to.
    """

    def __init__(
        self,
        copy: Copy,
        call: Call,
        path: str,
        is_leaf: Callable[[nn.Module], bool],
        device: torch.device,
        answers: Answers,
        outcomes: Outcomes,
    ) -> None:
        super().__init__()
        self._copy = copy
        self._device = device
        self._answers = answers
        self._outcomes = outcomes
        self.graph = Graph()
        self.recording = Recording(call, path, self.graph, {}, answers=answers)
        self._facts = self.recording.facts
        first: dict[int, str] = {}
        for name, module in copy.model.named_modules(remove_duplicate=False):
            if first.setdefault(id(module), name) != name:
                self.recording.names[name] = first[id(module)]
        self._codes = self.recording.codes
        self._methods: dict[type, frozenset[CodeType]] = {}
        self._thread = threading.get_ident()
        self._depth = 0
        self._questions: SizeQuestions | None = None
        if call.asks:
            self._questions = SizeQuestions(
                call.other_way, lambda: None if self._depth else self._stack[-1], lambda: len(self._facts)
            )
            self.recording.questions, self.recording.lost = self._questions.asked, self._questions.lost
        self._values: dict[int, tuple[Tensor, Node, tuple[Any, ...]]] = {}
        self._items: dict[tuple[Node, Any], Node] = {}
        self._held = dict(_held(copy.model))
        self._attributes = {id(value): name for name, value in reversed(self._held.items())}
        self._named: dict[str, Node] = {}
        self._writers: dict[int, Node] = {}
        self._twins: dict[int, tuple[Tensor, Tensor]] = {}
        self._known: dict[int, Any] = {}  # real values of constants made inside, by their twins' ids
        self._settings: dict[str, tuple[str, ...]] = {}
        self._inputs: dict[str, Tensor] = {}
        self._asks: Counter[tuple[str, str]] = Counter()
        self._fault: BaseException | None = None
        self._outside: _ReachesOutside | None = None
        self._needs = ""
        self._stack = [Frame(type(copy.model), "", None)]
        wrap(copy.model, is_leaf, self._forwarded)
        disguise(copy.model, call.disguised)

    # -- running ------------------------------------------------------------------------------------------------------

    def run(self) -> Recording:
        """Call the copy and note all that happens.

        Raises:
            ModelRaised: If the model's code raises.
            NeedsData: If the run asks for numbers that ``answers`` does not have.
            ModelTypeError: If the copy reaches a tensor of the model itself.
            InternalError: If the recorder fails.
        """
        call = self.recording.call
        model = self._copy.model.get_submodule(self.recording.path)
        args, kwargs = self._given(call.args), self._given(call.kwargs)
        function = model if call.method == "forward" else getattr(model, call.method)
        try:
            with noted(), torch.set_grad_enabled(call.grad), self:
                returned = function(*args, **kwargs)
            with self._ours():
                self._finish(returned)
        except Exception as error:
            if self._fault is None and self._outside is None and not self._needs:
                raise ModelRaised(error) from error
        if self._outside is not None:
            raise ModelTypeError(str(self._outside))
        if self._fault is not None:
            text = f"{type(self._fault).__name__}: {self._fault}"
            raise InternalError(f"a bug in nmconv, please report: recording failed with {text}") from self._fault
        if self._needs:
            raise NeedsData(self._needs)
        return self.recording

    @contextmanager
    def _ours(self) -> Iterator[None]:
        """Whatever goes wrong inside is a fault of this library, not of the model's."""
        try:
            with torch._C.DisableTorchFunction():
                yield
        except _ReachesOutside as error:
            self._outside = error
            raise
        except Exception as error:
            self._fault = self._fault or error
            raise

    def _given(self, value: Any) -> Any:
        """Arguments in which each tensor is an input of the graph."""
        return map_tensors(value, self._input)

    def _input(self, spec: Any) -> Tensor:
        name = f"input_{len(self._inputs)}"
        made = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        self._inputs[name] = made
        fact = Fact(self._stack[0], form=("input", name, _kind(made)), shapes=(tuple(made.shape),))
        node = self._create("placeholder", name, (), {}, fact)
        self._values[id(made)] = (made, node, ())
        return made

    def _finish(self, returned: Any) -> None:
        recording = self.recording
        reads: list[Read] = []
        _, form = self._refer(returned, reads, deep=True)
        recording.output = (form, tuple(reads))
        if reads:
            self.graph.output(tuple(node for node, _ in reads))
        for name, value in (*self._inputs.items(), *self._held.items()):
            if memory_of(value) in self._writers:
                recording.written[name] = self._read(value)
        for name, value in _held(self._copy.model):
            if self._held.get(name) is not value and id(value) in self._values:
                recording.stored[name] = self._read(value)

    # -- modules ------------------------------------------------------------------------------------------------------

    def _forwarded(self, module: nn.Module, path: str, leaf: bool, forward: Any, args: Any, kwargs: Any) -> Any:
        if self._depth or threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        if not leaf:
            with self._ours():
                frame = self._frame(module, path, args, kwargs)
            self._stack.append(frame)
            try:
                returned = forward(*args, **kwargs)
            finally:
                self._stack.pop()
            if isinstance(returned, Tensor):
                with self._ours():
                    frame.result = self._node_of(returned)
        else:
            returned = self._leaf(module, path, forward, args, kwargs)
        if any(not isinstance(hook, (WeightNorm, SpectralNorm)) for hook in _hooks_of(module)):
            with self._ours():
                self.recording.seen.append(
                    self._note_function(hook_sees, f"a hook on {path}", (args, kwargs, returned), {})
                )
        return returned

    def _leaf(self, module: nn.Module, path: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        with self._ours():
            node, tensors = self._module_node(module, path, args, kwargs)
            key = key_of_module(module, self._facts[node], tensors)
            if key is not None and isinstance(module, nn.modules.batchnorm._BatchNorm) and len(args) == 1:
                counter = module.num_batches_tracked if module.training else None
                self._outcomes.setdefault(key, outcome_of_norm(args[0], tensors, counter))
        return self._called(node, key, tensors, lambda: forward(*args, **kwargs))

    def _called(self, node: Node, key: Any, tensors: list[Tensor], do: Callable[[], Any]) -> Any:
        """What a call gives: what it gave before on tensors of the same kinds, or what it gives now."""
        outcome = self._outcomes.get(key)
        if outcome is not None:
            with self._ours():
                returned = outcome.returned()
                self._asks[self._facts[node].label, self._facts[node].frame.path] += 1
                self._bind(node, returned, [tensors[at] for at in outcome.written])
            return returned
        before = [_version(value) for value in tensors]
        self._depth += 1
        try:
            returned = self._tried(node, do)
        finally:
            self._depth -= 1
        with self._ours():
            written = _written(tensors, before)
            self._bind(node, returned, written)
            if key is not None:
                self._outcomes[key] = Outcome.of(returned, tensors, written)
        return returned

    def _frame(self, module: nn.Module, path: str, args: Any, kwargs: Any) -> Frame:
        lines = self._position(is_module=True)[-1]
        given, named = map_tensors(args, _spec_of), map_tensors(kwargs, _spec_of)
        frame = Frame(type(module), path, self._stack[-1], given, named, len(self._facts), lines)
        self.recording.frames.append(frame)
        return frame

    def _module_node(self, module: nn.Module, path: str, args: Any, kwargs: Any) -> tuple[Node, list[Tensor]]:
        reads: list[Read] = []
        (given, named), form = self._refer((tuple(args), kwargs), reads)
        own = [value for _, value in _own_tensors(module)]
        computed = [value for value in own if id(value) not in self._attributes]
        changed = [value for value in own if memory_of(value) in self._writers] if self._writers else []
        extra: Any = ()
        if computed or changed:  # a weight that a hook computes, a buffer that somebody has written to
            _, extra = self._refer((computed, changed), reads)
        fact = self._fact(path, (form, extra), reads, is_module=True)
        if path not in self._settings:
            cls, shown = type(module), repr(module) if module._modules else module.extra_repr()
            self._settings[path] = (cls.__module__, cls.__qualname__, shown)
        fact.settings = self._settings[path]
        node = self._create("call_module", path, given, named, fact)
        tensors = _tensors_in((args, kwargs))
        return node, [*tensors, *(value for value in own if module.training)]

    # -- functions ----------------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._depth or _is_inside():
            return self._plain(func, args, kwargs)
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._property(func, args)
        if not_recorded(func):
            if name in _SIZES and args and isinstance(args[0], Tensor):
                self._note_sized(args[0])
                value = func(*args, **kwargs)
                if name == "__len__" and self._questions is not None:  # which must be a plain number
                    return self._questions.number(value)
                return self._sizes(value)
            return func(*args, **kwargs)
        with self._ours():
            label = label_of(func)
            known = self._known_value(name, args)
            if known is not None:
                if self._questions is not None and id(args[0]) in self._known:  # sizes may be in it
                    self._questions.lose(None)
                self._asks[label, self._stack[-1].path] += 1
                return known[0]
            node = self._note_function(func, label, args, kwargs)
            given, named = self._on_meta(func, name, args, kwargs)
            tensors = _tensors_in((given, named))
            key = None if func in _VALUE_MAKERS else key_of_function(func, self._facts[node], tensors)
            if func is F.batch_norm and key is not None:
                self._outcomes.setdefault(key, outcome_of_norm(given[0], tensors))
            target = Tensor.to if name in _MOVES else func
        returned = self._called(node, key, tensors, lambda: self._moved(target, target(*given, **named)))
        if name == "__set__":  # x.data = y
            self._values[id(args[0])] = (args[0], node, ())
        return returned

    def _plain(self, func: Any, args: Any, kwargs: Any) -> Any:
        if getattr(func, "__name__", "") == "__get__" and args:
            answer = self._about_device(func)
            if answer is not None:
                return answer
        if func in _MAKERS:
            _, kwargs = self._on_meta(func, "", (), kwargs)
        return func(*args, **kwargs)

    def _about_device(self, func: Any) -> Any:
        owner = getattr(func, "__self__", None)
        if owner is _DEVICE:
            return self._device
        if owner is _IS_META:
            return False
        if owner is _IS_CPU or owner is _IS_CUDA:
            return self._device.type == ("cpu" if owner is _IS_CPU else "cuda")
        return None

    def _property(self, func: Any, args: Any) -> Any:
        answer = self._about_device(func)
        if answer is not None:
            return answer
        owner = getattr(func, "__self__", None)
        if owner not in _VIEWS:
            if owner not in _MEASURES:
                return func(*args)
            self._note_sized(args[0])
            return self._sizes(func(*args))
        with self._ours():
            node = self._note_function(func, getattr(owner, "__name__", "?"), args, {})
            returned = func(*args)
            self._bind(node, returned, [])
        return returned

    def _note_sized(self, value: Tensor) -> None:
        with self._ours():
            self.recording.sized.add(self._node_of(value))

    def _sizes(self, value: Any) -> Any:
        return value if self._questions is None else self._questions.hand_out(value)

    def _note_function(self, func: Any, label: str, args: Any, kwargs: Any) -> Node:
        reads: list[Read] = []
        (given, named), form = self._refer((tuple(args), dict(kwargs)), reads)
        return self._create("call_function", func, given, named, self._fact(label, form, reads))

    def _tried(self, node: Node, do: Callable[[], Any]) -> Any:
        """What a call gives; where only data can tell, what they told a real run."""
        fact = self._facts[node]
        asks = fact.label in ASKS_DATA
        key = (fact.label, fact.frame.path)
        if not asks:
            try:
                returned = do()
            except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError) as error:
                if not self._answers.may_know(error):
                    raise
            else:
                self._asks[key] += 1
                return returned
        self._asks[key] += 1
        with self._ours():
            found = self._answers.get((*key, self._asks[key]))
            self.recording.asked.append(key)
            if found is None:
                self._needs = f"{fact.label} in {fact.frame.path or 'the model'}"
        if found is None:
            raise NeedsData(self._needs)
        return found[0]

    def _known_value(self, name: str, args: Any) -> tuple[Any] | None:
        """The value of a tensor that is known though its twin holds none: a buffer that nothing has written to."""
        if name not in ("item", "__bool__", "__int__", "__float__", "__index__", "tolist", "is_nonzero") or not args:
            return None
        value = args[0]
        original = self._copy.originals.get(id(value), self._known.get(id(value)))
        if original is None or original.is_meta or memory_of(value) in self._writers:
            return None
        ask = Tensor.__bool__ if name == "is_nonzero" else getattr(Tensor, name)
        with torch._C.DisableTorchFunction():
            return (ask(original),)

    def _on_meta(self, func: Any, name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Arguments that keep all on the meta device."""
        if func in _VALUE_MAKERS:
            return args, kwargs
        kwargs = {key: value for key, value in kwargs.items() if key not in ("generator", "pin_memory")}
        if kwargs.get("device") is not None or func in _MAKERS:
            kwargs["device"] = "meta"
        if name in _MOVES:
            args, kwargs = (args[0], "meta"), {}
        elif name == "to":
            args = (args[0], *("meta" if isinstance(part, (str, torch.device)) else part for part in args[1:]))
        return self._twinned(args), self._twinned(kwargs)

    def _twinned(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.is_meta:
                return value
            if id(value) not in self._twins:
                with torch._C.DisableTorchFunction():
                    self._twins[id(value)] = (value, value.detach().to("meta"))
            return self._twins[id(value)][1]
        if type(value) in (list, tuple):
            return type(value)(map(self._twinned, value))
        if type(value) is dict:
            return {key: self._twinned(part) for key, part in value.items()}
        return value

    def _moved(self, func: Any, returned: Any) -> Any:
        """The twin of a tensor that was made of numbers."""
        if func not in _VALUE_MAKERS or not isinstance(returned, Tensor) or returned.is_meta:
            return returned
        made = returned.detach().to("meta").requires_grad_(returned.requires_grad)
        self._known[id(made)] = returned
        return made

    # -- nodes --------------------------------------------------------------------------------------------------------

    def _create(self, op: str, target: Any, args: Any, kwargs: Any, fact: Fact) -> Node:
        node = self.graph.create_node(op, target, args, kwargs, name=f"v{len(self._facts)}")
        self._facts[node] = fact
        return node

    def _fact(self, label: str, form: Any, reads: list[Read], is_module: bool = False) -> Fact:
        frame = self._stack[-1]
        frame.calls[label, is_module] += 1
        method, code, offset, lines = self._position(is_module)
        number = frame.calls[label, is_module]
        return Fact(frame, method, code, offset, lines, label, number, (), form, tuple(reads), context_now())

    def _position(self, is_module: bool) -> tuple[str, CodeType | None, int, Lines]:
        """The innermost method of the frame's module that runs, where the call is made, and the lines up to it."""
        at: FrameType | None = sys._getframe(3)
        while is_module and at is not None and at.f_code.co_name != "nmconv_forward":
            at = at.f_back
        at = at.f_back if is_module and at is not None else at
        frame = self._stack[-1]
        cls = frame.cls
        if cls not in self._methods:
            self._methods[cls] = methods_of(cls)
        methods = self._methods[cls]
        method, code, offset = "", None, 0
        lines: list[tuple[CodeType, int]] = []
        while at is not None:
            running = at.f_code
            if running is _RUN or (running.co_name == "nmconv_forward" and _is_called(at)):
                break
            home = at.f_globals.get("__name__") or ""
            if not home.startswith(("torch.", "nmconv.recording")) and home != "torch":
                self._codes.add(running)
                if code is None:
                    code, offset = running, at.f_lasti
                if running in methods:
                    lines.append((running, at.f_lineno))
                if not method and _is_method(cls, running):
                    method = running.co_name
                    if method != "forward" and (frame, method) not in self.recording.helped:
                        held = tuple(at.f_locals.get(name) for name in running.co_varnames[1 : running.co_argcount])
                        self.recording.helped[frame, method] = map_tensors(held, _spec_of)
            at = at.f_back
        return method or "forward", code, offset, tuple(reversed(lines))

    def _refer(self, value: Any, reads: list[Read], deep: bool = False) -> tuple[Any, Any]:
        """A value for the graph, with nodes in the place of tensors, and its form."""
        if isinstance(value, Tensor):
            read = self._read(value)
            reads.append(read)
            return read[0], TENSOR
        kind = type(value)
        if self._questions is not None and isinstance(value, (int, float)) and kind is not bool:
            kind = int if isinstance(value, int) else float
            value = kind(value)
        if kind in _SIMPLE:
            return value, (kind.__name__, repr(value)) if kind is float else value if kind is not bool else (value,)
        if isinstance(value, (list, tuple)):
            parts = [self._refer(part, reads, deep) for part in value]
            made = [part for part, _ in parts]
            return (made if kind is list else tuple(made)), (kind.__name__, *(form for _, form in parts))
        if isinstance(value, dict):
            found = {key: self._refer(part, reads, deep) for key, part in value.items()}
            plain = {str(key): part for key, (part, _) in found.items()}
            return plain, (kind.__name__, *((repr(key), form) for key, (_, form) in found.items()))
        if kind is slice:
            ends = [self._refer(part, reads) for part in (value.start, value.stop, value.step)]
            return slice(*(part for part, _ in ends)), ("slice", *(form for _, form in ends))
        if isinstance(value, nn.Module):
            return None, ("module", type(value).__qualname__)
        if deep and isinstance(getattr(value, "__dict__", None), dict) and not callable(value):
            return None, (kind.__name__, self._refer(dict(vars(value)), reads, deep)[1])
        if isinstance(value, _REPRESENTED):
            return None, (kind.__name__, repr(value))
        return None, kind.__name__

    def _read(self, value: Tensor) -> Read:
        node = self._node_of(value)
        writer = self._writers.get(memory_of(value))
        return node, None if writer is node else writer

    def _node_of(self, value: Tensor) -> Node:
        found = self._values.get(id(value))
        if found is not None and found[0] is value:
            return self._item(found[1], found[2], value)
        name = self._attributes.get(id(value))
        if name is not None:
            if name not in self._named:
                form = ("attribute", name, _kind(value))
                fact = Fact(self._stack[0], label=name, form=form, shapes=(tuple(value.shape),))
                self._named[name] = self._create("get_attr", name, (), {}, fact)
            return self._named[name]
        name = self._copy.names.get(id(value))
        if name is not None:
            raise _ReachesOutside(name, self._stack[-1].path)
        node = self._constant(value) if not value.is_meta else self._unknown(value)
        self._values[id(value)] = (value, node, ())
        return node

    def _constant(self, value: Tensor) -> Node:
        with torch._C.DisableTorchFunction():
            plain = value.detach().cpu().resolve_conj().contiguous().reshape(-1)
            numbers = hashlib.sha256(plain.view(torch.uint8).numpy().tobytes()).hexdigest()
        form = ("constant", _kind(value), numbers)
        fact = Fact(self._stack[-1], form=form, shapes=(tuple(value.shape),))
        return self._create("get_attr", f"_constant_{len(self._facts)}", (), {}, fact)

    def _unknown(self, value: Tensor) -> Node:
        """A tensor made out of sight: all that its maker could reach may be in it."""
        made = list(self._values.values())
        reads = [self._read(held) for held, _, _ in made if sys.getrefcount(held) > _OURS]
        fact = self._fact("unknown", ("unknown", _kind(value)), reads)
        return self._create("call_function", unknown, tuple(node for node, _ in reads), {}, fact)

    def _item(self, node: Node, way: tuple[Any, ...], value: Tensor) -> Node:
        """The part of what a node returned that lies this way."""
        for at, key in enumerate(way, 1):
            if (node, key) not in self._items:
                made = self._facts[node]
                form, reads = ("item", repr(key)), ((node, None),)
                shapes = (tuple(value.shape),) if at == len(way) else ()
                fact = Fact(
                    made.frame, made.method, label="item", form=form, reads=reads, context=made.context, shapes=shapes
                )
                self._items[node, key] = self._create("call_function", _item_of, (node, key), {}, fact)
            node = self._items[node, key]
        return node

    def _bind(self, node: Node, returned: Any, written: list[Tensor]) -> None:
        """Note what a call has returned and what it has written to."""
        fact = self._facts[node]
        if written:
            memories = dict.fromkeys(map(memory_of, written))
            fact.before = tuple(map(self._writers.get, memories))
            self._writers.update(dict.fromkeys(memories, node))
        shapes: list[tuple[int, ...]] = []
        for value, way in _ways(returned, ()):
            shapes.append(tuple(value.shape))
            if not written and not way:
                found = self._values.get(id(value))
                fact.passes = found is not None and found[0] is value
            self._values[id(value)] = (value, node, way)
        fact.shapes = tuple(shapes)


class _ReachesOutside(Exception):
    """The copy meets a tensor of the model it was made from."""

    def __init__(self, name: str, path: str) -> None:
        super().__init__(
            f"a copy of the model reaches {name!r} of the model itself, in the forward of {path or 'the model'} (a "
            "global, or something that copying shares): hold it as a submodule or parameter, or pass witness=False"
        )


_RUN = Recorder.run.__code__


def _item_of(value: Any, key: Any) -> Any:
    return value[key]


_SIMPLE = frozenset((bool, int, float, complex, str, type(None), type(Ellipsis)))
_REPRESENTED = (torch.dtype, torch.device, torch.memory_format, torch.layout, type, range, bytes, int, float, str)
_OURS = 4  # references to a tensor that only the recorder holds


def label_of(func: Any) -> str:
    """What a function is called; operators like the methods they stand for."""
    name = getattr(func, "__name__", "") or str(func)
    if name == "__get__":
        return str(getattr(getattr(func, "__self__", None), "__name__", "?"))
    return name.strip("_") if name.startswith("__") and name not in ASKS_DATA else name


def not_recorded(func: Any) -> bool:
    """Whether a function only tells about a tensor."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(func, "__self__", None) not in _VIEWS
    return name in _ABOUT


def _is_inside(level: int = 2) -> bool:
    """Whether torch's own code calls, in computing what compiled code gives on the meta device."""
    return (sys._getframe(level).f_globals.get("__name__") or "").startswith(_INSIDE)


def wrap(model: nn.Module, is_leaf: Callable[[nn.Module], bool], forwarded: Callable[..., Any]) -> None:
    """Let each module of a copy call ``forwarded(module, path, is a leaf, forward, args, kwargs)`` when it is called.

    A forward that is called as ``module.forward(...)`` counts as code of the caller's, as it does in fx's traces.
    """
    for path, module in list(model.named_modules()):
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
        if not isinstance(module, torch.jit.ScriptModule):
            module.__dict__["forward"] = _wrapped(module, path, is_leaf(module), module.forward, forwarded)


def _wrapped(
    module: nn.Module, path: str, leaf: bool, forward: Any, forwarded: Callable[..., Any]
) -> Callable[..., Any]:
    def nmconv_forward(*args: Any, **kwargs: Any) -> Any:
        if not _is_called(sys._getframe()):
            return forward(*args, **kwargs)
        return forwarded(module, path, leaf, forward, args, kwargs)

    return nmconv_forward


def _is_called(at: FrameType) -> bool:
    """Whether a wrapped forward runs because its module was called, and not by name."""
    return at.f_back is not None and at.f_back.f_globals.get("__name__") == "torch.nn.modules.module"


@contextmanager
def noted() -> Iterator[None]:
    """While a copy is made ready and runs."""
    _state.depth = getattr(_state, "depth", 0) + 1
    try:
        yield
    finally:
        _state.depth -= 1


def _hooks_of(module: nn.Module) -> list[Any]:
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


def _spec_of(value: Any) -> Spec:
    return Spec(tuple(value.shape), value.dtype)


def _kind(value: Tensor) -> tuple[Any, ...]:
    return tuple(value.shape), str(value.dtype)


def _version(value: Tensor) -> int:
    return 0 if value.is_inference() else value._version


def _written(tensors: list[Tensor], before: list[int]) -> list[Tensor]:
    """Those whose version has changed."""
    return [value for value, version in zip(tensors, before, strict=True) if _version(value) != version]


def _is_method(cls: type, code: CodeType) -> bool:
    for base in cls.__mro__:
        found = base.__dict__.get(code.co_name)
        while found is not None:
            if getattr(found, "__code__", None) is code:
                return True
            found = getattr(found, "__wrapped__", None)
    return False


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A leaf's parameters, buffers and other tensors, those of parts of it too."""
    for part in module.modules() if module._modules else (module,):
        for space in (part._parameters, part._buffers, part.__dict__):
            for name, value in space.items():
                if isinstance(value, Tensor):
                    yield name, value


def _held(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that the model's modules hold: in containers and plain objects too, by where it is."""
    for path, module in model.named_modules():
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            if value is not None:
                yield (f"{path}.{name}" if path else name), value
        for name, value in list(vars(module).items()):
            if name not in _OWN and type(value) not in _SIMPLE:
                yield from _held_in(value, f"{path}.{name}" if path else name, set(), 4)


_OWN = frozenset(nn.Module().__dict__) | {"forward"}


def _held_in(value: Any, name: str, seen: set[int], depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif depth and id(value) not in seen and type(value) not in _SIMPLE and not isinstance(value, (nn.Module, type)):
        seen.add(id(value))
        parts: Mapping[Any, Any] = {}
        if isinstance(value, dict):
            parts = dict(dict.items(value))
        elif isinstance(value, (list, tuple, set, frozenset, deque)):
            parts = dict(enumerate(value))
        elif isinstance(getattr(value, "__dict__", None), dict) and not callable(value):
            parts = dict(vars(value))
        for key, part in parts.items():
            yield from _held_in(part, f"{name}.{key}", seen, depth - 1)


def _tensors_in(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    todo = [value]
    while todo:
        part = todo.pop()
        if isinstance(part, Tensor):
            found.append(part)
        elif isinstance(part, (list, tuple)):
            todo += part
        elif isinstance(part, dict):
            todo += part.values()
    return found


def _ways(value: Any, way: tuple[Any, ...], depth: int = 4) -> Iterator[tuple[Tensor, tuple[Any, ...]]]:
    """The tensors in what a call returned, and how to get to each."""
    if isinstance(value, Tensor):
        yield value, way
    elif depth and isinstance(value, (list, tuple)):
        for key, part in enumerate(value):
            yield from _ways(part, (*way, key), depth - 1)
    elif depth and isinstance(value, dict):
        for name, part in value.items():
            yield from _ways(part, (*way, str(name)), depth - 1)
    elif depth and type(value) not in _SIMPLE and isinstance(getattr(value, "__dict__", None), dict):
        for name, part in vars(value).items():
            yield from _ways(part, (*way, name), depth - 1)
