"""The trace held against a recording: which calls there are, and which of them each one's input comes from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch.fx import Node

from nmconv.graph._flow import Flow, FlowNode
from nmconv.graph._ops import ACT_KINDS, Op
from nmconv.recording import Fact, Recording

__all__ = ["disagreement"]

_Step = tuple[str, str]  # the module that calls, and what it calls


def disagreement(
    flows: list[Flow], recording: Recording, norm_acts: frozenset[str], quiet: frozenset[str]
) -> tuple[str, str]:
    """Where the model's traces show another step than a recording of the same mode: the module, and what, in words.

    Compared are the calls of leaves and activations, and for each the calls that its input comes from.

    Args:
        flows: Of the whole model in one mode, before anything was folded in them.
        recording: Of the model in that mode.
        norm_acts: Names of norms with an activation inside, which a trace takes for one call each.
        quiet: Names of modules that hand on what they are given: identities, dropout.
    """
    traced = Counter(step for flow in flows for step in _traced(flow, quiet))
    recorded = Counter(_recorded(recording, norm_acts, quiet))
    for steps, others, said in ((recorded, traced, "makes"), (traced, recorded, "does not make")):
        for (step, sources), times in steps.items():
            if others[step, sources] < times:
                place = f"{step[0] or 'the model'}: {step[1]}"
                behind = ", ".join(sorted({source[1] for source in sources})) or "an input"
                text = f"called in earnest, it {said} the call {place} behind {behind}, which tracing shows otherwise"
                return step[0], text
    return "", ""


def _traced(flow: Flow, quiet: frozenset[str]) -> Iterator[tuple[_Step, frozenset[_Step]]]:
    behind: dict[int, frozenset[_Step]] = {}
    for node in flow.nodes:
        sources = frozenset[_Step]().union(*(behind[index] for index in (*node.inputs, *node.sides) if index in behind))
        step = _traced_step(node)
        if step is None or node.name in quiet:
            behind[node.index] = sources
            continue
        behind[node.index] = frozenset([step])
        yield step, sources


def _traced_step(node: FlowNode) -> _Step | None:
    if node.op is Op.PARAM:
        return None
    if node.act is not None:
        return node.act.frame.path, node.act.function or node.name
    if node.origin.op == "call_module" and node.frame is not None:
        return node.frame.path, node.name
    return None


def _recorded(
    recording: Recording, norm_acts: frozenset[str], quiet: frozenset[str]
) -> Iterator[tuple[_Step, frozenset[_Step]]]:
    behind: dict[Node, frozenset[_Step]] = {}
    normed: set[int] = set()  # frames of norms with an activation inside that have begun
    order: dict[Node, int] = {}
    fixed: set[Node] = set()
    for node, fact in recording.facts.items():
        order[node] = len(order)
        reads = fact.reads[:1] if fact.label in _LIKE else () if fact.label in _SHAPED_LIKE else fact.reads
        parts = [made for made, _ in reads]
        parts += [writer for made, writer in reads if writer is not None and order[writer] > order[made]]
        sources = frozenset[_Step]().union(*(behind[part] for part in parts))
        if node.op != "placeholder" and fixed.issuperset(parts):  # parameters, numbers, and what is made of them alone
            fixed.add(node)
            behind[node] = frozenset()
            continue
        step = _recorded_step(node, fact)
        if step is None and fact.frame.path in norm_acts and sources:
            behind[node] = frozenset([(fact.frame.path, fact.frame.path)])
            if id(fact.frame) not in normed:  # whatever it computes is one step
                normed.add(id(fact.frame))
                yield (fact.frame.path, fact.frame.path), sources
            continue
        if step is None or (node.op == "call_module" and fact.label in quiet):
            behind[node] = sources
            continue
        behind[node] = frozenset([step])
        yield step, sources


# What these are given besides is read for its shape or type only.
_LIKE = frozenset(("view_as", "expand_as", "type_as", "reshape_as"))
_SHAPED_LIKE = frozenset(
    (*(f"{name}_like" for name in ("zeros", "ones", "empty", "full", "rand", "randn")),
     *(f"new_{name}" for name in ("zeros", "ones", "empty", "full", "tensor")))
)  # fmt: skip


def _recorded_step(node: Node, fact: Fact) -> _Step | None:
    if node.op == "call_module":
        return fact.frame.path, fact.label
    kind = fact.label.rstrip("_")
    return (fact.frame.path, kind) if node.op == "call_function" and kind in ACT_KINDS else None
