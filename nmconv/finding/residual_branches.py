"""Residual branches: what is added to a value that goes past it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from nmconv.finding.analysis import Called, flows_of
from nmconv.finding.def_use import ValueLocation, is_plain_sum, location_of
from nmconv.flow import Flow, Op, recordings_of, sums_must_copy
from nmconv.planning import Branch, Sum

__all__ = ["Residual", "copied_sums", "residuals"]


@dataclass(frozen=True)
class Residual:
    """A branch that is added to its own input, and nothing else reads.

    Attributes:
        branch: As a plan names it.
        acts: Its activation calls: who calls, name and kind of function, and which call of it in one forward.
        spot: The sum.
        position: Of the sum in the order of execution.
    """

    branch: Branch
    acts: tuple[tuple[Called, int], ...]
    spot: ValueLocation
    position: int


def residuals(model: nn.Module, example_inputs: Any = None) -> tuple[Residual, ...]:
    """All residual branches with a convolution in them, in eval mode, in order of execution."""
    flows = flows_of(model, recordings_of(model, example_inputs, both_sizes=False))
    return tuple(found for flow in flows for found in _of_flow(flow))


def _of_flow(flow: Flow) -> tuple[Residual, ...]:
    nodes, readers = flow.nodes, flow.all_readers()
    found = []
    for node in nodes:
        plain = is_plain_sum(node) and len(node.inputs) == len(node.origin.args) == 2
        if not plain or node.frame is None or (node.frame.parent is None and node.method != "forward"):
            continue
        for keep in (0, 1):
            value = node.inputs[keep]
            while nodes[value].op in (Op.PASS, Op.DROP) and len(nodes[value].inputs) == 1:
                value = nodes[value].inputs[0]
            inside = _between(value, node.inputs[1 - keep], nodes, readers, node.index)
            convs = tuple(nodes[at].name for at in sorted(inside) if nodes[at].op is Op.CONV)
            if not convs:
                continue
            acts = tuple(
                ((act.frame.path, act.name, act.function), act.call)
                for at in sorted(inside)
                if (act := nodes[at].act) is not None
            )
            summed = Sum(node.frame.path, node.label, node.number, keep)
            found.append(Residual(Branch(summed, convs), acts, location_of(flow, node), node.index))
            break
    return tuple(found)


def copied_sums(flows: Iterable[Flow], sums: Iterable[Sum]) -> frozenset[Sum]:
    """Those sums of a model in whose place a copy of the operand must be left, lest two readers share memory."""
    wanted = {(each.owner, each.label, each.number): each for each in sums}
    found: set[Sum] = set()
    for flow in flows if wanted else ():
        kept = {}
        for node in flow.nodes:
            each = None if node.frame is None else wanted.get((node.frame.path, node.label, node.number))
            if each is not None and is_plain_sum(node) and len(node.inputs) == 2:
                kept[node.index] = each
        copies = sums_must_copy(flow, {at: flow.nodes[at].inputs[each.keep] for at, each in kept.items()})
        found |= {kept[at] for at in copies}
    return frozenset(found)


def _between(start: int, end: int, nodes: Any, readers: list[list[int]], reader: int) -> set[int]:
    """All nodes from ``start`` (left out) to ``end``; empty where something else comes in or goes out."""
    inside: set[int] = set()
    todo = [end]
    while todo:
        at = todo.pop()
        if at == start or at in inside or nodes[at].op is Op.PARAM:
            continue
        if not nodes[at].inputs or at < start:
            return set()
        inside.add(at)
        todo += [*nodes[at].inputs, *nodes[at].sides]
    outside = {user for at in inside for user in readers[at]} - inside - {reader}
    return set() if outside else inside
