"""Calls of a gradual result that, at slope 0 or 1, pass on one of their inputs."""

from __future__ import annotations

from collections.abc import Container, Mapping

from torch.fx import Node

from nmconv.flow import held, mixed, mixed_into
from nmconv.recording import Read, Recording
from nmconv.witness.allowed import is_moved

__all__ = ["MIXES", "selected_inputs"]

MIXES = (mixed, mixed_into)


def selected_inputs(
    recording: Recording, added: Mapping[str, frozenset[str]], slope: int, gradual: Container[str]
) -> dict[Node, tuple[Read, ...]]:
    """Return the calls that pass on one of their inputs at a slope, each with that input.

    Args:
        recording: A recording of the gradual result.
        added: From the names of modules that are moved activations to their possible classes.
        slope: 0 or 1.
        gradual: Names of the modules that are gradual activations.
    """
    selected: dict[Node, tuple[Read, ...]] = {}
    holders: dict[Read, Node] = {}  # from a slope to the call that holds the input of the activation that it mixes
    for node, fact in recording.facts.items():
        if node.op == "call_module":
            if is_moved(added, node, fact) if slope == 0 else fact.label in gradual:
                selected[node] = fact.reads[:1]
        elif node.target is held:
            selected[node] = fact.reads[:1]
            holders[fact.reads[1]] = node
        elif node.target in MIXES:
            selected[node] = fact.reads[1 - slope : 2 - slope]
            if slope == 1:
                value, writer = fact.reads[1]
                selected[writer or value] = ((holders[fact.reads[2]], None),)
    return selected
