"""From a recording to a flow graph: every call classified, every read resolved to what is in memory at that time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.fx import Node

from nmconv.flow import zoo
from nmconv.flow.cropping import crop_of_call, is_crop
from nmconv.flow.expressions import EXPRESSION, Expression, expressions_of
from nmconv.flow.flow_graph import ActCall, Flow, FlowNode, ModuleCall
from nmconv.flow.leaves import act_kind, is_conv, leaf_op, slot_of
from nmconv.flow.ops import ACT_KINDS, CALLS, MAKES_NEW, READS_SHAPE, Op, is_inplace
from nmconv.recording import Fact, Read, Recording, hook_sees, unknown
from nmconv.recording import Frame as Ran

__all__ = ["lower"]

_ALIASING = {Op.LAYOUT, Op.PASS, Op.DROP}
# What else these are given is read for its shape, dtype or statistics: expand_as, view_as, type_as, ...
_ONE_INPUT = {Op.NORM, Op.LAYOUT, Op.PASS, Op.DROP, Op.PAD, Op.BOUNDED}
# Between a tensor and numbers these still make the tensor's main path.
_ARITHMETIC = {Op.ADD, Op.MUL}
# The number over the tensor, not the other way round.
_OVER = "rdiv"


def lower(model: nn.Module, recording: Recording, *, linear: bool = False) -> Flow:
    """The flow graph of a recording.

    Args:
        model: What was recorded.
        recording: Of its forward, or of a part's.
        linear: Whether ``nn.Linear`` counts as a convolution.
    """
    return _Lowering(model, recording, linear).run()


class _Lowering:
    """State of one pass over a recording."""

    def __init__(self, model: nn.Module, recording: Recording, linear: bool) -> None:
        self.recording = recording
        self.linear = linear
        self.modules = dict(model.named_modules())
        self.parameters = {name for name, _ in model.named_parameters()}
        self.expressions = expressions_of(recording)
        self.nodes: list[FlowNode] = []
        self.frames: dict[Ran, ModuleCall] = {}
        self.calls: Counter[tuple[ModuleCall | None, str]] = Counter()
        self.acts: Counter[Any] = Counter()
        self.norms: dict[ModuleCall, int] = {}  # of timm's norm + act: what the norm gives
        self.made: dict[Node, int] = {}  # what a node gives
        self.now: dict[Node, int] = {}  # what is in its memory at this time; absent: no tensor data
        self.family: dict[Node, list[Node]] = {}  # nodes that are the same memory, in full
        self.filled: dict[Read, int] = {}  # what was made of numbers alone, once something has written to it
        self.parts: dict[Node, list[Node]] = {}  # slices of a node's memory
        self.base: dict[Node, Node] = {}
        self.reachable = 0  # how many values something out of sight may have read

    def run(self) -> Flow:
        recording = self.recording
        waiting = list(recording.frames)
        for at, (node, fact) in enumerate(recording.facts.items()):
            while waiting and waiting[0].start <= at:
                self._begin(waiting.pop(0))
            if node.target is unknown:
                self.reachable = len(self.nodes)
            self._step(node, fact)
        for ran in waiting:
            self._begin(ran)
        self._resolve(recording.output[1])
        returned = dict.fromkeys(self.now[node] for node, _ in recording.output[1] if node in self.now)
        # where data decided, it may have been against what would have got to an output
        end = len(self.nodes) if recording.asked else self.reachable
        read = {source for node in self.nodes for source in node.inputs}
        returned |= dict.fromkeys(node.index for node in self.nodes[:end] if node.index not in read and node.inputs)
        output = next(iter(reversed(recording.graph.nodes)), None)
        if returned and output is not None:
            self._add(FlowNode(0, Op.OUTPUT, list(returned), output))
        for node in (*recording.sized, *(node for node, _ in recording.stored.values())):
            self._expose(node)
        for made in self.nodes[: self.reachable]:
            made.exposed = True
        odd: set[str] = set()
        for ran, frame in self.frames.items():
            if ran.result is not None:
                frame.result = self.made.get(ran.result)
            elif frame.parent is not None:
                odd.add(frame.parent.path)
        return Flow(self.nodes, list(self.frames.values()), recording, frozenset(odd))

    def _begin(self, ran: Ran) -> None:
        module, parent = self.modules[ran.path], self.frames.get(ran.parent) if ran.parent else None
        frame = ModuleCall(module, ran.path, parent, lines=ran.lines, args=ran.args, kwargs=ran.kwargs)
        if parent is not None:
            frame.label = slot_of(parent.module, module, ran.path)
            frame.number = self._count(parent, frame.label)
        self.frames[ran] = frame

    def _count(self, frame: ModuleCall | None, label: str) -> int:
        self.calls[frame, label] += 1
        return self.calls[frame, label]

    def _step(self, node: Node, fact: Fact) -> None:
        shape = fact.shapes[0] if len(fact.shapes) == 1 else None
        if node.op == "placeholder":
            self._add(FlowNode(0, Op.INPUT, [], node, name=str(node.target), shape=shape))
            return
        if node.op == "get_attr":
            learned = fact.label in self.parameters
            self._add(FlowNode(0, Op.PARAM, [], node, name=str(node.target), learned=learned, shape=shape))
            return
        self._resolve(fact.reads)
        sources = [source for source in node.all_input_nodes if source in self.now]
        module = self.modules[fact.label] if node.op == "call_module" else None
        by_hand = self.expressions.get(node)
        op = Op.ACT if by_hand is not None else self._op(node, fact, module)
        acts = op is Op.ACT and module is not None  # on whatever: each of its calls counts
        if node.target is hook_sees:
            return
        if fact.label in READS_SHAPE or not (sources or acts):
            for source in sources:
                self._expose(source)
            return  # tensors made of numbers and shapes
        frame = self.frames.get(fact.frame)
        if frame is not None and self._is_part_of_norm(frame, node, sources):
            return
        out = node.kwargs.get("out")
        first = out if out in self.now else node.args[0] if node.args else None
        inplace = out in self.now or (is_inplace(node, module, fact.label) and self._holds(first))
        inputs = [self.now[source] for source in sorted(sources, key=lambda source: source is not first)]
        if by_hand is not None:
            inplace, inputs = by_hand.overwrites, [self.now[by_hand.base[0]]]
        made = FlowNode(
            0, op, inputs, node, frame=frame, module=module, method=fact.method, lines=fact.lines, shape=shape,
            inplace=inplace,
        )  # fmt: skip
        fixed = all(self.nodes[index].op is Op.PARAM for index in inputs)
        self._name(made, fact, counts=not fixed or module is not None)
        if op is Op.ACT:
            self._note_act(made, fact)
        if fixed:
            made.op = Op.PARAM  # whatever is made of parameters alone, by modules too
            made.learned = any(self.nodes[index].learned for index in inputs)
            made.learned |= module is not None and next(module.parameters(), None) is not None
        else:
            self._refine(made, node, fact)
        made.view = made.op in _ALIASING or made.inplace
        # whatever is not known to make new memory may give a view of a part
        made.partial = made.op is Op.OTHER and not inplace and module is None and fact.label not in MAKES_NEW
        made.partial |= made.op is Op.PAD and self._crops(node, fact, module)
        self._add(made)
        self._remember(node, made)
        if by_hand is not None and not fixed:
            self._fold(by_hand)

    def _resolve(self, reads: Iterable[Read]) -> None:
        """Let what was made of numbers alone, and written to since, hold what was written."""
        for node, writer in reads:
            if node in self.made or writer not in self.made:
                continue
            if (node, writer) not in self.filled:
                shape = self.recording.facts[node].shapes[0]
                filled = FlowNode(len(self.nodes), Op.OTHER, [self.made[writer]], node, name="filled", shape=shape)
                self.filled[node, writer] = filled.index
                self.nodes.append(filled)
            self.now[node] = self.filled[node, writer]

    def _fold(self, by_hand: Expression) -> None:
        """Let the calls inside of an activation be none of the network's own."""
        for node in by_hand.inner:
            inner = self.nodes[self.made[node]]
            inner.op, inner.inputs = Op.DEAD, []
            inner.why = "inside an activation that the forward works out by hand"

    def _holds(self, value: Any) -> bool:
        """Whether it is tensor data, or may be: a call by keywords does not say what comes first."""
        return not isinstance(value, Node) or value in self.now

    def _is_part_of_norm(self, frame: ModuleCall, node: Node, sources: list[Node]) -> bool:
        """Whether the node belongs to timm's norm + act, whose norm is one value whatever it computes."""
        if node.op == "call_module" and frame in self.norms and isinstance(self._called(node), nn.Identity):
            self.made[node] = self.now[node] = self.now[sources[0]]
            return True
        if node.op == "call_module" or not zoo.is_norm_act(frame.module):
            return False
        data = [self.now[source] for source in sources if self.nodes[self.now[source]].op is not Op.PARAM]
        if not data:
            return False
        if frame not in self.norms:
            self.norms[frame] = self._add(
                FlowNode(0, Op.NORM, data[:1], node, name=frame.path, frame=frame, module=frame.module, label="norm",
                         number=self._count(frame, "norm"))
            )  # fmt: skip
        norm = self.norms[frame]
        self.made[node] = self.now[node] = norm
        self.nodes[norm].origin, self.nodes[norm].shape = node, self.recording.facts[node].shapes[0]
        return True

    def _called(self, node: Node) -> nn.Module:
        return self.modules[self.recording.facts[node].label]

    def _name(self, made: FlowNode, fact: Fact, *, counts: bool) -> None:
        frame = made.frame
        if made.module is not None:
            made.name = fact.label
            made.label = slot_of(frame.module, made.module, fact.label) if frame is not None else fact.label
            made.number = self._count(frame, made.label)
            return
        made.label = fact.label
        made.number = self._count(frame, made.label) if counts else 0
        owner = frame.path if frame is not None else ""
        if frame is not None and is_conv(frame.module):  # a convolution whose class has a forward of its own
            made.name = owner
        else:
            made.name = f"{owner}:{made.label}" if made.number == 1 else f"{owner}:{made.label}#{made.number}"

    def _note_act(self, made: FlowNode, fact: Fact) -> None:
        frame, module = made.frame, made.module
        if frame is None:
            return
        by_hand = self.expressions.get(made.origin)
        function = None if module is not None else by_hand.kind if by_hand is not None else fact.label.rstrip("_")
        name = frame.path
        if module is not None:
            name = fact.label if made.label.startswith("/") else _join(frame.path, made.label)
        method = "forward" if zoo.is_norm_act(frame.module) else fact.method
        what = function or id(module)
        self.acts[frame, what] += 1
        self.acts[frame, what, method] += 1
        calls = self.acts[frame, what], self.acts[frame, what, method]
        made.act = ActCall(frame, method, module, name, function, *calls)
        made.kind = act_kind(module) if module is not None else ACT_KINDS.get(function or "", EXPRESSION)

    def _op(self, node: Node, fact: Fact, module: nn.Module | None) -> Op:
        if module is not None:
            return leaf_op(module) or Op.OTHER
        return Op.PAD if self._crops(node, fact, None) else CALLS.get(fact.label, Op.OTHER)

    def _crops(self, node: Node, fact: Fact, module: nn.Module | None) -> bool:
        """Whether a call gives a view of its input without the border."""
        if module is not None:
            return is_crop(module)
        shapes = self.recording.facts[fact.reads[0][0]].shapes if len(fact.reads) == 1 else ()
        return len(shapes) == 1 and crop_of_call(fact.label, node.args, shapes[0]) is not None

    def _refine(self, made: FlowNode, node: Node, fact: Fact) -> None:
        """Turn ambiguous operators into what they are here."""
        params = [index for index in made.inputs if self.nodes[index].op is Op.PARAM]
        data = [index for index in made.inputs if self.nodes[index].op is not Op.PARAM]
        divides = "div" in fact.label
        if made.op is Op.ACT:
            made.inputs = data[:1]
        elif made.op in (Op.CONV, Op.LINEAR):
            if made.module is None:
                self._functional_conv(made, node, data)
            else:
                made.inputs = data
            if made.op is Op.LINEAR:
                made.op = Op.CONV if self.linear else Op.LINEAR
        elif made.op in _ARITHMETIC:
            if len(data) == 1:
                flipped = divides and (fact.label == _OVER or not node.args or self.now.get(node.args[0]) != data[0])  # type: ignore[arg-type]
                same = len(node.args) > 1 and node.args[0] is node.args[1]
                small = all(self._per_channel(index) for index in params)
                made.op = Op.SCALE if small and not flipped and not same else Op.OTHER
                made.inputs = data
            elif made.op is Op.MUL and divides:
                made.op = Op.OTHER
        elif made.op in _ONE_INPUT:
            made.inputs = data[:1]

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

    def _per_channel(self, index: int) -> bool:
        """Whether a parameter has at most one extent that is not 1."""
        shape = self.nodes[index].shape
        return shape is not None and sum(extent != 1 for extent in shape) <= 1

    # -- memory -------------------------------------------------------------------------------------------------------

    def _add(self, made: FlowNode) -> int:
        made.index = len(self.nodes)
        self.nodes.append(made)
        self.made[made.origin] = self.now[made.origin] = made.index
        return made.index

    def _expose(self, node: Node) -> None:
        if node in self.made:
            self.nodes[self.made[node]].exposed = True

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


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
