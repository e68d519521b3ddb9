"""What merging would make of a run, as plain data."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

from nmconv.graph import steps_of
from nmconv.merging._brackets import Bracketing, Node, Price, Segment, bracket, geometry_of_nodes
from nmconv.merging._records import Run
from nmconv.planning import Geometry, Refusal

__all__ = ["described", "parameters_of"]


def described(named: Callable[[str], nn.Module], nodes: tuple[Node, ...], price: Price) -> Run:
    """A run as plain data.

    Args:
        named: From a name to the model's module.
        nodes: Of the run.
        price: Of the gate.
    """
    steps = list(steps_of(node.element for node in nodes))
    choice: Bracketing = bracket(nodes, price, fold=True, fewest=False)
    real = [segment for segment in choice.segments if not segment.is_fold]
    why, exact = "", True
    try:
        whole = Segment(nodes, geometry_of_nodes(nodes, 0, 0))
        if [segment.convs for segment in real] != [whole.convs]:
            why = f"as one convolution it would take {whole.merged_cost / max(whole.cost, 1):.2f} times the work"
    except Refusal as refusal:
        why, exact = str(refusal), False
    convs = tuple(step.name for step in steps if step.kind == "conv")
    before = {name: sum(p.numel() for p in parameters_of(named, name)) for name in {step.name for step in steps}}
    taken = {step.name for part in choice.segments for step in steps_of(node.element for node in part.nodes)}
    after = sum(_numbers(part.geometry) for part in choice.segments)
    after += sum(count for name, count in before.items() if name not in taken)
    return Run(
        convs=convs,
        norms=tuple(step.name for step in steps if step.kind == "norm"),
        exact=exact,
        why=why,
        merges=tuple(segment.convs for segment in real),
        size=nodes[0].sizes,
        multiply_adds=sum(node.cost for node in nodes),
        merged_multiply_adds=int(choice.cost),
        parameters=sum(before.values()),
        merged_parameters=after,
    )


def parameters_of(named: Callable[[str], nn.Module], name: str) -> list[Tensor]:
    """Of a step's own module, none of its children's; a function has none."""
    return [] if ":" in name else list(named(name).parameters(recurse=False))


def _numbers(geometry: Geometry) -> int:
    border = geometry.out_channels * math.prod(geometry.border_kernel) if geometry.bounded else 0
    return geometry.weights + (geometry.out_channels if geometry.bias else 0) + border
