"""Which activations must leave a copy when they go: where readers would come to share memory that is overwritten."""

from __future__ import annotations

from nmconv.graph._flow import Flow
from nmconv.graph._ops import Op

__all__ = ["must_copy"]

# Their output is not needed for their own gradient, so overwriting it harms nobody.
_FREE = {Op.CONV, Op.LINEAR, Op.NORM, Op.ADD, Op.SCALE, Op.POOL}


def must_copy(flow: Flow) -> set[int]:
    """Indices of out-of-place activations whose identity must copy.

    Decided for each alone, as if every other one went too (a dropped activation hands its memory on) and as if every
    in-place one stayed (it overwrites): whatever a plan drops, the answer is safe.
    """
    readers: list[list[int]] = [[] for _ in flow.nodes]
    for node in flow.nodes:
        for source in {*node.inputs, *node.sides}:
            readers[source].append(node.index)
    return {
        node.index
        for node in flow.nodes
        if node.op is Op.ACT
        and not node.inplace
        and (_not_dense(flow, node.index) or _hazard(flow, readers, node.index))
    }


def _shares(flow: Flow, index: int) -> bool:
    node = flow.nodes[index]
    return node.op is Op.ACT or node.view or node.partial


def _not_dense(flow: Flow, act: int) -> bool:
    """Whether the activation's input may be a slice or an expansion, of which its output was a dense copy."""
    at = flow.nodes[act].inputs[0]
    while flow.nodes[at].inputs and flow.nodes[at].op in (Op.PASS, Op.DROP, Op.ACT):
        at = flow.nodes[at].inputs[0]
    return flow.nodes[at].op is Op.LAYOUT or flow.nodes[at].partial


def _hazard(flow: Flow, readers: list[list[int]], act: int) -> bool:
    origin = act  # where the memory comes from, if the activation hands its input on
    while _shares(flow, origin) and flow.nodes[origin].inputs:
        origin = flow.nodes[origin].inputs[0]
    family, below = _family_of(flow, readers, origin), _family_of(flow, readers, act)
    outside = [
        reader
        for member in family - below
        for reader in readers[member]
        if reader not in family or flow.nodes[reader].op is Op.OUTPUT
    ]
    writes = [member for member in family if member > act and flow.nodes[member].inplace]
    writes += [reader for member in family for reader in readers[member] if reader > act and flow.nodes[reader].opaque]
    aside = any(write not in below and not set(flow.nodes[write].inputs) & below for write in writes)
    returned = any(flow.nodes[reader].op is Op.OUTPUT for member in below for reader in readers[member])
    others_returned = any(flow.nodes[reader].op is Op.OUTPUT for reader in outside)
    source = flow.nodes[origin].op
    if aside or (writes and (outside or source not in _FREE)):
        return True
    return returned and (others_returned or source in (Op.INPUT, Op.PARAM))


def _family_of(flow: Flow, readers: list[list[int]], origin: int) -> set[int]:
    """All values that may share memory with ``origin`` and come from it."""
    family, todo = {origin}, [origin]
    while todo:
        for reader in readers[todo.pop()]:
            first = flow.nodes[reader].inputs[:1]
            if reader not in family and first and first[0] in family and _shares(flow, reader):
                family.add(reader)
                todo.append(reader)
    return family
