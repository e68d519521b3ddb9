"""Which activation call in train mode is the same as which in eval mode."""

from __future__ import annotations

from typing import Any

from nmconv.flow import Flow, FlowNode, Op

__all__ = ["local_hashes"]

_PASSED = {Op.DROP, Op.PASS, Op.SCALE, Op.LAYOUT, Op.ADD, Op.GATED, Op.NORM, Op.PAD}


def local_hashes(flow: Flow, *, near: bool = False) -> dict[int, int]:
    """For every activation a hash of what its owner's forward has done to get its input.

    The same in eval and in train mode for the same call, whatever calls of the same module come before: dropout and
    identities are passed over, values from outside the forward are all alike. With ``near`` only what comes right
    before the call counts, back to the next layer.
    """
    result: dict[int, int] = {}
    for node in flow.nodes:
        if node.op is not Op.ACT or node.act is None:
            continue
        start = _first_index(flow, node)
        memo: dict[int, int] = {}

        def local(index: int, start: int = start, memo: dict[int, int] = memo) -> int:
            stack = [index]
            while stack:
                at = stack[-1]
                if at in memo:
                    stack.pop()
                    continue
                current = flow.nodes[at]
                sources = [source for source in (*current.inputs, *current.sides) if source >= start]
                if near and at != index and current.op not in _PASSED:
                    sources = []
                missing = [source for source in sources if source not in memo]
                if missing and at >= start:
                    stack += missing
                    continue
                if at < start:
                    memo[at] = 0
                elif (current.op in (Op.DROP, Op.PASS) or (near and current.op is Op.SCALE)) and sources:
                    memo[at] = memo[sources[0]]
                else:
                    name = current.name.partition("#")[0] if current.op is not Op.ACT else current.kind
                    memo[at] = hash((current.op.name, name, tuple(memo[source] for source in sources)))
                stack.pop()
            return memo[index]

        result[node.index] = local(node.index)
    return result


def _first_index(flow: Flow, node: FlowNode) -> int:
    """The first flow node made within the frame that calls the activation."""
    frame = node.act.frame  # type: ignore[union-attr]
    low = node.index
    while low > 0 and _within(flow.nodes[low - 1], frame):
        low -= 1
    return low


def _within(node: FlowNode, frame: Any) -> bool:
    at = node.frame
    while at is not None and at is not frame:
        at = at.parent
    return at is frame or node.op is Op.PARAM
