"""Gates: which operand of a product or sum only modulates the other."""

from __future__ import annotations

from math import prod

from nmconv.flow.flow_graph import Flow, FlowNode
from nmconv.flow.ops import Op

__all__ = ["resolve_gates"]

# What may lie between a bounded function and the product that it gates.
_TRANSPARENT = {Op.LAYOUT, Op.PASS, Op.SCALE, Op.PAD, Op.DROP, Op.POOL}
# These keep a full-sized map full-sized; after anything else, a value may broadcast.
_KEEPS_EXTENT = {Op.CONV, Op.NORM, Op.ACT, Op.DROP, Op.PASS, Op.PAD, Op.SCALE, Op.POOL, Op.GATED, Op.BOUNDED}


def resolve_gates(flow: Flow) -> None:
    """Turn every gated product or sum into GATED, with the main path in its inputs and the gate in its side inputs.

    The gate is the bounded operand (sigmoid, softmax, ...), or else the operand that is broadcast. In a product with
    neither, it is the activation that feeds the product directly. Shapes are consulted only where the kinds of
    operation do not decide. The flow is linked.
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
    gates = _gates(flow, node, full)
    if gates:
        node.op = Op.GATED
        node.side_inputs = [*node.side_inputs, *gates]
        node.inputs = [source for source in node.inputs if source not in gates]
    elif node.op is Op.MUL:
        _gate_by_activation(flow, node)


def _gates(flow: Flow, node: FlowNode, full: list[bool]) -> list[int]:
    """Return the bounded or broadcast operands of a product or sum, which leave at least one other operand."""
    operands = node.inputs
    bounded = [source for source in operands if _is_bounded(flow, source)]
    if len(bounded) == 1:
        return bounded
    gates: list[int] = []
    if not all(full[source] for source in operands):
        gates = _broadcast_operands(flow, node)
        if not gates and len(bounded) == len(operands) and node.op is Op.MUL:
            gates = bounded[1:]
    if not gates:
        hard_sigmoids = [source for source in operands if _is_hard_sigmoid(flow, source)]
        gates = hard_sigmoids if len(hard_sigmoids) < len(operands) else []
    return gates


def _gate_by_activation(flow: Flow, node: FlowNode) -> None:
    """Make the activations that feed a product directly its gates; their branches stay on the main path."""
    activated = []
    for source in node.inputs:
        *_, producer = _path_up(flow, source, {Op.LAYOUT, Op.PASS, Op.DROP})
        if producer.op is Op.ACT:
            producer.why = "gate: it feeds a product directly"
            activated.append(source)
    if activated and len(activated) < len(node.inputs):
        node.op = Op.GATED
        node.inputs = [source for source in node.inputs if source not in activated] + activated
    else:
        node.op = Op.OTHER


def _is_bounded(flow: Flow, index: int) -> bool:
    *_, producer = _path_up(flow, index, _TRANSPARENT)
    return producer.op is Op.BOUNDED


def _is_hard_sigmoid(flow: Flow, index: int) -> bool:
    """Return whether the value is a scaled ReLU6: a handwritten hard sigmoid, bounded though made of an activation."""
    *passed, producer = _path_up(flow, index, _TRANSPARENT)
    scaled = any(node.op is Op.SCALE for node in passed)
    return scaled and producer.op is Op.ACT and producer.kind == "ReLU6"


def _path_up(flow: Flow, index: int, through: set[Op]) -> list[FlowNode]:
    """Return the value and its producers, up to the first that is not in ``through`` or has several inputs."""
    path = [flow.nodes[index]]
    while path[-1].op in through and len(path[-1].inputs) == 1:
        path.append(flow.nodes[path[-1].inputs[0]])
    return path


def _broadcast_operands(flow: Flow, node: FlowNode) -> list[int]:
    """Return the operands with fewer elements than the result; none if that is all of them."""
    if node.shape is None:
        return []
    shapes = {source: flow.nodes[source].shape for source in node.inputs}
    size = prod(node.shape)
    smaller = [source for source, shape in shapes.items() if shape is not None and prod(shape) < size]
    return smaller if len(smaller) < len(shapes) else []
