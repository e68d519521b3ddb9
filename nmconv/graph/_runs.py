"""Linear runs: what lies between activations, forks and everything else that is not linear, module by module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import Node, Proxy

from nmconv.graph._analysis import trace_parts
from nmconv.graph._callers import Callers, Seen
from nmconv.graph._elements import Element, Join, LinearRun, Step, steps_of
from nmconv.graph._flow import Flow, FlowNode
from nmconv.graph._geometry import averages
from nmconv.graph._holders import OWN
from nmconv.graph._lower import lower
from nmconv.graph._ops import Op
from nmconv.graph._records import ATOMS, Frame, ancestors, collect
from nmconv.graph._takes import takes_of
from nmconv.graph._tracer import FlowTracer
from nmconv.graph._turns import Turns
from nmconv.graph._twins import twins
from nmconv.graph._values import Unknown

__all__ = ["linear_runs"]


def linear_runs(
    model: nn.Module, *, example_inputs: Any = None, sizes: bool = True, pools: bool = False
) -> tuple[LinearRun, ...]:
    """The maximal linear runs of a model in eval mode that hold a convolution, in order of execution.

    Where train mode runs otherwise, only what both have in common.

    Args:
        model: Any module; nothing of it changes.
        example_inputs: What the model is called with; only structure and shapes are used.
        sizes: Whether to find out the shapes of the runs' inputs.
        pools: Whether an average pool behind a run is its last element.
    """

    def finder(tracer: FlowTracer) -> _Finder:
        return _Finder(tracer, _stored(tracer), pools)

    def known_or_finder(tracer: FlowTracer) -> _Finder:
        stored = _stored(tracer)
        for known in first.traced:
            pairs = twins(known.tracer, tracer)
            if pairs is not None and {pairs[node] for node in known.stored} == stored:
                return known  # eval mode's, where all is the same
        return _Finder(tracer, stored, pools)

    first = trace_parts(model, False, example_inputs, None, finder)
    analyses = [first]
    if first.mode_readers:
        analyses.append(trace_parts(model, True, example_inputs, first, known_or_finder))
    seen = [finder.seen for analysis in analyses for finder in analysis.traced]
    looked = (held for analysis in analyses for tracer in analysis.tracers for held in tracer.looked_at)
    calls = Callers(model, seen, looked, first.broken)
    links = None
    if analyses[-1].traced != first.traced:
        links = {link for finder in analyses[1].traced for link in finder.links(calls)}
    return tuple(run for finder in first.traced for run in finder.runs(calls, links, sizes))


@dataclass(eq=False)
class _Value:
    """A value as elements applied to a source."""

    source: int
    elements: list[Element]
    nodes: list[int]

    @property
    def ended(self) -> bool:
        """Whether nothing continues it: what a pool gives is the start of something new."""
        return bool(self.elements) and self.elements[-1].pools


class _Finder:
    """Runs of one trace."""

    def __init__(self, tracer: FlowTracer, stored: set[Node], pools: bool) -> None:
        self.tracer = tracer
        self.stored = stored
        self.pools = pools
        self.flow: Flow = lower(tracer, linear=False)
        self.turns = Turns(tracer, self.flow)
        self.seen = Seen.of(tracer)
        frames = {id(node.frame): node.frame for node in self.flow.nodes if node.frame is not None}
        self.forwards = Counter(id(frame.module) for frame in frames.values())
        self.flow.link()
        self.readers: list[list[int]] = [[] for _ in self.flow.nodes]
        for node in self.flow.nodes:
            for source in {*node.inputs, *node.sides}:
                self.readers[source].append(node.index)

    # -- values -------------------------------------------------------------------------------------------------------

    def _kind(self, node: FlowNode) -> str | None:
        if _adds_nothing(node):
            return "pass"
        if self.pools and node.op is Op.POOL and node.origin.op == "call_module":
            return "pool" if averages(self.tracer.module(str(node.origin.target))) else None
        return _KINDS.get(node.op)

    def _single(self, index: int) -> bool:
        """Whether one node reads the value, and nothing its shape, and no attribute keeps it."""
        if self.flow.nodes[index].origin in self.stored:
            return False
        users = [user for user in self.flow.nodes[index].origin.users if user not in self.tracer.dead]
        return len(self.readers[index]) == 1 and len(users) == 1

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
        if kind is None or len(node.inputs) != 1 or node.sides or node.opaque:
            return None
        if node.origin.op == "call_module":
            why = "" if kind == "pass" else calls.why_not(node.name)
            if kind == "drop" and why:  # in eval mode it hands on what it gets: it stays for its other callers
                kind, why = "pass", ""
            elements: list[Element] = [Step(kind, node.name, why)]
        elif kind == "conv":
            elements = [Step(kind, node.name, "it is a call of a function, not of a module")]
        elif kind == "pass" and (node.op is Op.SCALE or str(node.origin.target) in _KEEP):
            elements = []
        else:
            return None
        before = node.inputs[0]
        value = _going(values, before)
        if value is not None and self._single(before) and not self.turns.between(before, node):
            return _Value(value.source, [*value.elements, *elements], [*value.nodes, node.index])
        return _Value(before, elements, [node.index])

    def _sum(self, node: FlowNode, values: dict[int, _Value]) -> _Value | None:
        if len(node.inputs) != 2 or node.origin.kwargs or getattr(node.origin.target, "__name__", "") not in _SUMS:
            return None
        if node.origin.op == "call_method" and node.origin.target not in _SUMS:
            return None
        frame = node.frame
        if frame is None or frame.asks or self._first_overwritten(node):
            return None
        if not (self.flow.main[node.index] or self.flow.gating[node.index]):  # rewriting drops what nobody uses
            return None
        if any(index in values and self.turns.between(index, node) for index in node.inputs):
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
        join = Join((one, two), frame.path, self._takes(frame), node.label, node.number, self._why(node))
        nodes = [index for part in parts if part is not None for index in part.nodes] + [node.index]
        inside = set(nodes)
        value = _going(values, source)
        readers = self.readers[source]
        if (
            value
            and inside.issuperset(readers)
            and self._only(source, inside)
            and not any(self.turns.between(source, self.flow.nodes[reader]) for reader in readers)
        ):
            return _Value(value.source, [*value.elements, join], [*value.nodes, *nodes])
        return _Value(source, [join], nodes)

    def _only(self, index: int, inside: set[int]) -> bool:
        """Whether nobody else uses the value, not even its shape."""
        if self.flow.nodes[index].origin in self.stored:
            return False
        origins = {self.flow.nodes[at].origin for at in inside}
        return all(user in origins or user in self.tracer.dead for user in self.flow.nodes[index].origin.users)

    def _first_overwritten(self, node: FlowNode) -> bool:
        """Whether the sum overwrites memory that others have a name for: it may only write to new memory of its own."""
        if not node.inplace:
            return False
        at = node.inputs[0]
        while self._single(at):
            made = self.flow.nodes[at]
            if not (made.view or made.partial or made.opaque) and made.op in (Op.CONV, Op.NORM, Op.ADD, Op.PAD):
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
                if made.opaque or (made.inplace and made.inputs[0] in family):
                    written.append(reader)
                if reader not in family and (made.view or made.partial):
                    family.add(reader)
                    todo.append(reader)
        first, last = min(nodes), max(convs)
        return any(first < index < last for index in written)

    def _takes(self, frame: Frame) -> str:
        calls = [self.tracer.given] if frame.parent is None else self.tracer.completed.get(frame.path, [])
        return "" if frame.path in self.tracer.odd else takes_of(calls)

    def _why(self, node: FlowNode) -> str:
        frame = node.frame
        assert frame is not None
        if self.tracer.methods.get(node.origin, "forward") != "forward":
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
                    found.append((index, LinearRun(tuple(part), self._crossed(value), shape)))
        return iter(run for _, run in sorted(found, key=lambda pair: pair[0]))

    def _crossed(self, value: _Value) -> tuple[str, ...]:
        """Modules that the run goes into or out of."""
        paths = []
        for index in value.nodes:
            paths.append([frame.path for frame in ancestors(self.flow.nodes[index].frame)])
        common = set(paths[0]).intersection(*paths[1:])
        return tuple(dict.fromkeys(path for above in paths for path in above if path not in common))

    def _shape(self, source: int) -> tuple[int, ...] | None:
        try:
            return self.tracer.values.shape(self.flow.nodes[source].origin)[1:]
        except Unknown:
            return None


_KINDS = {Op.CONV: "conv", Op.NORM: "norm", Op.PAD: "pad", Op.PASS: "pass", Op.DROP: "drop"}
_KEEP = {"clone", "contiguous"}
_SUMS = {"add", "iadd", "add_"}


def _going(values: dict[int, _Value], index: int) -> _Value | None:
    """What may be continued there."""
    value = values.get(index)
    return None if value is None or value.ended else value


def _stored(tracer: FlowTracer) -> set[Node]:
    """Values that a forward has left in attributes of modules, for others to read."""
    found: list[Proxy] = []
    seen: set[int] = set()
    for module in tracer.root.modules():
        for name, value in module.__dict__.items():
            if name not in OWN and type(value) not in ATOMS:
                collect(value, found, seen)
    return {proxy.node for proxy in found}


def _adds_nothing(node: FlowNode) -> bool:
    """Whether it is the first step of ``sum(branches)``: zero plus the value."""
    if node.op is not Op.SCALE or len(node.origin.args) != 2 or node.origin.kwargs:  # a third is a factor, as alpha is
        return False
    zero = any(type(part) in (int, float) and part == 0 for part in node.origin.args)
    return zero and getattr(node.origin.target, "__name__", "") in _SUMS


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
