"""Find the shapes of the feature maps that convolutions and activations return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from nmconv.finding.def_use import CallKey, call_key
from nmconv.finding.flow_analysis import eval_flows
from nmconv.flow import Op

__all__ = ["Shapes", "map_shapes"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Shapes:
    """Shapes of results in eval mode, without the batch, in order of execution; () where they are unknown.

    Attributes:
        convs: By qualified name; for a convolution that is called several times, the shape of the first call.
        acts: By activation call.
    """

    convs: dict[str, Shape]
    acts: dict[CallKey, Shape]


def map_shapes(model: nn.Module, example_inputs: Any) -> Shapes:
    """Return the shapes of a model's feature maps without running the model.

    Args:
        model: Not modified.
        example_inputs: What the model is called with; only structure and shapes are used.
    """
    shapes = Shapes({}, {})
    for flow in eval_flows(model, example_inputs):
        for node in flow.nodes:
            shape = () if node.shape is None else node.shape[1:]
            if node.op is Op.CONV:
                shapes.convs.setdefault(node.name, shape)
            elif node.op is Op.ACT and node.act is not None:
                shapes.acts[call_key(node.act)] = shape
    return shapes
