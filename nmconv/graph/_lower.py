"""From an fx graph to a flow graph: every call classified, every read resolved to what is in memory at that time."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import Node

from nmconv.graph import _zoo
from nmconv.graph._flow import Flow, FlowNode
from nmconv.graph._modules import act_kind, is_conv, leaf_op
from nmconv.graph._ops import (
    ACT_KINDS,
    FUNCTIONS,
    METHODS,
    NEW_MEMORY,
    SHAPE_ATTRIBUTES,
    SHAPE_FUNCTIONS,
    SHAPE_METHODS,
    Op,
    is_inplace,
)
from nmconv.graph._tracer import FlowTracer
from nmconv.graph._values import Unknown

__all__ = ["lower"]

_ATTRIBUTES = {"T": Op.LAYOUT, "mT": Op.LAYOUT, "H": Op.LAYOUT, "mH": Op.LAYOUT, "data": Op.PASS}
_ALIASING = {Op.LAYOUT, Op.PASS, Op.DROP}
# What else these are given is read for its shape, dtype or statistics: expand_as, view_as, type_as, ...
_ONE_INPUT = {Op.NORM, Op.LAYOUT, Op.PASS, Op.DROP, Op.PAD, Op.BOUNDED}
# Between a tensor and numbers these still make the tensor's main path.
_ARITHMETIC = {Op.ADD, Op.MUL}


class _Lowering:
    """State of one pass over an fx graph."""

    def __init__(self, tracer: FlowTracer, linear: bool) -> None:
        self.tracer = tracer
        self.linear = linear
        self.nodes: list[FlowNode] = []
        self.now: dict[Node, int] = {}  # what is in a node's memory at this time; absent: no tensor data
        self.family: dict[Node, list[Node]] = {}  # nodes that are the same memory, in full
        self.parts: dict[Node, list[Node]] = {}  # slices of a node's memory
        self.base: dict[Node, Node] = {}

    def run(self) -> Flow:
        for node in self.tracer.graph.nodes:
            if node not in self.tracer.dead:
                self._step(node)
        return Flow(self.nodes)

    def _step(self, node: Node) -> None:
        sources = list(dict.fromkeys(other for other in node.all_input_nodes if other in self.now))
        if node.op == "output":
            self._add(FlowNode(0, Op.OUTPUT, [self.now[source] for source in sources], node))
            return
        if node.op == "placeholder":
            self._add(FlowNode(0, Op.INPUT, [], node, name=str(node.target)))
            return
        if node.op == "get_attr":
            self._add(FlowNode(0, Op.PARAM, [], node, name=str(node.target), learned=self._is_parameter(node)))
            return
        if (not sources and node not in self.tracer.acts) or self._reads_shape(node):
            return  # numbers, shapes, tensors made from them
        module = self.tracer.module(str(node.target)) if node.op == "call_module" else None
        op = self._op(node, module)
        out = node.kwargs.get("out")
        inplace = is_inplace(node, module) or out in self.now
        first = out if inplace and out in self.now else node.args[0] if node.args else None
        ordered = sorted(sources, key=lambda source: source is not first)
        frame, label, number = self.tracer.where.get(node, (None, "", 0))
        made = FlowNode(
            0, op, [self.now[source] for source in ordered], node, frame=frame, label=label, number=number,
            act=self.tracer.acts.get(node), inplace=inplace, name=self._name(node), opaque=node in self.tracer.opaque,
        )  # fmt: skip
        if all(self.nodes[index].op is Op.PARAM for index in made.inputs) and not made.opaque:
            made.op = Op.PARAM  # whatever is made of parameters alone, by modules too
            made.learned = any(self.nodes[index].learned for index in made.inputs)
            made.learned |= module is not None and next(module.parameters(), None) is not None
            made.kind = self._kind(made, module)
        else:
            self._refine(made, node, module)
        made.view = made.op in _ALIASING or made.inplace
        made.partial = self._may_be_part(made, node)
        self._add(made)
        self._remember(node, made)

    @staticmethod
    def _may_be_part(made: FlowNode, node: Node) -> bool:
        """Whether the result may be a view of a part of the input: whatever is not known to make new memory."""
        if made.op is not Op.OTHER or made.inplace or node.target in NEW_MEMORY:
            return False
        return made.opaque or node.op != "call_module"

    def _refine(self, made: FlowNode, node: Node, module: nn.Module | None) -> None:
        """Turn ambiguous operators into what they are here."""
        params = [index for index in made.inputs if self.nodes[index].op is Op.PARAM]
        data = [index for index in made.inputs if self.nodes[index].op is not Op.PARAM]
        if made.op is Op.ACT:
            made.kind = self._kind(made, module)
            made.inputs = data[:1]
        elif made.op in (Op.CONV, Op.LINEAR):
            if module is None:
                self._functional_conv(made, node, data)
            else:
                made.inputs = data
            if made.op is Op.LINEAR:
                made.op = Op.CONV if self.linear else Op.LINEAR
        elif made.op in _ARITHMETIC:
            if len(data) == 1:
                divided = getattr(node.target, "__name__", str(node.target)) in ("truediv", "itruediv", "div", "div_")
                flipped = divided and (not node.args or self.now.get(node.args[0]) != data[0])  # type: ignore[arg-type]
                same = len(node.args) > 1 and node.args[0] is node.args[1]
                small = all(self._per_channel(self.nodes[index].origin) for index in params)
                made.op = Op.SCALE if small and not flipped and not same else Op.OTHER
                made.inputs = data
            elif made.op is Op.MUL and "div" in getattr(node.target, "__name__", str(node.target)):
                made.op = Op.OTHER
        elif made.op in _ONE_INPUT:
            made.inputs = data[:1]

    @staticmethod
    def _kind(made: FlowNode, module: nn.Module | None) -> str:
        """The name of an activation's kind."""
        if made.act is None:
            return ""
        return act_kind(module) if module is not None else ACT_KINDS[made.act.function or ""]

    def _functional_conv(self, made: FlowNode, node: Node, data: list[int]) -> None:
        weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
        at = self.now.get(weight) if isinstance(weight, Node) else None
        if at is None or not self._learned(at):
            made.op = Op.OTHER if made.op is Op.LINEAR else Op.POOL  # a fixed filter: blur
            made.inputs = data
            return
        made.inputs = data[:1]
        made.sides = data[1:]

    def _learned(self, index: int) -> bool:
        """Whether a parameter is anywhere in what makes the value."""
        todo, seen = [index], set()
        while todo:
            at = todo.pop()
            if at in seen:
                continue
            seen.add(at)
            node = self.nodes[at]
            if node.learned:
                return True
            if node.op not in (Op.CONV, Op.INPUT):
                todo += node.inputs
        return False

    def _op(self, node: Node, module: nn.Module | None) -> Op:
        if module is not None:
            if node in self.tracer.opaque:
                return Op.OTHER
            if _zoo.is_norm_act(module):
                return Op.NORM
            return leaf_op(module) or Op.OTHER
        if node.op == "call_method":
            return METHODS.get(str(node.target), Op.OTHER)
        if node.target is getattr:
            return _ATTRIBUTES.get(str(node.args[1]), Op.OTHER)
        return FUNCTIONS.get(node.target, Op.OTHER)  # type: ignore[arg-type]

    def _reads_shape(self, node: Node) -> bool:
        if node.op == "call_method":
            return str(node.target) in SHAPE_METHODS
        if node.target is getattr:
            return node.args[1] in SHAPE_ATTRIBUTES
        return node.target in SHAPE_FUNCTIONS if node.op == "call_function" else False

    def _name(self, node: Node) -> str:
        if node.op == "call_module":
            return self.tracer.prefix + str(node.target)
        frame, label, number = self.tracer.where.get(node, (None, "", 0))
        owner = frame.path if frame is not None else ""
        if frame is not None and is_conv(frame.module):  # a convolution whose class has a forward of its own
            return owner
        return f"{owner}:{label}" if number == 1 else f"{owner}:{label}#{number}"

    def _is_parameter(self, node: Node) -> bool:
        value: Any = self.tracer.root
        for part in str(node.target).split("."):
            value = getattr(value, part, None)
        return isinstance(value, nn.Parameter)

    def _per_channel(self, origin: Node) -> bool:
        """Whether a parameter has at most one extent that is not 1."""
        try:
            value = self.tracer.values.get(origin)
        except Unknown:
            return False
        return not isinstance(value, torch.Tensor) or sum(extent != 1 for extent in value.shape) <= 1

    # -- memory -------------------------------------------------------------------------------------------------------

    def _add(self, made: FlowNode) -> None:
        made.index = len(self.nodes)
        self.nodes.append(made)
        self.now[made.origin] = made.index

    def _remember(self, node: Node, made: FlowNode) -> None:
        """Who shares memory with whom; after an in-place call every name of that memory means the new value."""
        out = node.kwargs.get("out")
        target = next((other for other in node.all_input_nodes if other in self.now), None)
        if isinstance(out, Node) and out in self.now:
            target = out
        if target is None or not (made.view or made.partial):
            return
        if made.partial:
            self.parts.setdefault(target, []).append(node)
            self.base[node] = target
            return
        family = self.family.setdefault(target, [target])
        family.append(node)
        self.family[node] = family
        if made.inplace:
            self._overwrite(family, made.index)

    def _overwrite(self, family: list[Node], index: int) -> None:
        for member in family:
            self.now[member] = index
            for part in self.parts.get(member, ()):  # a slice of it now shows the new content
                if part in self.now:
                    self._replace(part, [index])
        self._overwrite_wholes(family, index)

    def _overwrite_wholes(self, family: list[Node], index: int) -> None:
        """A slice was written: what it is a slice of has changed in part."""
        for base in dict.fromkeys(self.base[member] for member in family if member in self.base):
            changed = self._replace(base, [self.now[base], index])
            above = self.family.get(base, [base])
            self.now.update(dict.fromkeys(above, changed))
            self._overwrite_wholes(above, changed)

    def _replace(self, node: Node, inputs: list[int]) -> int:
        changed = FlowNode(len(self.nodes), Op.OTHER, inputs, node, name="partly overwritten")
        self.nodes.append(changed)
        self.now[node] = changed.index
        return changed.index


def lower(tracer: FlowTracer, *, linear: bool) -> Flow:
    """The flow graph of what ``tracer`` has traced.

    Args:
        tracer: After :meth:`FlowTracer.run`.
        linear: Whether ``nn.Linear`` counts as a convolution.
    """
    return _Lowering(tracer, linear).run()
