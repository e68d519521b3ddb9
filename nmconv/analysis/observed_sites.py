"""A model's activation calls, as plain data that identifies each call while the model runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from torch.fx import Node

from nmconv.finding import flows_of, structure_of
from nmconv.flow import Expression, Flow, Op, expressions_of
from nmconv.planning import Activation
from nmconv.recording import Fact, Recordings

__all__ = ["CallId", "ObservedSite", "channel_axes", "observed_sites"]

_LAST_AXIS = -1  # the channel axis of a linear layer's output
_SECOND_AXIS = 1  # the channel axis of anything else


@dataclass(frozen=True)
class CallId:
    """Identifies one call within one forward of a module.

    Attributes:
        owner: Qualified name of the module whose forward makes the call.
        label: The name of the called function, or ``/`` and the qualified name of the called module.
        number: Counts the calls with that label in one forward of the owner, from 1.
    """

    owner: str
    label: str
    number: int


@dataclass(frozen=True)
class ObservedSite:
    """One activation call of a model in one mode.

    An activation written out by hand, such as ``x * torch.sigmoid(x)``, consists of several calls.

    Attributes:
        id: The activation's id, as in :class:`nmconv.Site`.
        kind: The activation's name.
        axis: The channel axis of its output.
        is_site: Whether the activation belongs to a convolution.
        input_call: The first call that reads the activation's input.
        input_position: The input's index among the tensor arguments of that call.
        output_call: The call that returns the activation's output; often the same as ``input_call``.
    """

    id: str
    kind: str
    axis: int
    is_site: bool
    input_call: CallId
    input_position: int
    output_call: CallId


def observed_sites(model: nn.Module, recordings: Recordings) -> dict[bool, tuple[ObservedSite, ...]]:
    """Return the activation calls in eval mode (False) and in train mode (True), in the order of execution.

    Activations of parameters, which do not depend on the input, and activations within another one are left out.

    Args:
        model: The recorded model; not changed.
        recordings: Its recordings.
    """
    structure = structure_of(model, recordings)
    return {
        training: tuple(dict.fromkeys(_sites_in_mode(model, recordings, structure.activations, training)))
        for training in (False, True)
    }


def channel_axes(model: nn.Module, recordings: Recordings) -> dict[str, int]:
    """Return the channel axis of each module's output in eval mode, by the module's qualified name."""
    axes: dict[str, int] = {}
    for flow in flows_of(model, recordings):
        for frame in flow.frames:
            if frame.result is not None:
                axes[frame.path] = _channel_axis(flow, frame.result)
        for node in flow.nodes:
            if node.module is not None:
                axes[node.name] = _channel_axis(flow, node.index)
    return axes


def _sites_in_mode(
    model: nn.Module, recordings: Recordings, activations: Iterable[Activation], training: bool
) -> Iterable[ObservedSite]:
    mode = "train" if training else "eval"
    by_call = {
        (act.owner, act.name, act.function, act.train_call if training else act.call): act
        for act in activations
        if act.modes in ("both", mode)
    }
    for flow in flows_of(model, recordings, training=training):
        facts, expressions = flow.recording.facts, expressions_of(flow.recording)
        for node in flow.nodes:
            call = node.act
            if node.op is not Op.ACT or call is None:
                continue
            act = by_call.get((call.frame.path, call.name, call.function, call.call))
            if act is None:  # train mode can repeat a call that has only one site in the plan
                continue
            output_call = _call_id(facts, node.origin)
            input_call, position = output_call, 0
            if node.origin in expressions:
                input_call, position = _first_read(facts, node.origin, expressions[node.origin])
            axis = _channel_axis(flow, node.index)
            yield ObservedSite(act.id, act.kind, axis, not act.skip, input_call, position, output_call)


def _channel_axis(flow: Flow, index: int) -> int:
    """Return the channel axis of a value: the last if it comes from a linear layer, else the second."""
    node = flow.nodes[index]
    while node.op not in (Op.LINEAR, Op.CONV, Op.LAYOUT) and node.inputs:
        node = flow.nodes[node.inputs[0]]
    return _LAST_AXIS if node.op is Op.LINEAR else _SECOND_AXIS


def _call_id(facts: dict[Node, Fact], node: Node) -> CallId:
    fact = facts[node]
    label = f"/{fact.label}" if node.op == "call_module" else fact.label
    return CallId(fact.frame.path, label, fact.number)


def _first_read(facts: dict[Node, Fact], output: Node, expression: Expression) -> tuple[CallId, int]:
    """Return the first call of an expression that reads its input, and the input's index among the call's tensors."""
    first = next(
        node for node in facts if (node in expression.inner or node is output) and expression.base in facts[node].reads
    )
    return _call_id(facts, first), facts[first].reads.index(expression.base)
