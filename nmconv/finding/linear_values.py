"""Express the values of a flow as sequences of linear elements applied to an earlier value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from nmconv.algebra import is_average_pool
from nmconv.finding.control_flow import flags_between, is_split_by_method, may_diverge_between
from nmconv.finding.def_use import is_plain_sum
from nmconv.finding.module_users import ModuleUsers
from nmconv.finding.run_elements import Element, ParallelSum, Step, steps_of
from nmconv.flow import SUMS, Flow, FlowNode, Op, forward_argument_structures

__all__ = ["LinearValue", "linear_values"]

_KINDS = {Op.CONV: "conv", Op.NORM: "norm", Op.PAD: "pad", Op.PASS: "pass", Op.DROP: "drop"}
_COPYING = {"clone", "contiguous"}


@dataclass(eq=False)
class LinearValue:
    """A value as elements applied to a source.

    Attributes:
        source: Index of the value that the elements are applied to.
        elements: In order of execution.
        nodes: Indices of the nodes that compute it from the source.
        flags: Flags on which control flow inside depends; see :func:`flags_between`.
    """

    source: int
    elements: list[Element]
    nodes: list[int]
    flags: set[tuple[str, str]] = field(default_factory=set)


def linear_values(
    flow: Flow, users: ModuleUsers, lost_sizes: Sequence[int], *, pools: bool = False
) -> dict[int, LinearValue]:
    """Return the values of a flow that are linear in an earlier value, by their index.

    Args:
        flow: Any flow; it is linked.
        users: Tells which modules can be replaced.
        lost_sizes: Positions in the recording at which a size became a plain number; see
            :class:`nmconv.recording.Recordings`.
        pools: Whether an average pool counts as an element; it is the last of its run.
    """
    flow.link()
    return _LinearValues(flow, users, lost_sizes, pools).find()


class _LinearValues:
    def __init__(self, flow: Flow, users: ModuleUsers, lost_sizes: Sequence[int], pools: bool) -> None:
        self._flow = flow
        self._users = users
        self._lost_sizes = lost_sizes
        self._pools = pools
        self._position = {node: position for position, node in enumerate(flow.recording.facts)}
        self._forwards = Counter(id(frame.module) for frame in flow.frames)
        self._readers = flow.all_readers()
        self._values: dict[int, LinearValue] = {}

    def find(self) -> dict[int, LinearValue]:
        for node in self._flow.nodes:
            value = self._sum(node) if node.op is Op.ADD else self._step(node)
            if value is not None:
                self._values[node.index] = value
        return self._values

    # -- elements -----------------------------------------------------------------------------------------------------

    def _step(self, node: FlowNode) -> LinearValue | None:
        """Return a node's value if it is one linear operation on its only input."""
        kind = self._kind(node)
        if kind is None or len(node.inputs) != 1 or node.side_inputs:
            return None
        elements: list[Element] = []
        if node.module is not None:
            why = "" if kind == "pass" else self._users.why_not_replaceable(node.name)
            if kind == "drop" and why:  # an identity in eval mode: it may stay for its other callers
                kind, why = "pass", ""
            elements = [Step(kind, node.name, why)]
        elif kind == "conv":
            elements = [Step(kind, node.name, "it is a call of a function, not of a module")]
        elif kind != "pass" or (node.op is not Op.SCALE and node.label not in _COPYING):
            return None
        source = node.inputs[0]
        value = self._extensible(source)
        if value is not None and self._has_one_reader(source) and not self._may_diverge(source, node.index):
            flags = value.flags | self._flags(source, node.index)
            return LinearValue(value.source, [*value.elements, *elements], [*value.nodes, node.index], flags)
        return LinearValue(source, elements, [node.index])

    def _kind(self, node: FlowNode) -> str | None:
        if _adds_zero(node):
            return "pass"
        if self._pools and node.op is Op.POOL and node.module is not None:
            return "pool" if is_average_pool(node.module) else None
        return _KINDS.get(node.op)

    def _sum(self, node: FlowNode) -> LinearValue | None:
        """Return a node's value if it is the sum of two branches of one source, with a convolution in them."""
        if node.frame is None or not self._is_replaceable_sum(node):
            return None
        branches = [self._extensible(index) if self._has_one_reader(index) else None for index in node.inputs]
        sources = {
            index if branch is None else branch.source for index, branch in zip(node.inputs, branches, strict=True)
        }
        if len(sources) != 1:
            return None
        source = sources.pop()
        one, two = (() if branch is None else tuple(branch.elements) for branch in branches)
        if not any(step.kind == "conv" for step in steps_of((*one, *two))):
            return None
        owner = node.frame.path
        arguments = forward_argument_structures([self._flow], [owner])[owner]
        parallel = ParallelSum((one, two), owner, node.label, node.number, arguments, self._why_not_rewritable(node))
        computed = [branch for branch in branches if branch is not None]
        nodes = [*(index for branch in computed for index in branch.nodes), node.index]
        readers = self._readers[source]
        flags = set[tuple[str, str]]().union(
            *(branch.flags for branch in computed),
            *(self._flags(index, node.index) for index in node.inputs),
            *(self._flags(source, reader) for reader in readers),
        )
        value = self._extensible(source)
        if (
            value is not None
            and set(nodes).issuperset(readers)
            and not self._flow.nodes[source].exposed
            and not any(self._may_diverge(source, reader) for reader in readers)
        ):
            return LinearValue(value.source, [*value.elements, parallel], [*value.nodes, *nodes], value.flags | flags)
        return LinearValue(source, [parallel], nodes, flags)

    def _is_replaceable_sum(self, node: FlowNode) -> bool:
        if len(node.inputs) != 2 or not is_plain_sum(node) or self._overwrites_shared_memory(node):
            return False
        if not (self._flow.main[node.index] or self._flow.gating[node.index]):  # rewriting removes dead code
            return False
        return not any(index in self._values and self._may_diverge(index, node.index) for index in node.inputs)

    def _why_not_rewritable(self, node: FlowNode) -> str:
        """Return why the forward that computes a sum cannot be rewritten, or ""."""
        frame = node.frame
        assert frame is not None
        if frame.parent is None and node.method != "forward":
            return "its sum is in another method than forward, which others may call on its own"
        if self._forwards[id(frame.module)] > 1:
            return f"{frame.path or 'the model'} runs several times"
        return ""

    # -- conditions ---------------------------------------------------------------------------------------------------

    def _extensible(self, index: int) -> LinearValue | None:
        """Return the linear value at an index unless it ends in a pool, which starts something new."""
        value = self._values.get(index)
        return None if value is None or (value.elements and value.elements[-1].is_pool) else value

    def _has_one_reader(self, index: int) -> bool:
        """Return whether one node reads the value, none its shape, and no attribute keeps it."""
        return len(self._readers[index]) == 1 and not self._flow.nodes[index].exposed

    def _may_diverge(self, index: int, reader: int) -> bool:
        """Return whether a call may take another path between a value and its reader, or compute only one of them."""
        value, node = self._flow.nodes[index], self._flow.nodes[reader]
        modules = [each for each in self._nodes_of(index) if each.module is not None]
        if modules and node.module is not None and is_split_by_method(modules[-1], node):
            return True
        first, last = self._position[value.origin], self._position[node.origin]
        if any(first < position <= last for position in self._lost_sizes):
            return True
        return may_diverge_between(value, node, count_variables=bool(self._lost_sizes))

    def _nodes_of(self, index: int) -> list[FlowNode]:
        """Return the nodes that compute a linear value, in order."""
        return [self._flow.nodes[each] for each in (self._values[index].nodes if index in self._values else ())]

    def _flags(self, index: int, reader: int) -> set[tuple[str, str]]:
        return set(flags_between(self._flow.nodes[index], self._flow.nodes[reader]))

    def _overwrites_shared_memory(self, node: FlowNode) -> bool:
        """Return whether a sum is in-place and its first operand may share memory with a value that others read."""
        if not node.inplace:
            return False
        index = node.inputs[0]
        while self._has_one_reader(index):
            operand = self._flow.nodes[index]
            if not (operand.view or operand.partial) and operand.op in (Op.CONV, Op.NORM, Op.ADD, Op.PAD):
                return False
            if not operand.inputs:
                break
            index = operand.inputs[0]
        return True


def _adds_zero(node: FlowNode) -> bool:
    """Return whether a node is the first addition of ``sum(branches)``: zero plus the value."""
    if node.op is not Op.SCALE or len(node.origin.args) != 2 or node.origin.kwargs:  # a third is a factor, as alpha is
        return False
    has_zero = any(type(arg) in (int, float) and arg == 0 for arg in node.origin.args)
    return has_zero and node.label in SUMS
