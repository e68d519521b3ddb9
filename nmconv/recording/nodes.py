"""The nodes of a recording: which node made each tensor, and which one last wrote to its memory."""

from __future__ import annotations

import hashlib
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from nmconv.copying import Copy
from nmconv.recording.forwards import FrameStack
from nmconv.recording.recording import Fact, Read, Recording
from nmconv.recording.tensors import PLAIN_TYPES, Spec, held_tensors, leaf_tensors, memory_of, tensor_paths

__all__ = ["TENSOR", "NodeBuilder", "ReachesModel", "unknown", "user_hook"]

TENSOR = "\0tensor"  # stands for a tensor in a form
_REPR_TYPES = (torch.dtype, torch.device, torch.memory_format, torch.layout, type, range, bytes, int, float, str)
_OWN_REFERENCES = 4  # to a tensor that only the recorder holds


def user_hook(*_: Any) -> None:
    """Target of nodes that stand for a user's hook; their arguments are the tensors that it was given."""


def unknown(*_: Any) -> None:
    """Target of nodes that stand for unrecorded code: scripted code, other threads."""


class NodeBuilder:
    """Adds nodes to a recording.

    Args:
        recording: The recording.
        copy: The copy that runs.
        frames: The running forwards.
    """

    def __init__(self, recording: Recording, copy: Copy, frames: FrameStack) -> None:
        self._recording = recording
        self._graph = recording.graph
        self._facts = recording.facts
        self._copy = copy
        self._frames = frames
        self._inputs: dict[str, Tensor] = {}
        self._held = dict(held_tensors(copy.model))
        self._names = {id(value): name for name, value in reversed(self._held.items())}
        self._attribute_nodes: dict[str, Node] = {}
        # Each tensor with the node that returned it and its path in the returned value, by id. Holding the tensors
        # keeps their ids from being reused.
        self._results: dict[int, tuple[Tensor, Node, tuple[Any, ...]]] = {}
        self._item_nodes: dict[tuple[Node, Any], Node] = {}
        self._writers: dict[int, Node] = {}  # the last node that wrote to each memory
        self._settings: dict[str, tuple[str, ...]] = {}

    # -- calls --------------------------------------------------------------------------------------------------------

    def add_input(self, spec: Spec) -> Tensor:
        """Add a placeholder and return its tensor."""
        name = f"input_{len(self._inputs)}"
        value = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        self._inputs[name] = value
        fact = Fact(self._frames.root, form=("input", name, _kind(value)), shapes=(tuple(value.shape),))
        self.set_node(value, self._create("placeholder", name, (), {}, fact))
        return value

    def add_function(self, func: Any, label: str, args: Any, kwargs: Any) -> Node:
        """Add a node for a call of a function."""
        reads: list[Read] = []
        (node_args, node_kwargs), form = self._encode((tuple(args), dict(kwargs)), reads)
        return self._create("call_function", func, node_args, node_kwargs, self._frames.fact(label, form, reads))

    def add_module(self, module: nn.Module, path: str, args: Any, kwargs: Any) -> Node:
        """Add a node for a call of a leaf module."""
        reads: list[Read] = []
        (node_args, node_kwargs), form = self._encode((tuple(args), kwargs), reads)
        tensors = leaf_tensors(module)
        computed = [value for value in tensors if id(value) not in self._names]  # such as a weight that a hook makes
        written = [value for value in tensors if memory_of(value) in self._writers] if self._writers else []
        extra: Any = ()
        if computed or written:
            _, extra = self._encode((computed, written), reads)
        fact = self._frames.fact(path, (form, extra), reads, is_module=True)
        if path not in self._settings:
            cls, shown = type(module), repr(module) if module._modules else module.extra_repr()
            self._settings[path] = (cls.__module__, cls.__qualname__, shown)
        fact.settings = self._settings[path]
        return self._create("call_module", path, node_args, node_kwargs, fact)

    def set_result(self, node: Node, returned: Any, written: list[Tensor]) -> None:
        """Note what a call has returned, and the tensors it has written to."""
        fact = self._facts[node]
        if written:
            memories = dict.fromkeys(map(memory_of, written))
            fact.previous_writers = tuple(map(self._writers.get, memories))
            self._writers.update(dict.fromkeys(memories, node))
        shapes: list[tuple[int, ...]] = []
        for value, path in tensor_paths(returned):
            shapes.append(tuple(value.shape))
            if not written and not path:
                earlier = self._results.get(id(value))
                fact.passes = earlier is not None and earlier[0] is value
            self._results[id(value)] = (value, node, path)
        fact.shapes = tuple(shapes)

    def finish(self, returned: Any) -> None:
        """Note what the model has returned, written to and stored."""
        recording = self._recording
        reads: list[Read] = []
        _, form = self._encode(returned, reads, into_objects=True)
        recording.output = (form, tuple(reads))
        if reads:
            self._graph.output(tuple(node for node, _ in reads))
        for name, value in (*self._inputs.items(), *self._held.items()):
            if memory_of(value) in self._writers:
                recording.written[name] = self._read(value)
        for name, value in held_tensors(self._copy.model):
            if self._held.get(name) is not value and id(value) in self._results:
                recording.stored[name] = self._read(value)

    def _create(self, op: str, target: Any, args: Any, kwargs: Any, fact: Fact) -> Node:
        node = self._graph.create_node(op, target, args, kwargs, name=f"v{len(self._facts)}")
        self._facts[node] = fact
        return node

    def _encode(self, value: Any, reads: list[Read], into_objects: bool = False) -> tuple[Any, Any]:
        """Return a value as an argument of a node, with nodes in the place of tensors, and its form.

        Args:
            value: The value.
            reads: The tensors in it are appended here.
            into_objects: Whether the form includes the attributes of plain objects.
        """
        if isinstance(value, Tensor):
            read = self._read(value)
            reads.append(read)
            return read[0], TENSOR
        kind = type(value)
        if isinstance(value, float):  # numpy's are subclasses
            kind, value = float, float(value)
        if self._recording.call.track_sizes and isinstance(value, int) and kind is not bool:
            kind, value = int, int(value)
        if kind in PLAIN_TYPES:
            return value, (kind.__name__, repr(value)) if kind is float else value if kind is not bool else (value,)
        if isinstance(value, (list, tuple)):
            encoded = [self._encode(part, reads, into_objects) for part in value]
            parts = [part for part, _ in encoded]
            return (parts if kind is list else tuple(parts)), (kind.__name__, *(form for _, form in encoded))
        if isinstance(value, dict):
            items = {key: self._encode(part, reads, into_objects) for key, part in value.items()}
            arguments = {str(key): part for key, (part, _) in items.items()}
            return arguments, (kind.__name__, *((repr(key), form) for key, (_, form) in items.items()))
        if kind is slice:
            ends = [self._encode(part, reads) for part in (value.start, value.stop, value.step)]
            return slice(*(part for part, _ in ends)), ("slice", *(form for _, form in ends))
        if isinstance(value, nn.Module):
            return None, ("module", type(value).__qualname__)
        if into_objects and isinstance(getattr(value, "__dict__", None), dict) and not callable(value):
            return None, (kind.__name__, self._encode(dict(vars(value)), reads, into_objects)[1])
        if isinstance(value, _REPR_TYPES):
            return None, (kind.__name__, repr(value))
        return None, kind.__name__

    # -- tensors ------------------------------------------------------------------------------------------------------

    def set_node(self, value: Tensor, node: Node) -> None:
        """Note that a tensor is the result of a node."""
        self._results[id(value)] = (value, node, ())

    def is_written(self, value: Tensor) -> bool:
        """Return whether anything has written to a tensor's memory."""
        return memory_of(value) in self._writers

    def node_of(self, value: Tensor) -> Node:
        """Return the node that made a tensor; add one for an attribute, a constant or a tensor of unknown origin.

        Raises:
            ReachesModel: If the tensor belongs to the model itself.
        """
        result = self._results.get(id(value))
        if result is not None and result[0] is value:
            return self._item(result[1], result[2], value)
        name = self._names.get(id(value))
        if name is not None:
            return self._attribute(name, value)
        name = self._copy.names.get(id(value))
        if name is not None:
            raise ReachesModel(name, self._frames.current.path)
        node = self._constant(value) if not value.is_meta else self._unknown(value)
        self.set_node(value, node)
        return node

    def _read(self, value: Tensor) -> Read:
        node = self.node_of(value)
        writer = self._writers.get(memory_of(value))
        return node, None if writer is node else writer

    def _attribute(self, name: str, value: Tensor) -> Node:
        if name not in self._attribute_nodes:
            form = ("attribute", name, _kind(value))
            fact = Fact(self._frames.root, label=name, form=form, shapes=(tuple(value.shape),))
            self._attribute_nodes[name] = self._create("get_attr", name, (), {}, fact)
        return self._attribute_nodes[name]

    def _constant(self, value: Tensor) -> Node:
        with torch._C.DisableTorchFunction():
            flat = value.detach().cpu().resolve_conj().contiguous().reshape(-1)
            digest = hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()
        form = ("constant", _kind(value), digest)
        fact = Fact(self._frames.current, form=form, shapes=(tuple(value.shape),))
        return self._create("get_attr", f"_constant_{len(self._facts)}", (), {}, fact)

    def _unknown(self, value: Tensor) -> Node:
        """Add a node for a tensor made by unrecorded code, which may have read every tensor that is still alive."""
        results = list(self._results.values())
        reads = [self._read(held) for held, _, _ in results if sys.getrefcount(held) > _OWN_REFERENCES]
        fact = self._frames.fact("unknown", ("unknown", _kind(value)), reads)
        return self._create("call_function", unknown, tuple(node for node, _ in reads), {}, fact)

    def _item(self, node: Node, path: tuple[Any, ...], value: Tensor) -> Node:
        """Return the node for the part of a node's result at this path."""
        for length, key in enumerate(path, 1):
            if (node, key) not in self._item_nodes:
                parent = self._facts[node]
                fact = Fact(
                    parent.frame,
                    parent.method,
                    label="item",
                    form=("item", repr(key)),
                    reads=((node, None),),
                    context=parent.context,
                    shapes=(tuple(value.shape),) if length == len(path) else (),
                )
                self._item_nodes[node, key] = self._create("call_function", _get_item, (node, key), {}, fact)
            node = self._item_nodes[node, key]
        return node


class ReachesModel(Exception):
    """The copy uses a tensor of the model from which it was made."""

    def __init__(self, name: str, path: str) -> None:
        super().__init__(
            f"a copy of the model reaches {name!r} of the model itself, in the forward of {path or 'the model'} (a "
            "global, or something that copying shares): register it as a submodule or parameter, or pass witness=False"
        )


def _get_item(value: Any, key: Any) -> Any:
    return value[key]


def _kind(value: Tensor) -> tuple[Any, ...]:
    return tuple(value.shape), str(value.dtype)
