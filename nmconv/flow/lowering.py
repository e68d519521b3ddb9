"""From a recording to a flow graph: classify every call, and resolve every read to the value in memory at that time."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn
from torch.fx import Node

from nmconv.flow import zoo
from nmconv.flow.cropping import crop_of_call
from nmconv.flow.expressions import EXPRESSION, Expression, expressions_of
from nmconv.flow.flow_graph import ActCall, Flow, FlowNode, ModuleCall
from nmconv.flow.leaves import act_kind, is_conv, leaf_op, slot_of
from nmconv.flow.memory_state import MemoryState
from nmconv.flow.ops import ACT_KINDS, CALLS, MAKES_NEW, READS_SHAPE, Op, is_inplace
from nmconv.flow.probed_modules import is_crop
from nmconv.recording import Fact, Frame, Recording, unknown, user_hook

__all__ = ["lower"]

_ALIASING = {Op.LAYOUT, Op.PASS, Op.DROP}
# Of their further operands, only the shape, dtype or statistics are read: expand_as, view_as, type_as, ...
_ONE_INPUT = {Op.NORM, Op.LAYOUT, Op.PASS, Op.DROP, Op.PAD, Op.BOUNDED}
_REVERSED_DIVISION = "rdiv"  # a number divided by a tensor


def lower(model: nn.Module, recording: Recording, *, linear: bool = False) -> Flow:
    """Return the flow graph of a recording.

    Args:
        model: The recorded model.
        recording: A recording of the model or of a part of it.
        linear: Whether ``nn.Linear`` counts as a convolution.
    """
    return _Lowering(model, recording, linear).run()


class _Lowering:
    """The state of one pass over a recording."""

    def __init__(self, model: nn.Module, recording: Recording, linear: bool) -> None:
        self.recording = recording
        self.linear = linear
        self.modules = dict(model.named_modules())
        self.parameters = {name for name, _ in model.named_parameters()}
        self.expressions = expressions_of(recording)
        self.memory = MemoryState(recording)
        self.values = self.memory.values
        self.frames: dict[Frame, ModuleCall] = {}
        self.calls: Counter[tuple[ModuleCall | None, str]] = Counter()
        self.act_calls: Counter[Any] = Counter()
        self.norms: dict[ModuleCall, int] = {}  # for each call of timm's norm + act, the norm's value
        self.reachable = 0  # the number of values that unrecorded code may have read

    def run(self) -> Flow:
        facts = self.recording.facts
        frames = list(self.recording.frames)
        for position, (node, fact) in enumerate(facts.items()):
            while frames and frames[0].start <= position:
                self._begin(frames.pop(0))
            if node.target is unknown:
                self.reachable = len(self.values)
            self._lower(node, fact)
        for frame in frames:
            self._begin(frame)
        self._add_output()
        self._expose()
        return Flow(self.values, list(self.frames.values()), self.recording, frozenset(self._end_frames()))

    def _begin(self, frame: Frame) -> None:
        module, parent = self.modules[frame.path], self.frames.get(frame.parent) if frame.parent else None
        call = ModuleCall(module, frame.path, parent, lines=frame.lines, args=frame.args, kwargs=frame.kwargs)
        if parent is not None:
            call.label = slot_of(parent.module, module, frame.path)
            call.number = self._count(parent, call.label)
        self.frames[frame] = call

    def _count(self, frame: ModuleCall | None, label: str) -> int:
        self.calls[frame, label] += 1
        return self.calls[frame, label]

    def _add_output(self) -> None:
        reads, current = self.recording.output[1], self.memory.current
        self.memory.resolve(reads)
        returned = dict.fromkeys(current[node] for node, _ in reads if node in current)
        # Where data decides what runs, another branch might have returned any unused value.
        end = len(self.values) if self.recording.data_dependent_calls else self.reachable
        used = {source for value in self.values for source in value.inputs}
        returned |= dict.fromkeys(
            value.index for value in self.values[:end] if value.index not in used and value.inputs
        )
        output = next(iter(reversed(self.recording.graph.nodes)), None)
        if returned and output is not None:
            self.memory.add(FlowNode(0, Op.OUTPUT, list(returned), output))

    def _expose(self) -> None:
        for node in (*self.recording.sizes_read, *(node for node, _ in self.recording.stored.values())):
            self.memory.expose(node)
        for value in self.values[: self.reachable]:
            value.exposed = True

    def _end_frames(self) -> set[str]:
        """Set what each frame returned; return the names of modules with a child that did not return one tensor."""
        non_tensor_parents: set[str] = set()
        for frame, call in self.frames.items():
            if frame.result is not None:
                call.result = self.memory.results.get(frame.result)
            elif call.parent is not None:
                non_tensor_parents.add(call.parent.path)
        return non_tensor_parents

    # -- one call -----------------------------------------------------------------------------------------------------

    def _lower(self, node: Node, fact: Fact) -> None:
        if node.op in ("placeholder", "get_attr"):
            self._lower_input(node, fact)
            return
        memory = self.memory
        memory.resolve(fact.reads)
        sources = [source for source in node.all_input_nodes if source in memory.current]
        module = self.modules[fact.label] if node.op == "call_module" else None
        expression = self.expressions.get(node)
        op = Op.ACT if expression is not None else self._op(node, fact, module)
        if node.target is user_hook:
            for source in sources:
                self.values[memory.current[source]].hooked = True
            return
        # each call of an activation module is counted, even if its input depends on no data
        if fact.label in READS_SHAPE or not (sources or (op is Op.ACT and module is not None)):
            for source in sources:
                memory.expose(source)
            return
        frame = self.frames.get(fact.frame)
        if frame is not None and self._add_to_norm(frame, node, sources):
            return
        value = self._value(node, fact, op, frame, module, sources)
        constant = all(self.values[index].op is Op.PARAM for index in value.inputs)
        self._name(value, fact, counted=not constant or module is not None)
        if op is Op.ACT:
            self._identify_act(value, fact)
        if constant:
            value.op = Op.PARAM
            value.learned = any(self.values[index].learned for index in value.inputs)
            value.learned |= module is not None and next(module.parameters(), None) is not None
        else:
            self._refine(value, node, fact)
        value.view = value.op in _ALIASING or value.inplace
        # a call that is not known to allocate its result may return a view of a part
        value.partial = value.op is Op.OTHER and not value.inplace and module is None and fact.label not in MAKES_NEW
        value.partial |= value.op is Op.PAD and self._crops(node, fact, module)
        memory.add(value)
        memory.note_aliasing(node, value)
        if expression is not None and not constant:
            self._absorb(expression)

    def _lower_input(self, node: Node, fact: Fact) -> None:
        shape = fact.shapes[0] if len(fact.shapes) == 1 else None
        value = FlowNode(0, Op.INPUT, [], node, name=str(node.target), shape=shape)
        if node.op == "get_attr":
            value.op, value.learned = Op.PARAM, fact.label in self.parameters
        self.memory.add(value)

    def _value(
        self, node: Node, fact: Fact, op: Op, frame: ModuleCall | None, module: nn.Module | None, sources: list[Node]
    ) -> FlowNode:
        """Return a call's value, with the operand that it overwrites, or else its first operand, as the first input."""
        current, expression = self.memory.current, self.expressions.get(node)
        if expression is not None:
            inputs, inplace = [current[expression.base[0]]], expression.overwrites
        else:
            out = node.kwargs.get("out")
            first = out if out in current else node.args[0] if node.args else None
            # a call with keyword arguments only does not show which operand is the first
            overwrites_data = not isinstance(first, Node) or first in current
            inplace = out in current or (is_inplace(node, module, fact.label) and overwrites_data)
            inputs = [current[source] for source in sorted(sources, key=lambda source: source is not first)]
        shape = fact.shapes[0] if len(fact.shapes) == 1 else None
        return FlowNode(
            0, op, inputs, node, frame=frame, module=module, method=fact.method, lines=fact.lines, shape=shape,
            inplace=inplace,
        )  # fmt: skip

    def _absorb(self, expression: Expression) -> None:
        """Mark the calls inside an activation's expression as DEAD."""
        for node in expression.inner:
            inner = self.values[self.memory.results[node]]
            inner.op, inner.inputs = Op.DEAD, []
            inner.why = "inside a handwritten activation"

    def _add_to_norm(self, frame: ModuleCall, node: Node, sources: list[Node]) -> bool:
        """Add a call to the norm's value if it is part of the norm in timm's norm + act; return whether it is."""
        current = self.memory.current
        if node.op == "call_module":
            module = self.modules[self.recording.facts[node].label]
            if frame in self.norms and isinstance(module, nn.Identity):
                self.memory.alias(node, current[sources[0]])
                return True
            return False
        if not zoo.is_norm_act(frame.module):
            return False
        data = [current[source] for source in sources if self.values[current[source]].op is not Op.PARAM]
        if not data:
            return False
        if frame not in self.norms:
            norm = FlowNode(0, Op.NORM, data[:1], node, name=frame.path, frame=frame, module=frame.module, label="norm")
            norm.number = self._count(frame, "norm")
            self.norms[frame] = self.memory.add(norm)
        index = self.norms[frame]
        self.memory.alias(node, index)
        self.values[index].origin, self.values[index].shape = node, self.recording.facts[node].shapes[0]
        return True

    # -- names --------------------------------------------------------------------------------------------------------

    def _name(self, value: FlowNode, fact: Fact, *, counted: bool) -> None:
        frame = value.frame
        if value.module is not None:
            value.name = fact.label
            value.label = slot_of(frame.module, value.module, fact.label) if frame is not None else fact.label
            value.number = self._count(frame, value.label)
            return
        value.label = fact.label
        value.number = self._count(frame, value.label) if counted else 0
        owner = frame.path if frame is not None else ""
        if frame is not None and is_conv(frame.module):  # a convolution whose class has its own forward
            value.name = owner
        else:
            value.name = f"{owner}:{value.label}" if value.number == 1 else f"{owner}:{value.label}#{value.number}"

    def _identify_act(self, value: FlowNode, fact: Fact) -> None:
        frame, module = value.frame, value.module
        if frame is None:
            return
        expression = self.expressions.get(value.origin)
        if module is not None:
            function, name = None, fact.label if value.label.startswith("/") else _join(frame.path, value.label)
        else:
            function, name = expression.kind if expression is not None else fact.label.rstrip("_"), frame.path
        method = "forward" if zoo.is_norm_act(frame.module) else fact.method
        key = function or id(module)
        self.act_calls[frame, key] += 1
        self.act_calls[frame, key, method] += 1
        counts = self.act_calls[frame, key], self.act_calls[frame, key, method]
        value.act = ActCall(frame, method, module, name, function, *counts)
        value.kind = act_kind(module) if module is not None else ACT_KINDS.get(function or "", EXPRESSION)

    # -- kinds of operation -------------------------------------------------------------------------------------------

    def _op(self, node: Node, fact: Fact, module: nn.Module | None) -> Op:
        if module is not None:
            return leaf_op(module) or Op.OTHER
        return Op.PAD if self._crops(node, fact, None) else CALLS.get(fact.label, Op.OTHER)

    def _crops(self, node: Node, fact: Fact, module: nn.Module | None) -> bool:
        """Return whether a call returns a view of its input without the border."""
        if module is not None:
            return is_crop(module)
        shapes = self.recording.facts[fact.reads[0][0]].shapes if len(fact.reads) == 1 else ()
        return len(shapes) == 1 and crop_of_call(fact.label, node.args, shapes[0]) is not None

    def _refine(self, value: FlowNode, node: Node, fact: Fact) -> None:
        """Decide what ambiguous operations are, by their operands, and select the inputs that carry data."""
        params = [index for index in value.inputs if self.values[index].op is Op.PARAM]
        data = [index for index in value.inputs if self.values[index].op is not Op.PARAM]
        if value.op in (Op.CONV, Op.LINEAR):
            value.inputs = data
            if value.module is None:
                self._refine_functional_conv(value, node)
            if value.op is Op.LINEAR:
                value.op = Op.CONV if self.linear else Op.LINEAR
        elif value.op in (Op.ADD, Op.MUL):
            divides = "div" in fact.label
            if len(data) == 1:
                dividend = node.args[0] if node.args else None
                flipped = divides and (
                    fact.label == _REVERSED_DIVISION
                    or not isinstance(dividend, Node)
                    or self.memory.current.get(dividend) != data[0]
                )
                squared = len(node.args) > 1 and node.args[0] is node.args[1]
                per_channel = all(self._is_per_channel(index) for index in params)
                value.op = Op.SCALE if per_channel and not flipped and not squared else Op.OTHER
                value.inputs = data
            elif value.op is Op.MUL and divides:
                value.op = Op.OTHER
        elif value.op is Op.ACT or value.op in _ONE_INPUT:
            value.inputs = data[:1]

    def _refine_functional_conv(self, value: FlowNode, node: Node) -> None:
        weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
        index = self.memory.current.get(weight) if isinstance(weight, Node) else None
        if index is None or not self._depends_on_parameter(index):
            value.op = Op.OTHER if value.op is Op.LINEAR else Op.POOL  # a fixed filter: blur
            return
        value.inputs, value.side_inputs = value.inputs[:1], value.inputs[1:]

    def _depends_on_parameter(self, index: int) -> bool:
        """Return whether a parameter is among what a value is computed from."""
        todo, seen = [index], set()
        while todo:
            source = todo.pop()
            if source in seen:
                continue
            seen.add(source)
            value = self.values[source]
            if value.learned:
                return True
            if value.op not in (Op.CONV, Op.INPUT):
                todo += value.inputs
        return False

    def _is_per_channel(self, index: int) -> bool:
        """Return whether a parameter has at most one extent that is not 1."""
        shape = self.values[index].shape
        return shape is not None and sum(extent != 1 for extent in shape) <= 1


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
