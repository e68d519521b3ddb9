"""Sums of values: flattening them, and folding parallel convolution branches (RepVGG) into one convolution."""

from __future__ import annotations

from nmconv.flow.flow_graph import Flow
from nmconv.flow.ops import Op

__all__ = ["fold_parallel", "summands"]

_IDENTITIES = {Op.DROP, Op.PASS}
_LINEAR = {Op.NORM, Op.DROP, Op.PASS, Op.SCALE}
_BEFORE_CONV = {Op.PAD, Op.PASS, Op.DROP}


def summands(flow: Flow, add: int) -> list[int]:
    """Return the operands of a sum; a sum among them that has no other reader is replaced by its operands."""
    return _flatten(flow, add)[0]


def fold_parallel(flow: Flow) -> None:
    """Turn every sum of two or more single convolutions of one value (and that value itself) into one CONV.

    ``conv(x) + x`` alone stays a residual join. Relinks the flow.
    """
    for node in reversed(flow.nodes):
        if node.op is Op.ADD and flow.main[node.index]:
            _fold(flow, node.index)
    flow.link()


def _fold(flow: Flow, add: int) -> None:
    operands, folded = _flatten(flow, add)
    sources, convs = set(), []
    for operand in operands:
        end, passed = _path_up(flow, operand, _LINEAR)
        folded += passed
        if flow.nodes[end].op is Op.CONV and flow.single(end):
            convs.append(end)
            source, passed = _path_up(flow, flow.nodes[end].inputs[0], _BEFORE_CONV)
            folded += passed
            sources.add(source)
        else:
            sources.add(end)
    if len(convs) < 2 or len(sources) != 1:
        return
    node = flow.nodes[add]
    node.op = Op.CONV
    parts = [flow.nodes[conv] for conv in sorted(convs)]
    node.members = tuple(name for part in parts for name in part.members or (part.name,))
    node.inputs = list(sources)
    for index in (*folded, *convs):
        flow.nodes[index].op = Op.DEAD


def _flatten(flow: Flow, add: int) -> tuple[list[int], list[int]]:
    """Return the operands of a flattened sum, and the inner sums and identities that are flattened away."""
    operands: list[int] = []
    flattened: list[int] = []
    for operand in flow.nodes[add].inputs:
        end, passed = _path_up(flow, operand, _IDENTITIES)
        if flow.nodes[end].op is Op.ADD and flow.single(end):
            inner_operands, inner = _flatten(flow, end)
            operands += inner_operands
            flattened += [*passed, end, *inner]
        else:
            operands.append(operand)
    return operands, flattened


def _path_up(flow: Flow, index: int, through: set[Op]) -> tuple[int, list[int]]:
    """Return the first value, from ``index`` up, whose kind is not in ``through`` or that has several readers.

    Returns:
        The value, and those that were passed on the way.
    """
    passed = []
    while flow.nodes[index].op in through and flow.single(index):
        passed.append(index)
        index = flow.nodes[index].inputs[0]
    return index, passed
