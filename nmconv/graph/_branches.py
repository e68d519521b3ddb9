"""Residual branches: what is added to a value that goes past it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from nmconv.graph._alias import sums_must_copy
from nmconv.graph._analysis import Called, trace_parts
from nmconv.graph._lower import lower
from nmconv.graph._ops import SUMS, Op
from nmconv.graph._takes import takes_of
from nmconv.graph._tracer import FlowTracer
from nmconv.graph._ways import Spot, is_plain_sum, spot_of
from nmconv.planning import Branch, Sum

__all__ = ["Residual", "residuals"]


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
    spot: Spot
    position: int


def residuals(model: nn.Module, example_inputs: Any = None) -> tuple[Residual, ...]:
    """All residual branches with a convolution in them, in eval mode, in order of execution."""
    analysis = trace_parts(model, False, example_inputs, None, _of_trace)
    return tuple(found for part in analysis.traced for found in part)


def _of_trace(tracer: FlowTracer) -> tuple[Residual, ...]:
    flow = lower(tracer, linear=False)
    nodes = flow.nodes
    readers: list[set[int]] = [set() for _ in nodes]
    for node in nodes:
        for source in {*node.inputs, *node.sides}:
            readers[source].add(node.index)
    found = []
    for node in nodes:
        plain = is_plain_sum(node) and node.label in SUMS and node.frame is not None
        plain = plain and len(node.inputs) == len(node.origin.args) == 2
        if not plain or node.origin.op == "call_module" or tracer.methods.get(node.origin, "forward") != "forward":
            continue
        assert node.frame is not None
        for keep in (0, 1):
            value = node.inputs[keep]
            while nodes[value].op in (Op.PASS, Op.DROP) and len(nodes[value].inputs) == 1:
                value = nodes[value].inputs[0]
            inside = _between(value, node.inputs[1 - keep], nodes, readers, node.index)
            convs = tuple(nodes[at].name for at in sorted(inside) if nodes[at].op is Op.CONV)
            if not convs:
                continue
            calls = [tracer.given] if node.frame.parent is None else tracer.completed.get(node.frame.path, [])
            takes = "" if node.frame.path in tracer.odd else takes_of(calls)
            acts = tuple(
                ((act.frame.path, act.name, act.function), act.call)
                for at in sorted(inside)
                if (act := nodes[at].act) is not None
            )
            summed = Sum(node.frame.path, takes, node.label, node.number, keep)
            found.append(Residual(Branch(summed, convs), acts, spot_of(tracer, node), node.index))
            break
    kept = {part.position: nodes[part.position].inputs[part.branch.sum.keep] for part in found}
    copies = sums_must_copy(flow, kept)
    return tuple(
        replace(part, branch=replace(part.branch, sum=replace(part.branch.sum, copy=part.position in copies)))
        for part in found
    )


def _between(start: int, end: int, nodes: Any, readers: list[set[int]], reader: int) -> set[int]:
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
