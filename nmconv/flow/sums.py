"""Sums of values: flattening them, and folding parallel convolution branches (RepVGG) into one convolution."""

from __future__ import annotations

from nmconv.flow.flow_graph import Flow
from nmconv.flow.ops import Op

__all__ = ["fold_parallel", "summands"]

_QUIET = {Op.DROP, Op.PASS}
_LINEAR = {Op.NORM, Op.DROP, Op.PASS, Op.SCALE}
_BEFORE = {Op.PAD, Op.PASS, Op.DROP}


def summands(flow: Flow, add: int) -> list[int]:
    """The operands of a sum, with sums of sums that nobody else reads taken apart."""
    found = []
    for operand in flow.nodes[add].inputs:
        at = operand
        while flow.nodes[at].op in _QUIET and flow.single(at):
            at = flow.nodes[at].inputs[0]
        if flow.nodes[at].op is Op.ADD and flow.single(at):
            found += summands(flow, at)
        else:
            found.append(operand)
    return found


def fold_parallel(flow: Flow) -> None:
    """Make one CONV of every sum of two or more single convolutions of the same value (and that value itself).

    ``conv(x) + x`` alone is a residual join and stays one. Relinks the flow.
    """
    for node in reversed(flow.nodes):
        if node.op is Op.ADD and flow.main[node.index]:
            _fold(flow, node.index)
    flow.link()


def _fold(flow: Flow, add: int) -> None:
    sources, convs, inside = set(), [], []
    for operand in summands(flow, add):
        end, passed = _up(flow, operand, _LINEAR)
        inside += passed
        if flow.nodes[end].op is Op.CONV and flow.single(end):
            convs.append(end)
            start, before = _up(flow, flow.nodes[end].inputs[0], _BEFORE)
            inside += before
            sources.add(start)
        else:
            sources.add(end)
    if len(convs) < 2 or len(sources) != 1:
        return
    node = flow.nodes[add]
    folded = [*convs, *inside, *_sums(flow, add)]
    node.op = Op.CONV
    folded_convs = [flow.nodes[conv] for conv in sorted(convs)]
    node.members = tuple(name for conv in folded_convs for name in conv.members or (conv.name,))
    node.inputs = list(sources)
    for index in folded:
        flow.nodes[index].op = Op.DEAD


def _sums(flow: Flow, add: int) -> list[int]:
    """The sums and what passes between them that a flattened sum is made of, itself not included."""
    found = []
    for operand in flow.nodes[add].inputs:
        at = operand
        between = []
        while flow.nodes[at].op in _QUIET and flow.single(at):
            between.append(at)
            at = flow.nodes[at].inputs[0]
        if flow.nodes[at].op is Op.ADD and flow.single(at):
            found += [*between, at, *_sums(flow, at)]
    return found


def _up(flow: Flow, index: int, through: set[Op]) -> tuple[int, list[int]]:
    """Up from a value through operations that only it reads, and what was passed."""
    passed = []
    while flow.nodes[index].op in through and flow.single(index):
        passed.append(index)
        index = flow.nodes[index].inputs[0]
    return index, passed
