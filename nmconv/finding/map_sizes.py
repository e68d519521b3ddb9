"""How large the maps are that convolutions and activations make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from nmconv.finding.analysis import Called, flows_of
from nmconv.flow import Op, recordings_of

__all__ = ["Shapes", "shapes_of"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Shapes:
    """Shapes of results in eval mode, without the batch, in order of execution; () where they cannot be known.

    Attributes:
        convs: By qualified name; of a convolution that is called several times, the first.
        acts: By who calls, name and kind of function, and which call of it in one forward.
    """

    convs: dict[str, Shape]
    acts: dict[tuple[Called, int], Shape]


def shapes_of(model: nn.Module, example_inputs: Any) -> Shapes:
    """Find them out without running the model.

    Args:
        model: Read only.
        example_inputs: What it is called with; only structure and shapes are used.
    """
    found = Shapes({}, {})
    for flow in flows_of(model, recordings_of(model, example_inputs, both_sizes=False)):
        for node in flow.nodes:
            shape = () if node.shape is None else node.shape[1:]
            if node.op is Op.CONV:
                found.convs.setdefault(node.name, shape)
            elif node.op is Op.ACT and node.act is not None:
                act = node.act
                found.acts[(act.frame.path, act.name, act.function), act.call] = shape
    return found
