"""Where activations are called, and how to find each call again while the model runs: as plain data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from torch.fx import Node

from nmconv.finding import flows_of, read
from nmconv.flow import Expression, Flow, Op, expressions_of
from nmconv.planning import Activation
from nmconv.recording import Fact, Recordings

__all__ = ["Moment", "Observed", "axes_of", "sites_of"]

_LAST = -1  # the axis of the channels where a linear layer made the value
_SECOND = 1  # and everywhere else


@dataclass(frozen=True)
class Moment:
    """One call within one forward of a module.

    Attributes:
        owner: Qualified name of the module whose forward makes the call.
        label: A function's name, or ``/`` and the qualified name of a module.
        number: Which call of that label it is in one forward of the owner, from 1.
    """

    owner: str
    label: str
    number: int


@dataclass(frozen=True)
class Observed:
    """One activation call of a model in one mode.

    Attributes:
        id: As of :class:`nmconv.Site`.
        kind: The activation's name.
        axis: Where its channels are.
        real: Whether it is a site: it belongs to a convolution.
        given: The first call that is given its input; for an activation that is one call, that call.
        position: Which of the tensors among the arguments of that call is the input.
        made: The call that gives its output.
    """

    id: str
    kind: str
    axis: int
    real: bool
    given: Moment
    position: int
    made: Moment


def sites_of(model: nn.Module, recordings: Recordings) -> dict[bool, tuple[Observed, ...]]:
    """The activation calls of a model in eval mode (False) and in train mode (True), in the order of execution.

    Left out are those on parameters, which no image has a part in, and those inside of another.

    Args:
        model: What was recorded; read only.
        recordings: Of it.
    """
    structure = read(model, recordings)
    return {
        training: tuple(dict.fromkeys(_in_mode(model, recordings, structure.activations, training)))
        for training in (False, True)
    }


def axes_of(model: nn.Module, recordings: Recordings) -> dict[str, int]:
    """From the names of modules to where the channels are in what they give, in eval mode."""
    found: dict[str, int] = {}
    for flow in flows_of(model, recordings):
        for frame in flow.frames:
            if frame.result is not None:
                found[frame.path] = _axis(flow, frame.result)
        for node in flow.nodes:
            if node.module is not None:
                found[node.name] = _axis(flow, node.index)
    return found


def _in_mode(
    model: nn.Module, recordings: Recordings, activations: Iterable[Activation], training: bool
) -> Iterable[Observed]:
    mode = "train" if training else "eval"
    known = {
        (act.owner, act.name, act.function, act.train_call if training else act.call): act
        for act in activations
        if act.modes in ("both", mode)
    }
    for flow in flows_of(model, recordings, training=training):
        facts, by_hand = flow.recording.facts, expressions_of(flow.recording)
        for node in flow.nodes:
            call = node.act
            if node.op is not Op.ACT or call is None:
                continue
            act = known.get((call.frame.path, call.name, call.function, call.call))
            if act is None:  # train mode makes a call more often than eval mode, and the plan has one site of them
                continue
            made = _moment(facts, node.origin)
            given, position = (made, 0)
            if node.origin in by_hand:
                given, position = _entry(facts, node.origin, by_hand[node.origin])
            yield Observed(act.id, act.kind, _axis(flow, node.index), not act.skip, given, position, made)


def _axis(flow: Flow, index: int) -> int:
    """Where the channels of a value are: last where a linear layer made it, else second."""
    node = flow.nodes[index]
    while node.op not in (Op.LINEAR, Op.CONV, Op.LAYOUT) and node.inputs:
        node = flow.nodes[node.inputs[0]]
    return _LAST if node.op is Op.LINEAR else _SECOND


def _moment(facts: dict[Node, Fact], node: Node) -> Moment:
    fact = facts[node]
    label = f"/{fact.label}" if node.op == "call_module" else fact.label
    return Moment(fact.frame.path, label, fact.number)


def _entry(facts: dict[Node, Fact], last: Node, expression: Expression) -> tuple[Moment, int]:
    """The first call of an expression that is given what it is an expression in, and as which tensor."""
    first = next(
        node for node in facts if (node in expression.inner or node is last) and expression.base in facts[node].reads
    )
    return _moment(facts, first), facts[first].reads.index(expression.base)
