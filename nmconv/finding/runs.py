"""Linear runs: what lies between activations, forks and everything else that is not linear, module by module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from nmconv.algebra import averages
from nmconv.finding.analysis import flows_of
from nmconv.finding.control_flow import flags_between, turns_between
from nmconv.finding.def_use import is_plain_sum
from nmconv.finding.introspection import looked_at
from nmconv.finding.module_users import Callers, CallsSeen
from nmconv.finding.run_elements import Element, Join, LinearRun, Step, steps_of
from nmconv.finding.sites import alike
from nmconv.flow import SUMS, Flow, FlowNode, ModuleCall, Op, ancestors, leaf_op, recordings_of, takes_of
from nmconv.recording import Recordings

__all__ = ["linear_runs"]


def linear_runs(
    model: nn.Module,
    *,
    example_inputs: Any = None,
    recordings: Recordings | None = None,
    sizes: bool = True,
    pools: bool = False,
) -> tuple[LinearRun, ...]:
    """The maximal linear runs of a model in eval mode that hold a convolution, in order of execution.

    Where train mode runs otherwise, only what both have in common.

    Args:
        model: Any module; nothing of it changes.
        example_inputs: What the model is called with; only structure and shapes are used.
        recordings: Of the model, if it was recorded already.
        sizes: Whether to find out the shapes of the runs' inputs.
        pools: Whether an average pool behind a run is its last element.
    """
    recordings = recordings or recordings_of(model, example_inputs, both_sizes=False)
    flows = [flows_of(model, recordings, training=training) for training in (False, True)]
    lost = (recordings.lost, recordings.lost[:1])  # train mode's nodes are others
    finders = [[_Finder(flow, pools, at) for flow in found] for found, at in zip(flows, lost, strict=True)]
    seen = [finder.seen for found in finders for finder in found]
    main = [run for training in (False, True) for run in recordings.of_mode(training=training)]
    leaves = [name for name, module in model.named_modules() if leaf_op(module) in _REPLACED]
    calls = Callers(model, seen, looked_at(model, main, leaves), (failure.path for failure in recordings.failures))
    links = None
    if not alike(*flows):
        links = {link for finder in finders[1] for link in finder.links(calls)}
    return tuple(run for finder in finders[0] for run in finder.runs(calls, links, sizes))


@dataclass(eq=False)
class _Value:
    """A value as elements applied to a source."""

    source: int
    elements: list[Element]
    nodes: list[int]
    flags: set[tuple[str, str]] = field(default_factory=set)  # by which another way may be taken inside

    @property
    def ended(self) -> bool:
        """Whether nothing continues it: what a pool gives is the start of something new."""
        return bool(self.elements) and self.elements[-1].pools


class _Finder:
    """Runs of one flow."""

    def __init__(self, flow: Flow, pools: bool, lost: Sequence[int]) -> None:
        self.pools = pools
        self.lost = lost
        self.order = {node: at for at, node in enumerate(flow.recording.facts)}
        self.flow = flow
        self.seen = CallsSeen.of(flow)
        self.forwards = Counter(id(frame.module) for frame in flow.frames)
        self.flow.link()
        self.readers = flow.all_readers()

    # -- values -------------------------------------------------------------------------------------------------------

    def _kind(self, node: FlowNode) -> str | None:
        if _adds_nothing(node):
            return "pass"
        if self.pools and node.op is Op.POOL and node.module is not None:
            return "pool" if averages(node.module) else None
        return _KINDS.get(node.op)

    def _single(self, index: int) -> bool:
        """Whether one node reads the value, and nothing its shape, and no attribute keeps it."""
        return len(self.readers[index]) == 1 and not self.flow.nodes[index].exposed

    def _turns(self, index: int, reader: int) -> bool:
        """Whether a forward may do something else between a value and who reads it."""
        value, node = self.flow.nodes[index], self.flow.nodes[reader]
        first, last = self.order[value.origin], self.order[node.origin]
        if any(first < position <= last for position in self.lost):
            return True
        return turns_between(value, node, sized=bool(self.lost))

    def _flags(self, index: int, reader: int) -> set[tuple[str, str]]:
        return set(flags_between(self.flow.nodes[index], self.flow.nodes[reader]))

    def _values(self, calls: Callers) -> dict[int, _Value]:
        values: dict[int, _Value] = {}
        for node in self.flow.nodes:
            if node.op is Op.ADD:
                made = self._sum(node, values)
            else:
                made = self._step(node, values, calls)
            if made is not None:
                values[node.index] = made
        return values

    def _step(self, node: FlowNode, values: dict[int, _Value], calls: Callers) -> _Value | None:
        kind = self._kind(node)
        if kind is None or len(node.inputs) != 1 or node.sides:
            return None
        if node.module is not None:
            why = "" if kind == "pass" else calls.why_not(node.name)
            if kind == "drop" and why:  # in eval mode it hands on what it gets: it stays for its other callers
                kind, why = "pass", ""
            elements: list[Element] = [Step(kind, node.name, why)]
        elif kind == "conv":
            elements = [Step(kind, node.name, "it is a call of a function, not of a module")]
        elif kind == "pass" and (node.op is Op.SCALE or node.label in _KEEP):
            elements = []
        else:
            return None
        before = node.inputs[0]
        value = _going(values, before)
        if value is not None and self._single(before) and not self._turns(before, node.index):
            flags = value.flags | self._flags(before, node.index)
            return _Value(value.source, [*value.elements, *elements], [*value.nodes, node.index], flags)
        return _Value(before, elements, [node.index])

    def _sum(self, node: FlowNode, values: dict[int, _Value]) -> _Value | None:
        frame = node.frame
        if len(node.inputs) != 2 or not is_plain_sum(node) or frame is None or self._first_overwritten(node):
            return None
        if not (self.flow.main[node.index] or self.flow.gating[node.index]):  # rewriting drops what nobody uses
            return None
        if any(index in values and self._turns(index, node.index) for index in node.inputs):
            return None
        parts = [_going(values, index) if self._single(index) else None for index in node.inputs]
        sources = {part.source for part in parts if part is not None}
        sources |= {index for index, part in zip(node.inputs, parts, strict=True) if part is None}
        if len(sources) != 1:
            return None
        source = sources.pop()
        one, two = (tuple(part.elements) if part is not None else () for part in parts)
        if not any(step.kind == "conv" for step in steps_of((*one, *two))):
            return None
        join = Join((one, two), frame.path, node.label, node.number, self._takes(frame), self._why(node))
        nodes = [index for part in parts if part is not None for index in part.nodes] + [node.index]
        inside = set(nodes)
        value = _going(values, source)
        readers = self.readers[source]
        flags = set[tuple[str, str]]().union(*(part.flags for part in parts if part is not None))
        flags = flags.union(*(self._flags(index, node.index) for index in node.inputs))
        flags = flags.union(*(self._flags(source, reader) for reader in readers))
        if (
            value
            and inside.issuperset(readers)
            and not self.flow.nodes[source].exposed
            and not any(self._turns(source, reader) for reader in readers)
        ):
            return _Value(value.source, [*value.elements, join], [*value.nodes, *nodes], value.flags | flags)
        return _Value(source, [join], nodes, flags)

    def _first_overwritten(self, node: FlowNode) -> bool:
        """Whether the sum overwrites memory that others have a name for: it may only write to new memory of its own."""
        if not node.inplace:
            return False
        at = node.inputs[0]
        while self._single(at):
            made = self.flow.nodes[at]
            if not (made.view or made.partial) and made.op in (Op.CONV, Op.NORM, Op.ADD, Op.PAD):
                return False
            if not made.inputs:
                break
            at = made.inputs[0]
        return True

    def _written_before(self, nodes: list[int], source: int) -> bool:
        """Whether what a run reads is overwritten while it runs.

        What stands before its first convolution becomes an identity, and hands on what is there by then.
        """
        convs = [index for index in nodes if self.flow.nodes[index].op is Op.CONV]
        if not convs:
            return False
        origin = source
        while self.flow.nodes[origin].inputs and (self.flow.nodes[origin].view or self.flow.nodes[origin].partial):
            origin = self.flow.nodes[origin].inputs[0]
        family, todo, written = {origin}, [origin], []
        while todo:
            for reader in self.readers[todo.pop()]:
                made = self.flow.nodes[reader]
                if made.inplace and made.inputs[0] in family:
                    written.append(reader)
                if reader not in family and (made.view or made.partial):
                    family.add(reader)
                    todo.append(reader)
        first, last = min(nodes), max(convs)
        return any(first < index < last for index in written)

    def _takes(self, frame: ModuleCall) -> str:
        calls = (other for other in self.flow.frames if other.path == frame.path)
        return "" if frame.path in self.flow.odd else takes_of(calls)

    def _why(self, node: FlowNode) -> str:
        frame = node.frame
        assert frame is not None
        if frame.parent is None and node.method != "forward":
            return "its sum is in another method than forward, which others may call on its own"
        if self.forwards[id(frame.module)] > 1:
            return f"{frame.path or 'the model'} runs several times"
        return ""

    # -- runs ---------------------------------------------------------------------------------------------------------

    def links(self, calls: Callers) -> set[tuple[str, str]]:
        """Which element's value is read by which next one only, as pairs of what identifies them."""
        return {pair for value in self._values(calls).values() for pair in _pairs(value.elements)}

    def runs(self, calls: Callers, links: set[tuple[str, str]] | None, sizes: bool) -> Iterator[LinearRun]:
        """Maximal runs with a convolution in them, in order of execution."""
        values = self._values(calls)
        taken: set[int] = set()
        found: list[tuple[int, LinearRun]] = []
        for index in sorted(values, key=lambda at: (-len(values[at].nodes), at)):
            value = values[index]
            if index in taken:
                continue
            taken.update(value.nodes)
            parts = list(_cut(value.elements, links))
            shape = self._shape(value.source) if sizes and len(parts) == 1 else None
            for at, part in enumerate(parts):
                if at == 0 and not _starts_with_conv(part) and self._written_before(value.nodes, value.source):
                    part = _from_first_conv(part)
                if any(step.kind == "conv" for step in steps_of(part)):
                    flags = tuple(sorted(value.flags))
                    found.append((index, LinearRun(tuple(part), self._crossed(value), shape, flags)))
        return iter(run for _, run in sorted(found, key=lambda pair: pair[0]))

    def _crossed(self, value: _Value) -> tuple[str, ...]:
        """Modules that the run goes into or out of."""
        paths = []
        for index in value.nodes:
            paths.append([frame.path for frame in ancestors(self.flow.nodes[index].frame)])
        common = set(paths[0]).intersection(*paths[1:])
        return tuple(dict.fromkeys(path for above in paths for path in above if path not in common))

    def _shape(self, source: int) -> tuple[int, ...] | None:
        shape = self.flow.nodes[source].shape
        return None if shape is None else shape[1:]


_REPLACED = (Op.CONV, Op.NORM, Op.PAD, Op.POOL)
_KINDS = {Op.CONV: "conv", Op.NORM: "norm", Op.PAD: "pad", Op.PASS: "pass", Op.DROP: "drop"}
_KEEP = {"clone", "contiguous"}


def _going(values: dict[int, _Value], index: int) -> _Value | None:
    """What may be continued there."""
    value = values.get(index)
    return None if value is None or value.ended else value


def _adds_nothing(node: FlowNode) -> bool:
    """Whether it is the first step of ``sum(branches)``: zero plus the value."""
    if node.op is not Op.SCALE or len(node.origin.args) != 2 or node.origin.kwargs:  # a third is a factor, as alpha is
        return False
    zero = any(type(part) in (int, float) and part == 0 for part in node.origin.args)
    return zero and node.label in SUMS


def _pairs(elements: Iterable[Element]) -> Iterator[tuple[str, str]]:
    """Every element alone, and neighbours, by what identifies them; identities are passed over."""
    before = ""
    for element in elements:
        if isinstance(element, Step):
            if element.quiet:
                continue
            name = element.name
        else:
            name = repr(element.branches)
            for branch in element.branches:
                yield from _pairs(branch)
        yield "", name
        if before:
            yield before, name
        before = name


def _starts_with_conv(elements: list[Element]) -> bool:
    return bool(elements) and isinstance(elements[0], Step) and elements[0].kind == "conv"


def _from_first_conv(elements: list[Element]) -> list[Element]:
    """The run without what stands before its first convolution; empty where that is a branch's."""
    for at, element in enumerate(elements):
        if isinstance(element, Join):
            return []
        if element.kind == "conv":
            return elements[at:]
    return []


def _cut(elements: list[Element], links: set[tuple[str, str]] | None) -> Iterator[list[Element]]:
    """The run in parts that train mode has too."""
    if links is None:
        yield elements
        return
    part: list[Element] = []
    last: list[Element] = []
    for element in elements:
        if last and not set(_pairs([*last, element])) <= links:
            yield part
            part = []
        part.append(element)
        last = last if element.quiet else [element]
    yield part
