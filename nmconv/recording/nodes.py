"""The nodes of a recording: what made each tensor, and what has been written to its memory since."""

from __future__ import annotations

import hashlib
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from nmconv.copying import Copy
from nmconv.recording.frames import Frames
from nmconv.recording.recording import Fact, Read, Recording, memory_of
from nmconv.recording.tensors import SIMPLE, held_by, own_tensors, ways_to_tensors

__all__ = ["TENSOR", "Nodes", "ReachesOutside", "hook_sees", "unknown"]

TENSOR = "\0tensor"  # stands for a tensor in a form
_REPRESENTED = (torch.dtype, torch.device, torch.memory_format, torch.layout, type, range, bytes, int, float, str)
_OURS = 4  # references to a tensor that only the recorder holds


def hook_sees(*_: Any) -> None:
    """What stands in a recording for a user's hook that was shown tensors."""


def unknown(*_: Any) -> None:
    """What stands in a recording for whatever made a tensor out of sight: scripted code, other threads."""


class Nodes:
    """Makes the nodes of one recording.

    Args:
        recording: What they are added to.
        copy: Whose run it is.
        frames: What tells who makes them.
    """

    def __init__(self, recording: Recording, copy: Copy, frames: Frames) -> None:
        self._recording = recording
        self._graph = recording.graph
        self._facts = recording.facts
        self._copy = copy
        self._frames = frames
        self._inputs: dict[str, Tensor] = {}
        self._held = dict(held_by(copy.model))
        self._attributes = {id(value): name for name, value in reversed(self._held.items())}
        self._named: dict[str, Node] = {}
        self._values: dict[int, tuple[Tensor, Node, tuple[Any, ...]]] = {}
        self._items: dict[tuple[Node, Any], Node] = {}
        self._writers: dict[int, Node] = {}
        self._settings: dict[str, tuple[str, ...]] = {}

    # -- calls --------------------------------------------------------------------------------------------------------

    def input(self, spec: Any) -> Tensor:
        """A new tensor that the model is called with."""
        name = f"input_{len(self._inputs)}"
        made = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        self._inputs[name] = made
        fact = Fact(self._frames.first, form=("input", name, _kind(made)), shapes=(tuple(made.shape),))
        node = self._create("placeholder", name, (), {}, fact)
        self._values[id(made)] = (made, node, ())
        return made

    def function(self, func: Any, label: str, args: Any, kwargs: Any) -> Node:
        """A node for a call of a function."""
        reads: list[Read] = []
        (given, named), form = self._refer((tuple(args), dict(kwargs)), reads)
        return self._create("call_function", func, given, named, self._frames.fact(label, form, reads))

    def module(self, module: nn.Module, path: str, args: Any, kwargs: Any) -> Node:
        """A node for a call of a leaf."""
        reads: list[Read] = []
        (given, named), form = self._refer((tuple(args), kwargs), reads)
        own = [value for _, value in own_tensors(module)]
        computed = [value for value in own if id(value) not in self._attributes]
        changed = [value for value in own if memory_of(value) in self._writers] if self._writers else []
        extra: Any = ()
        if computed or changed:  # a weight that a hook computes, a buffer that somebody has written to
            _, extra = self._refer((computed, changed), reads)
        fact = self._frames.fact(path, (form, extra), reads, is_module=True)
        if path not in self._settings:
            cls, shown = type(module), repr(module) if module._modules else module.extra_repr()
            self._settings[path] = (cls.__module__, cls.__qualname__, shown)
        fact.settings = self._settings[path]
        return self._create("call_module", path, given, named, fact)

    def bind(self, node: Node, returned: Any, written: list[Tensor]) -> None:
        """Note what a call has returned and what it has written to."""
        fact = self._facts[node]
        if written:
            memories = dict.fromkeys(map(memory_of, written))
            fact.before = tuple(map(self._writers.get, memories))
            self._writers.update(dict.fromkeys(memories, node))
        shapes: list[tuple[int, ...]] = []
        for value, way in ways_to_tensors(returned):
            shapes.append(tuple(value.shape))
            if not written and not way:
                found = self._values.get(id(value))
                fact.passes = found is not None and found[0] is value
            self._values[id(value)] = (value, node, way)
        fact.shapes = tuple(shapes)

    def finish(self, returned: Any) -> None:
        """Note what the model has returned, and what it has written to and kept."""
        recording = self._recording
        reads: list[Read] = []
        _, form = self._refer(returned, reads, deep=True)
        recording.output = (form, tuple(reads))
        if reads:
            self._graph.output(tuple(node for node, _ in reads))
        for name, value in (*self._inputs.items(), *self._held.items()):
            if memory_of(value) in self._writers:
                recording.written[name] = self._read(value)
        for name, value in held_by(self._copy.model):
            if self._held.get(name) is not value and id(value) in self._values:
                recording.stored[name] = self._read(value)

    # -- tensors ------------------------------------------------------------------------------------------------------

    def let_be(self, value: Tensor, node: Node) -> None:
        """Let a tensor be what a node has made."""
        self._values[id(value)] = (value, node, ())

    def is_written(self, value: Tensor) -> bool:
        """Whether anything has written to a tensor's memory."""
        return memory_of(value) in self._writers

    def _create(self, op: str, target: Any, args: Any, kwargs: Any, fact: Fact) -> Node:
        node = self._graph.create_node(op, target, args, kwargs, name=f"v{len(self._facts)}")
        self._facts[node] = fact
        return node

    def _refer(self, value: Any, reads: list[Read], deep: bool = False) -> tuple[Any, Any]:
        """A value for the graph, with nodes in the place of tensors, and its form."""
        if isinstance(value, Tensor):
            read = self._read(value)
            reads.append(read)
            return read[0], TENSOR
        kind = type(value)
        if self._recording.call.asks and isinstance(value, (int, float)) and kind is not bool:
            kind = int if isinstance(value, int) else float
            value = kind(value)
        if kind in SIMPLE:
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
        node = self.of(value)
        writer = self._writers.get(memory_of(value))
        return node, None if writer is node else writer

    def of(self, value: Tensor) -> Node:
        """What made a tensor."""
        found = self._values.get(id(value))
        if found is not None and found[0] is value:
            return self._item(found[1], found[2], value)
        name = self._attributes.get(id(value))
        if name is not None:
            if name not in self._named:
                form = ("attribute", name, _kind(value))
                fact = Fact(self._frames.first, label=name, form=form, shapes=(tuple(value.shape),))
                self._named[name] = self._create("get_attr", name, (), {}, fact)
            return self._named[name]
        name = self._copy.names.get(id(value))
        if name is not None:
            raise ReachesOutside(name, self._frames.now.path)
        node = self._constant(value) if not value.is_meta else self._unknown(value)
        self._values[id(value)] = (value, node, ())
        return node

    def _constant(self, value: Tensor) -> Node:
        with torch._C.DisableTorchFunction():
            plain = value.detach().cpu().resolve_conj().contiguous().reshape(-1)
            numbers = hashlib.sha256(plain.view(torch.uint8).numpy().tobytes()).hexdigest()
        form = ("constant", _kind(value), numbers)
        fact = Fact(self._frames.now, form=form, shapes=(tuple(value.shape),))
        return self._create("get_attr", f"_constant_{len(self._facts)}", (), {}, fact)

    def _unknown(self, value: Tensor) -> Node:
        """A tensor made out of sight: all that its maker could reach may be in it."""
        made = list(self._values.values())
        reads = [self._read(held) for held, _, _ in made if sys.getrefcount(held) > _OURS]
        fact = self._frames.fact("unknown", ("unknown", _kind(value)), reads)
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


class ReachesOutside(Exception):
    """The copy meets a tensor of the model it was made from."""

    def __init__(self, name: str, path: str) -> None:
        super().__init__(
            f"a copy of the model reaches {name!r} of the model itself, in the forward of {path or 'the model'} (a "
            "global, or something that copying shares): hold it as a submodule or parameter, or pass witness=False"
        )


def _item_of(value: Any, key: Any) -> Any:
    return value[key]


def _kind(value: Tensor) -> tuple[Any, ...]:
    return tuple(value.shape), str(value.dtype)
