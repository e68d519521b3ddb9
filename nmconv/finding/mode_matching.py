"""Compare a model's flows in eval and train mode, and match their activation calls."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from nmconv.flow import Flow, FlowNode, ModuleCall, Op, ancestors, is_norm_act

__all__ = ["differing_modules", "local_hashes", "same_flows"]

_BETWEEN_LAYERS = {Op.DROP, Op.PASS, Op.SCALE, Op.LAYOUT, Op.ADD, Op.GATED, Op.NORM, Op.PAD}


def same_flows(first: Sequence[Flow], second: Sequence[Flow]) -> bool:
    """Return whether the flows of two modes are the same, node by node."""
    return len(first) == len(second) and all(
        list(map(_facts_of, one.nodes)) == list(map(_facts_of, other.nodes))
        for one, other in zip(first, second, strict=True)
    )


def _facts_of(node: FlowNode) -> tuple[Any, ...]:
    path = node.frame.path if node.frame is not None else ""
    call = node.op, node.name, node.kind, node.number, node.method, path, node.lines, node.shape
    return *call, node.inputs, node.side_inputs, node.exposed, node.inplace, node.view, node.partial


def differing_modules(first: Iterable[Flow], second: Iterable[Flow]) -> set[str]:
    """Return the names of modules that run in both modes but make other calls in one than in the other."""
    one, other = _calls_by_module(first), _calls_by_module(second)
    return {path for path, calls in one.items() if path in other and other[path] != calls}


def _calls_by_module(flows: Iterable[Flow]) -> dict[str, list[tuple[str, int]]]:
    calls: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for flow in flows:
        for node in flow.nodes:
            if node.frame is not None and node.op is not Op.PARAM and not is_norm_act(node.frame.module):
                calls[node.frame.path].append((node.label, node.number))
    return calls


def local_hashes(flow: Flow, *, near: bool = False) -> dict[int, int]:
    """Return for each activation a hash of how its owner's forward computes its input.

    The hash of a call is the same in eval and train mode, whatever other calls of the same module precede it: dropout
    and identities are ignored, and so are values that come from outside the forward.

    Args:
        flow: Any flow.
        near: Whether to hash only what lies between the call and the last layers before it.
    """
    return {
        node.index: _local_hash(flow, node, node.act.frame, near=near)
        for node in flow.nodes
        if node.op is Op.ACT and node.act is not None
    }


def _local_hash(flow: Flow, activation: FlowNode, frame: ModuleCall, *, near: bool) -> int:
    first = _first_index(flow, activation, frame)
    ignored = {Op.DROP, Op.PASS, Op.SCALE} if near else {Op.DROP, Op.PASS}
    hashes: dict[int, int] = {}
    stack = [activation.index]
    while stack:
        node = flow.nodes[stack[-1]]
        sources = [source for source in (*node.inputs, *node.side_inputs) if source >= first]
        if near and node is not activation and node.op not in _BETWEEN_LAYERS:
            sources = []
        missing = [source for source in sources if source not in hashes]
        if missing:
            stack += missing
            continue
        if node.op in ignored and sources:
            hashes[node.index] = hashes[sources[0]]
        else:
            name = node.kind if node.op is Op.ACT else node.name.partition("#")[0]
            hashes[node.index] = hash((node.op.name, name, tuple(hashes[source] for source in sources)))
        stack.pop()
    return hashes[activation.index]


def _first_index(flow: Flow, activation: FlowNode, frame: ModuleCall) -> int:
    """Return the first of the consecutive nodes up to an activation that are computed within a frame."""
    first = activation.index
    while first > 0 and _is_within(flow.nodes[first - 1], frame):
        first -= 1
    return first


def _is_within(node: FlowNode, frame: ModuleCall) -> bool:
    return node.op is Op.PARAM or any(each is frame for each in ancestors(node.frame))
