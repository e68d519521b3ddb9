"""Def-use: where a value goes in a model, and how to find it again while the model runs, as plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from nmconv.finding.flow_analysis import eval_flows
from nmconv.finding.run_elements import Element, ParallelSum
from nmconv.flow import SUMS, ActCall, Flow, FlowNode, Op, is_norm_act

__all__ = ["NORM", "SUM", "CallKey", "DefUse", "Use", "ValueLocation", "call_key", "is_plain_sum", "location_of"]

SUM = "+"  # the label of a sum made by an operator or a function
NORM = "(norm)"  # the label of the value that timm's norm + act passes to its activation

# An activation call: its owner, name and kind of function, and which call of it in one forward.
CallKey: TypeAlias = "tuple[tuple[str, str, str | None], int]"

_UNARY = (Op.NORM, Op.PAD, Op.PASS, Op.DROP)


@dataclass(frozen=True)
class ValueLocation:
    """The result of one call within one forward of a module.

    Attributes:
        owner: Qualified name of the module whose forward makes the call.
        label: The called child's relative name (its qualified name after ``/`` if it is not a child), a function's
            name with ``()``, :data:`SUM` or :data:`NORM`.
        number: Which call of that label it is in one forward of the owner, from 1.
        total: How many there are; 0 where that does not matter.
    """

    owner: str
    label: str
    number: int
    total: int = 0

    def __str__(self) -> str:
        return f"{self.owner or 'the model'}:{self.label}#{self.number}"


@dataclass(frozen=True)
class Use:
    """An operation that is the only reader of a value.

    Attributes:
        kind: ``sum`` or ``act``.
        location: Location of its result.
        act: For an activation, its call.
    """

    kind: str
    location: ValueLocation
    act: CallKey | None = None


class DefUse:
    """Uses and definitions of the values in a model, in eval mode.

    Args:
        model: Not modified.
        example_inputs: What it is called with, or None; only structure and shapes are used.
    """

    def __init__(self, model: nn.Module, example_inputs: Any = None) -> None:
        self._parts = [_FlowDefUse(flow) for flow in eval_flows(model, example_inputs)]

    def location(self, element: Element) -> ValueLocation:
        """Return the location of an element's result.

        Raises:
            KeyError: If the model makes no such call.
        """
        part, index = self._find(element)
        return part.location(index)

    def uses_after(self, element: Element) -> tuple[Use, ...]:
        """Return the sums and activations after an element, up to a fork or another operation.

        Raises:
            KeyError: If the model makes no such call.
        """
        part, index = self._find(element)
        return tuple(part.uses(index))

    def activation_before(self, element: Element) -> CallKey | None:
        """Return the activation before an element if only linear, channelwise operations lie between, else None.

        Raises:
            KeyError: If the model makes no such call.
        """
        part, index = self._find(element)
        return part.activation_before(index)

    def activations_in(self, parallel: ParallelSum) -> tuple[CallKey, ...]:
        """Return the activations between a sum and the last value that both operands are computed from.

        Raises:
            KeyError: If the model makes no such sum.
        """
        part, index = self._find(parallel)
        return tuple(part.activations_since_fork(index))

    def _find(self, element: Element) -> tuple[_FlowDefUse, int]:
        if isinstance(element, ParallelSum):
            key = (element.owner, element.label, element.number)
        else:
            key = ("", element.name, 1)
        for part in self._parts:
            if key in part.index:
                return part, part.index[key]
        raise KeyError(key)


def call_key(act: ActCall) -> CallKey:
    """Return the key of an activation call."""
    return (act.frame.path, act.name, act.function), act.call


def is_plain_sum(node: FlowNode) -> bool:
    """Return whether a node adds its operands as they are, without alpha."""
    return node.op is Op.ADD and node.label in SUMS and not node.origin.kwargs


def location_of(flow: Flow, node: FlowNode) -> ValueLocation:
    """Return where a node's value is while the model runs."""
    owner = node.frame.path if node.frame is not None else ""
    if node.module is not None:
        is_inner_norm = node.frame is not None and node.module is node.frame.module and is_norm_act(node.module)
        return ValueLocation(owner, NORM if is_inner_norm else node.label, node.number)
    if node.label not in SUMS:
        # The last call of an activation expression counts among all calls of its function, on parameters, too.
        is_expression = node.act is not None and node.act.function != node.label.rstrip("_")
        number = flow.recording.facts[node.origin].number if is_expression else node.number
        return ValueLocation(owner, f"{node.label}()", number)
    sums = [each.index for each in flow.nodes if each.frame is node.frame and _is_function_sum(each)]
    return ValueLocation(owner, SUM, sums.index(node.index) + 1, len(sums))


def _is_function_sum(node: FlowNode) -> bool:
    return node.module is None and node.label in SUMS


class _FlowDefUse:
    """Uses and definitions of the values in one flow."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self._nodes = flow.nodes
        self._readers = flow.all_readers()
        self._forwards = Counter(frame.path for frame in flow.frames)
        self.index: dict[tuple[str, str, int], int] = {}
        for node in self._nodes:
            if node.op is Op.ADD and node.frame is not None:
                self.index[node.frame.path, node.label, node.number] = node.index
            if node.op is Op.CONV or node.op in _UNARY:
                self.index["", node.name, 1] = node.index

    def location(self, index: int) -> ValueLocation:
        return location_of(self._flow, self._nodes[index])

    def uses(self, index: int) -> Iterator[Use]:
        while True:
            reader = self._only_reader(index)
            if reader is None:
                return
            if reader.op in (Op.PASS, Op.DROP) and reader.inputs == [index]:
                pass
            elif is_plain_sum(reader) and reader.inputs.count(index) == 1 and self._can_be_located(reader):
                yield Use("sum", self.location(reader.index))
            elif reader.op is Op.ACT and reader.act is not None and self._can_be_located(reader):
                yield Use("act", self.location(reader.index), call_key(reader.act))
            else:
                return
            index = reader.index

    def activation_before(self, index: int) -> CallKey | None:
        while self._nodes[index].inputs:
            node = self._nodes[self._nodes[index].inputs[0]]
            if node.op is Op.ACT and node.act is not None:
                return call_key(node.act)
            if node.op not in _UNARY or len(node.inputs) != 1:
                return None
            index = node.index
        return None

    def activations_since_fork(self, index: int) -> Iterator[CallKey]:
        origins = [self._origins(operand) for operand in self._nodes[index].inputs]
        shared = {origin for origin in set.intersection(*origins) if self._nodes[origin].op is not Op.PARAM}
        fork = max(shared, default=-1)
        for origin in sorted(set.union(*origins)):
            act = self._nodes[origin].act
            if origin > fork and act is not None:
                yield call_key(act)

    def _origins(self, index: int) -> set[int]:
        """Return a node and all nodes that it is computed from."""
        origins, todo = {index}, [index]
        while todo:
            node = self._nodes[todo.pop()]
            new = {*node.inputs, *node.side_inputs} - origins
            origins |= new
            todo += new
        return origins

    def _only_reader(self, index: int) -> FlowNode | None:
        """Return the only reader of a value, or None if there are others."""
        if len(self._readers[index]) != 1 or self._nodes[index].exposed:
            return None
        reader = self._nodes[self._readers[index][0]]
        return None if reader.side_inputs or reader.frame is None else reader

    def _can_be_located(self, node: FlowNode) -> bool:
        """Return whether the call can be told from others while the model runs."""
        if node.frame is None or self._forwards[node.frame.path] != 1:
            return False
        return node.module is not None or node.label in SUMS or node.op is Op.ACT
