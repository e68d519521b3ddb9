"""Where a value goes in a model, and how to find it again while the model runs: as plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from nmconv.finding.analysis import Called, flows_of
from nmconv.finding.run_elements import Element, Join
from nmconv.flow import SUMS, ActCall, Flow, FlowNode, Op, is_norm_act, recordings_of

__all__ = ["NORM", "SUM", "DefUse", "Use", "ValueLocation", "location_of"]

SUM = "+"  # the label of a spot that is a sum made by an operator or a function
NORM = "(norm)"  # the label of what timm's norm + act gives to its activation


@dataclass(frozen=True)
class ValueLocation:
    """The result of one call within one forward of a module.

    Attributes:
        owner: Qualified name of the module whose forward makes the call.
        label: The called child's relative name (its qualified name behind ``/`` if it is no child), a function's
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
    """One thing that happens to a value that has no other reader.

    Attributes:
        kind: ``sum`` or ``act``.
        spot: What comes of it.
        act: Of an activation: who calls it, its name and its kind of function; and which call of it in one forward.
    """

    kind: str
    spot: ValueLocation
    act: tuple[Called, int] | None = None


class DefUse:
    """Where values go in a model in eval mode.

    Args:
        model: Read only.
        example_inputs: What it is called with, or None; only structure and shapes are used.
    """

    def __init__(self, model: nn.Module, example_inputs: Any = None) -> None:
        recordings = recordings_of(model, example_inputs, both_sizes=False)
        self._parts = list(map(_Way, flows_of(model, recordings)))

    def spot(self, element: Element) -> ValueLocation:
        """Where the value is that an element of a run gives.

        Raises:
            KeyError: If the model makes no such call.
        """
        part, index = self._find(element)
        return part.spot(index)

    def after(self, element: Element) -> tuple[Use, ...]:
        """What happens to the value that an element gives, up to a fork or anything that is no sum or activation."""
        part, index = self._find(element)
        return tuple(part.after(index))

    def read_by(self, element: Element) -> tuple[Called, int] | None:
        """The activation whose result an element is given, if only what is linear and for each channel lies between.

        Raises:
            KeyError: If the model makes no such call.
        """
        part, index = self._find(element)
        return part.read_by(index)

    def inside(self, join: Join) -> tuple[tuple[Called, int], ...]:
        """The activations between a sum and the value that both of its operands are made from.

        Raises:
            KeyError: If the model makes no such sum.
        """
        part, index = self._find(join)
        return tuple(part.inside(index))

    def _find(self, element: Element) -> tuple[_Way, int]:
        key = _key(element)
        for part in self._parts:
            if key in part.where:
                return part, part.where[key]
        raise KeyError(key)


def _key(element: Element) -> tuple[str, str, int]:
    if isinstance(element, Join):
        return element.owner, element.label, element.number
    return "", element.name, 1


def location_of(flow: Flow, node: FlowNode) -> ValueLocation:
    """Where a node's value is while the model runs."""
    owner = node.frame.path if node.frame is not None else ""
    if node.module is not None:
        inner = node.frame is not None and node.module is node.frame.module and is_norm_act(node.module)
        return ValueLocation(owner, NORM if inner else node.label, node.number)
    if node.label not in SUMS:
        by_hand = node.act is not None and node.act.function != node.label.rstrip("_")
        number = flow.recording.facts[node.origin].number if by_hand else node.number
        return ValueLocation(
            owner, f"{node.label}()", number
        )  # of a product, which parameters have, too: all are counted
    sums = [at for at, other in enumerate(flow.nodes) if other.frame is node.frame and _is_sum(other)]
    return ValueLocation(owner, SUM, sums.index(node.index) + 1, len(sums))


def _is_sum(node: FlowNode) -> bool:
    return node.module is None and node.label in SUMS


def _key_of(act: ActCall) -> tuple[Called, int]:
    return (act.frame.path, act.name, act.function), act.call


def is_plain_sum(node: FlowNode) -> bool:
    """Whether it adds its operands as they are, without alpha."""
    return node.op is Op.ADD and node.label in SUMS and not node.origin.kwargs


class _Way:
    """The same for one flow."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self._nodes = flow.nodes
        self._readers = flow.all_readers()
        self.where: dict[tuple[str, str, int], int] = {}
        for node in self._nodes:
            if node.op is Op.ADD and node.frame is not None:
                self.where[node.frame.path, node.label, node.number] = node.index
            if node.op in (Op.CONV, Op.NORM, Op.PAD, Op.PASS, Op.DROP):
                self.where["", node.name, 1] = node.index
        self._forwards = Counter(frame.path for frame in flow.frames)

    def spot(self, index: int) -> ValueLocation:
        return location_of(self._flow, self._nodes[index])

    def after(self, index: int) -> Iterator[Use]:
        while True:
            reader = self._reader(index)
            if reader is None:
                return
            if reader.op in (Op.PASS, Op.DROP) and reader.inputs == [index]:
                pass
            elif is_plain_sum(reader) and reader.inputs.count(index) == 1 and self._is_seen(reader):
                yield Use("sum", self.spot(reader.index))
            elif reader.op is Op.ACT and reader.act is not None and self._is_seen(reader):
                yield Use("act", self.spot(reader.index), _key_of(reader.act))
            else:
                return
            index = reader.index

    def read_by(self, index: int) -> tuple[Called, int] | None:
        while self._nodes[index].inputs:
            node = self._nodes[self._nodes[index].inputs[0]]
            if node.op is Op.ACT and node.act is not None:
                return _key_of(node.act)
            if node.op not in (Op.NORM, Op.PAD, Op.PASS, Op.DROP) or len(node.inputs) != 1:
                return None
            index = node.index
        return None

    def inside(self, index: int) -> Iterator[tuple[Called, int]]:
        behind = [self._made_from(source) for source in self._nodes[index].inputs]
        shared = {at for at in set.intersection(*behind) if self._nodes[at].op is not Op.PARAM}
        fork = max(shared, default=-1)
        for at in sorted(set.union(*behind)):
            act = self._nodes[at].act
            if at > fork and act is not None:
                yield _key_of(act)

    def _made_from(self, index: int) -> set[int]:
        """The node and all that it was made from."""
        found, todo = {index}, [index]
        while todo:
            node = self._nodes[todo.pop()]
            new = {*node.inputs, *node.sides} - found
            found |= new
            todo += new
        return found

    def _reader(self, index: int) -> FlowNode | None:
        """The only reader of a value."""
        if len(self._readers[index]) != 1 or self._nodes[index].exposed:
            return None
        reader = self._nodes[self._readers[index][0]]
        return None if reader.sides or reader.frame is None else reader

    def _is_seen(self, node: FlowNode) -> bool:
        """Whether the call can be told apart while the model runs."""
        if node.frame is None or self._forwards[node.frame.path] != 1:
            return False
        return node.module is not None or node.label in SUMS or node.op is Op.ACT
