"""Linear runs: what lies between activations, forks and everything else that is not linear, module by module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn
from torch.fx import Node, Proxy

from nmconv.graph._analysis import trace_parts
from nmconv.graph._constants import settings_read
from nmconv.graph._flow import Flow, FlowNode
from nmconv.graph._holders import Holders
from nmconv.graph._lower import lower
from nmconv.graph._ops import Op
from nmconv.graph._records import Frame, collect
from nmconv.graph._takes import takes_of
from nmconv.graph._tracer import FlowTracer

__all__ = ["Element", "Join", "LinearRun", "Step", "calls_by_kind", "linear_runs", "steps_of"]


@dataclass(frozen=True)
class Step:
    """One module of a run, called once.

    Attributes:
        kind: ``conv``, ``norm``, ``pad``, ``drop`` (dropout, drop-path) or ``pass`` (identity).
        name: Its qualified name.
        why: Why it cannot be replaced without changing something else, or "".
    """

    kind: str
    name: str
    why: str = ""


@dataclass(frozen=True)
class Join:
    """A sum of two parallel branches of one value.

    Attributes:
        branches: The operands, each a sequence of elements; an empty one is the value itself.
        owner: Qualified name of the module whose forward adds.
        takes: The structure of that forward's arguments.
        label: What the addition is called there.
        number: Which call of that label it is, from 1.
        why: Why the owner's forward cannot be rewritten, or "".
    """

    branches: tuple[tuple[Element, ...], tuple[Element, ...]]
    owner: str
    takes: str
    label: str
    number: int
    why: str = ""


Element: TypeAlias = "Step | Join"


@dataclass(frozen=True)
class LinearRun:
    """Elements that follow one another, each value between them read by the next one only.

    Attributes:
        elements: In order of execution.
        crossed: Qualified names of modules that begin or end inside the run: their hooks would see other values.
        rank: Spatial axes of its convolutions.
        source: Shape of the input without the batch, where it can be known: ``(channels, *sizes)``.
    """

    elements: tuple[Element, ...]
    crossed: tuple[str, ...] = ()
    source: tuple[int, ...] | None = None


def steps_of(elements: Iterable[Element]) -> Iterator[Step]:
    """All modules of a run, those of branches too."""
    for element in elements:
        if isinstance(element, Step):
            yield element
        else:
            for branch in element.branches:
                yield from steps_of(branch)


def linear_runs(model: nn.Module, *, example_inputs: Any = None, sizes: bool = True) -> tuple[LinearRun, ...]:
    """The maximal linear runs of a model in eval mode that hold a convolution, in order of execution.

    Where train mode runs otherwise, only what both have in common.

    Args:
        model: Any module; nothing of it changes.
        example_inputs: What the model is called with; only structure and shapes are used.
        sizes: Whether to find out the shapes of the runs' inputs.
    """
    first = trace_parts(model, False, example_inputs, None, lambda tracer: _Finder(tracer))
    analyses = [first]
    if first.mode_readers:
        analyses.append(trace_parts(model, True, example_inputs, first, lambda tracer: _Finder(tracer)))
    calls = _Calls(model, [finder for analysis in analyses for finder in analysis.traced], bool(first.broken))
    links = None
    if first.mode_readers:
        links = {link for finder in analyses[1].traced for link in finder.links(calls)}
    return tuple(run for finder in first.traced for run in finder.runs(calls, links, sizes))


class _Calls:
    """Who calls which module, and whether replacing a module changes that one call and nothing else."""

    def __init__(self, model: nn.Module, finders: Iterable[_Finder], opaque: bool) -> None:
        self._model = model
        self._holders = Holders(model)
        self._opaque = opaque
        self._read = {name for finder in finders for name in finder.read}
        self._settings = {held for finder in finders for held in finder.settings}
        self._owners = Counter(
            id(value) for module in model.modules() for value in module._parameters.values() if value is not None
        )
        self._times: Counter[int] = Counter()
        for finder in finders:
            for name, times in finder.calls.items():
                module = id(model.get_submodule(name))
                self._times[module] = max(self._times[module], times)

    def why_not(self, name: str) -> str:
        """Why the module cannot be replaced, or ""."""
        module = self._model.get_submodule(name)
        if self._times[id(module)] != 1:
            return "it is called several times"
        if name in self._read:
            return "something else reads its parameters"
        if id(module) in self._settings:
            return "a forward reads its settings"
        if any(self._owners[id(value)] > 1 for value in module._parameters.values() if value is not None):
            return "another module has the same parameters"
        if self._holders.is_kept_elsewhere(module):
            return "an attribute holds it without registering it, so that it cannot be replaced"
        if self._opaque and self._holders.count(module) > 1:
            return "it is registered several times in a model that cannot be traced as a whole"
        return ""


@dataclass(eq=False)
class _Value:
    """A value as elements applied to a source."""

    source: int
    elements: list[Element]
    nodes: list[int]


class _Finder:
    """Runs of one trace."""

    def __init__(self, tracer: FlowTracer) -> None:
        self.tracer = tracer
        self.flow: Flow = lower(tracer, linear=False)
        self.calls = Counter(
            tracer.prefix + str(node.target)
            for node in tracer.graph.nodes
            if node.op == "call_module" and node not in tracer.dead
        )
        read = {
            tracer.prefix + str(node.target).rpartition(".")[0]
            for node in tracer.graph.nodes
            if node.op == "get_attr" and node.users and node not in tracer.dead
        }
        self.read = {name for name in read if name}
        self.stored = _stored(tracer)
        frames = {id(frame.module): frame.module for frame in _frames(tracer)}
        self.settings = {held for module in frames.values() for held in settings_read(module)}
        self.readers: list[list[int]] = [[] for _ in self.flow.nodes]
        for node in self.flow.nodes:
            for source in {*node.inputs, *node.sides}:
                self.readers[source].append(node.index)

    # -- values -------------------------------------------------------------------------------------------------------

    def _single(self, index: int) -> bool:
        """Whether one node reads the value, and nothing its shape, and no attribute keeps it."""
        if self.flow.nodes[index].origin in self.stored:
            return False
        users = [user for user in self.flow.nodes[index].origin.users if user not in self.tracer.dead]
        return len(self.readers[index]) == 1 and len(users) == 1

    def _values(self, calls: _Calls) -> dict[int, _Value]:
        values: dict[int, _Value] = {}
        for node in self.flow.nodes:
            if node.op is Op.ADD:
                made = self._sum(node, values)
            else:
                made = self._step(node, values, calls)
            if made is not None:
                values[node.index] = made
        return values

    def _step(self, node: FlowNode, values: dict[int, _Value], calls: _Calls) -> _Value | None:
        kind = "pass" if _adds_nothing(node) else _KINDS.get(node.op)
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
        if before in values and self._single(before):
            value = values[before]
            return _Value(value.source, [*value.elements, *elements], [*value.nodes, node.index])
        return _Value(before, elements, [node.index])

    def _sum(self, node: FlowNode, values: dict[int, _Value]) -> _Value | None:
        if len(node.inputs) != 2 or node.origin.kwargs or getattr(node.origin.target, "__name__", "") not in _SUMS:
            return None
        if node.origin.op == "call_method" and node.origin.target not in _SUMS:
            return None
        frame = node.frame
        if frame is None or self._first_overwritten(node):
            return None
        parts = [values[index] if index in values and self._single(index) else None for index in node.inputs]
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
        if source in values and all(reader in inside for reader in self.readers[source]) and self._only(source, inside):
            value = values[source]
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
                if made.inplace or made.opaque:
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
        frames = {id(other.frame): other.frame for other in self.flow.nodes if other.frame is not None}
        if sum(other.module is frame.module for other in frames.values()) > 1:
            return f"{frame.path or 'the model'} runs several times"
        return ""

    # -- runs ---------------------------------------------------------------------------------------------------------

    def links(self, calls: _Calls) -> set[tuple[str, str]]:
        """Which element's value is read by which next one only, as pairs of what identifies them."""
        return {pair for value in self._values(calls).values() for pair in _pairs(value.elements)}

    def runs(self, calls: _Calls, links: set[tuple[str, str]] | None, sizes: bool) -> Iterator[LinearRun]:
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
                if at == 0 and self._written_before(value.nodes, value.source):
                    part = _from_first_conv(part)
                if any(step.kind == "conv" for step in steps_of(part)):
                    found.append((index, LinearRun(tuple(part), self._crossed(value), shape)))
        return iter(run for _, run in sorted(found, key=lambda pair: pair[0]))

    def _crossed(self, value: _Value) -> tuple[str, ...]:
        """Modules that the run goes into or out of."""
        paths = []
        for index in value.nodes:
            frame, above = self.flow.nodes[index].frame, []
            while frame is not None:
                above.append(frame.path)
                frame = frame.parent
            paths.append(above)
        common = set(paths[0]).intersection(*paths[1:])
        return tuple(dict.fromkeys(path for above in paths for path in above if path not in common))

    def _shape(self, source: int) -> tuple[int, ...] | None:
        try:
            return tuple(self.tracer.values.get(self.flow.nodes[source].origin).shape[1:])
        except Exception:
            return None


_KINDS = {Op.CONV: "conv", Op.NORM: "norm", Op.PAD: "pad", Op.PASS: "pass", Op.DROP: "drop"}
_KEEP = {"clone", "contiguous"}
_QUIET = ("pass", "drop")
_SUMS = {"add", "iadd", "add_"}


def _frames(tracer: FlowTracer) -> Iterator[Frame]:
    """Of every module whose forward has made a node, and of those around it."""
    seen: set[int] = set()
    for frame, *_ in tracer.where.values():
        at: Frame | None = frame
        while at is not None and id(at) not in seen:
            seen.add(id(at))
            yield at
            at = at.parent


def _stored(tracer: FlowTracer) -> set[Node]:
    """Values that a forward has left in attributes of modules, for others to read."""
    found: list[Any] = []
    for module in tracer.root.modules():
        held = [value for key, value in module.__dict__.items() if key not in ("_parameters", "_modules")]
        collect([value for value in held if isinstance(value, (Proxy, list, tuple, dict))], found, set())
    return {proxy.node for proxy in found}


def _adds_nothing(node: FlowNode) -> bool:
    """Whether it is the first step of ``sum(branches)``: zero plus the value."""
    zero = any(type(part) in (int, float) and part == 0 for part in node.origin.args)
    return node.op is Op.SCALE and zero and getattr(node.origin.target, "__name__", "") in _SUMS


def _pairs(elements: Iterable[Element]) -> Iterator[tuple[str, str]]:
    """Every element alone, and neighbours, by what identifies them; identities are passed over."""
    before = ""
    for element in elements:
        if isinstance(element, Step):
            if element.kind in _QUIET:
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
        last = last if isinstance(element, Step) and element.kind in _QUIET else [element]
    yield part


def calls_by_kind(model: nn.Module, *, training: bool, example_inputs: Any = None) -> Counter[str]:
    """How often each convolution, norm, activation and sum on the way to an output is called, by name.

    Functions are named by the module that calls them: ``layer1.0:add``.
    """
    found: Counter[str] = Counter()
    analysis = trace_parts(model, training, example_inputs, None, lambda tracer: lower(tracer, linear=False))
    for flow in analysis.traced:
        flow.link()
        for node in flow.nodes:
            if node.op in _COUNTED and (flow.main[node.index] or flow.gating[node.index]):
                found[node.name.partition("#")[0]] += 1
    return found


_COUNTED = {Op.CONV, Op.NORM, Op.ACT, Op.ADD, Op.MUL, Op.PAD, Op.LINEAR, Op.POOL, Op.DROP, Op.BOUNDED}
