"""Gates: which operand of a product or sum only modulates the other."""

from __future__ import annotations

from math import prod

from nmconv.flow.flow_graph import Flow, FlowNode
from nmconv.flow.ops import Op

__all__ = ["resolve_gates"]

_THROUGH = {Op.LAYOUT, Op.PASS, Op.SCALE, Op.PAD, Op.DROP, Op.POOL}
# These keep a full-sized map full-sized; after anything else a shape may be smaller than it looks.
_KEEPS_EXTENT = {Op.CONV, Op.NORM, Op.ACT, Op.DROP, Op.PASS, Op.PAD, Op.SCALE, Op.POOL, Op.GATED, Op.BOUNDED}


def resolve_gates(flow: Flow) -> None:
    """Turn every product (or sum) with a gate into GATED with the main path as input and the gate at its side.

    A gate is the bounded operand (sigmoid, softmax, ...), else the one that is broadcast; for a product with neither,
    the activation that feeds it directly. Shapes are looked at only where the kinds of operation leave it open.
    Sets the flow's readers.
    """
    full = [False] * len(flow.nodes)
    for node in flow.nodes:
        if node.op in (Op.ADD, Op.MUL) and len(node.inputs) > 1:
            _resolve(flow, node, full)
        if node.op is Op.INPUT:
            full[node.index] = node.index == 0
        elif node.op in _KEEPS_EXTENT:
            full[node.index] = bool(node.inputs) and full[node.inputs[0]]
        elif node.op is Op.ADD:
            full[node.index] = any(full[source] for source in node.inputs)
    flow.link()


def _resolve(flow: Flow, node: FlowNode, full: list[bool]) -> None:
    operands = node.inputs
    bounded = [source for source in operands if _is_bounded(flow, source)]
    if len(bounded) == 1:
        gates = bounded
    elif all(full[source] for source in operands):
        gates = []
    else:
        gates = _broadcast(flow, node)
        if not gates and len(bounded) == len(operands) and node.op is Op.MUL:
            gates = bounded[1:]
    if not gates:
        by_hand = [source for source in operands if _is_hard_sigmoid(flow, source)]
        gates = by_hand if len(by_hand) < len(operands) else []
    if not gates and node.op is Op.MUL:
        acting = [source for source in operands if _activation_behind(flow, source) is not None]
        for source in acting:
            behind = _activation_behind(flow, source)
            assert behind is not None
            flow.nodes[behind].why = "gate: it feeds a product directly"
        if len(acting) < len(operands) and acting:
            # the branch stays on the main path; only the activation is the gate
            node.op = Op.GATED
            node.inputs = [source for source in operands if source not in acting] + acting
        else:
            node.op = Op.OTHER
        return
    if gates:
        node.op = Op.GATED
        node.inputs = [source for source in operands if source not in gates]
        node.sides = [*node.sides, *gates]


def _is_bounded(flow: Flow, index: int) -> bool:
    node = flow.nodes[index]
    while node.op in _THROUGH and len(node.inputs) == 1:
        node = flow.nodes[node.inputs[0]]
    return node.op is Op.BOUNDED


def _is_hard_sigmoid(flow: Flow, index: int) -> bool:
    """Whether the value is a scaled ReLU6: a hard sigmoid written by hand, bounded though made of an activation."""
    node, scaled = flow.nodes[index], False
    while node.op in _THROUGH and len(node.inputs) == 1:
        scaled |= node.op is Op.SCALE
        node = flow.nodes[node.inputs[0]]
    return scaled and node.op is Op.ACT and node.kind == "ReLU6"


def _activation_behind(flow: Flow, index: int) -> int | None:
    node = flow.nodes[index]
    while node.op in (Op.LAYOUT, Op.PASS, Op.DROP) and len(node.inputs) == 1:
        node = flow.nodes[node.inputs[0]]
    return node.index if node.op is Op.ACT else None


def _broadcast(flow: Flow, node: FlowNode) -> list[int]:
    """The operands with fewer elements than the result."""
    if node.shape is None:
        return []
    shapes = {source: flow.nodes[source].shape for source in node.inputs}
    result = prod(node.shape)
    gates = [source for source, shape in shapes.items() if shape is not None and prod(shape) < result]
    return gates if len(gates) < len(shapes) else []
