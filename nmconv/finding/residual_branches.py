"""Find residual branches: computations that are added to their own input."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from nmconv.finding.def_use import CallKey, ValueLocation, call_key, is_plain_sum, location_of
from nmconv.finding.flow_analysis import eval_flows
from nmconv.flow import Flow, FlowNode, Op, sums_must_copy
from nmconv.planning import Branch, ReplacedSum

__all__ = ["Residual", "copied_sums", "residuals"]


@dataclass(frozen=True)
class Residual:
    """A branch that is added to its own input and has no other reader.

    Attributes:
        branch: The branch, as a plan names it.
        acts: Its activation calls.
        location: Location of the sum.
        position: Position of the sum in the order of execution.
    """

    branch: Branch
    acts: tuple[CallKey, ...]
    location: ValueLocation
    position: int


def residuals(model: nn.Module, example_inputs: Any = None) -> tuple[Residual, ...]:
    """Return all residual branches that hold a convolution, in eval mode, in order of execution.

    Args:
        model: Not modified.
        example_inputs: What it is called with, or None; only structure and shapes are used.
    """
    return tuple(residual for flow in eval_flows(model, example_inputs) for residual in _residuals_of_flow(flow))


def _residuals_of_flow(flow: Flow) -> Iterator[Residual]:
    readers = flow.all_readers()
    for node in flow.nodes:
        plain = is_plain_sum(node) and len(node.inputs) == len(node.origin.args) == 2
        if not plain or node.frame is None or (node.frame.parent is None and node.method != "forward"):
            continue
        for keep in (0, 1):
            inside = sorted(_branch_nodes(flow.nodes, readers, node, keep))
            convs = tuple(flow.nodes[index].name for index in inside if flow.nodes[index].op is Op.CONV)
            if convs:
                acts = tuple(call_key(act) for index in inside if (act := flow.nodes[index].act) is not None)
                add = ReplacedSum(node.frame.path, node.label, node.number, keep)
                yield Residual(Branch(add, convs), acts, location_of(flow, node), node.index)
                break


def _branch_nodes(nodes: Sequence[FlowNode], readers: list[list[int]], add: FlowNode, keep: int) -> set[int]:
    """Return the nodes of the branch that is added to operand ``keep``.

    The set is empty if the branch reads anything besides that operand and parameters, or has another reader than the
    sum.
    """
    start = add.inputs[keep]
    while nodes[start].op in (Op.PASS, Op.DROP) and len(nodes[start].inputs) == 1:
        start = nodes[start].inputs[0]
    inside: set[int] = set()
    todo = [add.inputs[1 - keep]]
    while todo:
        index = todo.pop()
        if index == start or index in inside or nodes[index].op is Op.PARAM:
            continue
        if not nodes[index].inputs or index < start:
            return set()
        inside.add(index)
        todo += [*nodes[index].inputs, *nodes[index].side_inputs]
    outside = {reader for index in inside for reader in readers[index]} - inside - {add.index}
    return set() if outside else inside


def copied_sums(flows: Iterable[Flow], sums: Iterable[ReplacedSum]) -> frozenset[ReplacedSum]:
    """Return the sums that a copy of the kept operand must replace, or two readers would share memory.

    Args:
        flows: Of the model.
        sums: Sums of the model that one operand is to replace.
    """
    wanted = {(add.owner, add.label, add.number): add for add in sums}
    copied: set[ReplacedSum] = set()
    for flow in flows if wanted else ():
        sum_at = {}
        for node in flow.nodes:
            add = None if node.frame is None else wanted.get((node.frame.path, node.label, node.number))
            if add is not None and is_plain_sum(node) and len(node.inputs) == 2:
                sum_at[node.index] = add
        copies = sums_must_copy(flow, {index: flow.nodes[index].inputs[add.keep] for index, add in sum_at.items()})
        copied |= {sum_at[index] for index in copies}
    return frozenset(copied)
