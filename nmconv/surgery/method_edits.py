"""Editing one method's graphs: activations taken out of it, and put into it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn
from torch.fx import Node

from nmconv.errors import RewriteError
from nmconv.flow import Op, held, is_inplace, leaf_op, mixed, mixed_into
from nmconv.planning import Activation, Change, Place, Sum
from nmconv.surgery.codegen import method_source, return_changed_lists
from nmconv.surgery.rewritten_classes import RewrittenMethod, rewritten
from nmconv.tracing import MethodSpec, MethodTrace, MethodTracer, trace_methods

__all__ = ["Edit", "rewrite"]


@dataclass
class Edit:
    """What is to be done to one method.

    Attributes:
        remove: Activation calls that go.
        others: Those of the owner's other methods that go: if this one calls those, they are inlined here.
        insert: Pairs of a place and the name of the child that is called on its value.
        sums: Additions that go.
        copied: Those of them in whose place a copy of the operand is left.
        mixing: From the ids of calls that do not go but are mixed with their inputs to the names of their slopes.
    """

    takes: str
    remove: list[Activation] = field(default_factory=list)
    others: list[Activation] = field(default_factory=list)
    insert: list[tuple[Place, str]] = field(default_factory=list)
    sums: list[Sum] = field(default_factory=list)
    copied: set[Sum] = field(default_factory=set)
    mixing: dict[str, str] = field(default_factory=dict)


def rewrite(
    model: nn.Module, edits: Mapping[tuple[str, str], Edit], calls: Sequence[Change]
) -> dict[tuple[str, str], RewrittenMethod | RewriteError]:
    """Methods with their edits done.

    Args:
        model: Read only.
        edits: What to do, by the qualified name of the method's owner and the method's name.
        calls: Every activation call of the model, and what becomes of it.

    Returns:
        For each the method, or a RewriteError: if the method cannot be traced faithfully, if a call the plan names is
        not in it, or if it is called several times in one forward, so that one decision would change several calls.
    """
    asked = [MethodSpec(model.get_submodule(path), path, method, edit.takes) for (path, method), edit in edits.items()]
    made: dict[tuple[str, str], RewrittenMethod | RewriteError] = {}
    for (where, edit), trace in zip(edits.items(), trace_methods(model, asked), strict=True):
        try:
            made[where] = trace if isinstance(trace, RewriteError) else _edited(model, *where, edit, calls, trace)
        except RewriteError as error:
            made[where] = error
    return made


def _edited(
    model: nn.Module, path: str, method: str, edit: Edit, calls: Sequence[Change], trace: MethodTrace
) -> RewrittenMethod:
    owner = model.get_submodule(path)
    mutated = return_changed_lists(owner, method, trace)
    for tracer, modes, training in _graphs(trace):
        _drop_sums(tracer, edit, path, owner)
        for place, child in edit.insert:
            _insert(tracer, place, child)
        for site in edit.remove:
            if site.modes in modes:
                _check_steps(tracer, site, modes, training, model, calls)
                _take_out(tracer, site, training, model, edit)
        for site in edit.others:
            if site.modes in modes and _node_of(tracer, site, training, model) is not None:
                _take_out(tracer, site, training, model, edit)
    made = method_source(owner, method, trace, mutated)
    rewritten(type(owner), (made,))  # that it can be done, and compiles
    return made


def _graphs(trace: MethodTrace) -> Iterable[tuple[MethodTracer, tuple[str, ...], bool]]:
    if trace.train is trace.eval:
        return [(trace.eval, ("both", "eval", "train"), False)]
    return [(trace.eval, ("both", "eval"), False), (trace.train, ("both", "train"), True)]


def _calls(tracer: MethodTracer, site: Activation, model: nn.Module) -> dict[int, Node]:
    """The calls of the site's activation in the graph, by number."""
    module = None if site.function else model.get_submodule(site.name)
    return {
        call.step: node
        for node, call in tracer.acts.items()
        if call.method == site.method
        and call.function == site.function
        and (module is None or model.get_submodule(f"{site.owner}.{call.name}".strip(".")) is module)
    }


def _node_of(tracer: MethodTracer, site: Activation, training: bool, model: nn.Module) -> Node | None:
    step = site.train_step if training or site.modes == "train" else site.step
    return _calls(tracer, site, model).get(step or 0)


def _take_out(tracer: MethodTracer, site: Activation, training: bool, model: nn.Module, edit: Edit) -> None:
    node = _node_of(tracer, site, training, model)
    if node is None:
        raise RewriteError(f"{site.id} is not in {site.owner or 'the model'}.{site.method}: was the model changed?")
    value = tracer.given_to(node)
    if not isinstance(value, Node):
        raise RewriteError(f"{site.id} is called on something that is no tensor")
    if site.id in edit.mixing:
        _mix(tracer, node, value, edit.mixing[site.id], into=site.inplace)
        return
    if site.copy:
        with tracer.graph.inserting_before(node):
            value = tracer.graph.call_method("clone", (value,))
    node.replace_all_uses_with(value)
    tracer.erase_act(node)


def _mix(tracer: MethodTracer, act: Node, value: Node, slope: str, *, into: bool) -> None:
    """Mix what an activation call gives with its input."""
    parts = tracer.parts_of(act)
    with tracer.graph.inserting_before(parts[0]):
        number = tracer.graph.get_attr(slope)
        given = tracer.graph.call_function(held, (value, number, 1))
    for part in parts:
        part.replace_input_with(value, given)
    with tracer.graph.inserting_after(act):
        made = tracer.graph.call_function(mixed_into if into else mixed, (value, act, number))
    act.replace_all_uses_with(made)
    made.args = (value, act, number)


def _insert(tracer: MethodTracer, place: Place, child: str) -> None:
    for node, (label, number) in tracer.labels.items():
        if label == place.op and number == place.call:
            with tracer.graph.inserting_after(node):
                added = tracer.graph.call_module(child, (node,))
            node.replace_all_uses_with(added)
            added.args = (node,)
            return
    raise RewriteError(f"{place.op}#{place.call} is not in {place.owner}.{place.method}: was the model changed?")


def _drop_sums(tracer: MethodTracer, edit: Edit, path: str, owner: nn.Module) -> None:
    """Let one operand take the place of each sum, and drop what only the other one was made for."""
    named = {where: node for node, where in tracer.labels.items()}
    for addition in edit.sums:
        node = named.get((addition.label, addition.number))
        args = () if node is None or node.kwargs else node.args
        if node is None or len(args) != 2 or not all(isinstance(part, Node) for part in args):
            raise RewriteError(
                f"{addition.label}#{addition.number} is not in {path or 'the model'}.forward: was the model changed?"
            )
        kept = args[addition.keep]
        assert isinstance(kept, Node)
        if addition in edit.copied:
            with tracer.graph.inserting_before(node):
                kept = tracer.graph.call_method("clone", (kept,))
        node.replace_all_uses_with(kept)
        gone = [node]
        while gone:
            last = gone.pop()
            module = owner.get_submodule(str(last.target)) if last.op == "call_module" else None
            # Somebody may read what it wrote to.
            written = (
                last is not node
                and is_inplace(last, module, tracer.label_of(last))
                and not _writes_to_its_own(owner, last)
            )
            if last.users or last.op == "placeholder" or written or last not in tracer.graph.nodes:
                continue
            sources = last.all_input_nodes
            tracer.graph.erase_node(last)
            tracer.acts.pop(last, None)
            gone += sources


def _writes_to_its_own(owner: nn.Module, node: Node) -> bool:
    """Whether an in-place call overwrites memory that a convolution or norm has made for it alone."""
    source = node.args[0] if node.args else None
    while isinstance(source, Node) and source.op == "call_module" and len(source.users) == 1:
        op = leaf_op(owner.get_submodule(str(source.target)))
        if op not in (Op.PASS, Op.DROP):
            return op in (Op.CONV, Op.NORM)
        source = source.args[0] if source.args else None
    return False


def _check_steps(
    tracer: MethodTracer,
    site: Activation,
    modes: tuple[str, ...],
    training: bool,
    model: nn.Module,
    calls: Sequence[Change],
) -> None:
    """The method's calls of this activation must be those the plan knows: else one stands for several."""
    like = (site.owner, site.method, site.name, site.function)
    known = {
        (other.train_step if training or other.modes == "train" else other.step)
        for other, action in ((change.call, change.action) for change in calls)
        if (other.owner, other.method, other.name, other.function) == like
        and other.modes in modes
        and action != "gone"  # its sum is out of the graph already, and the call with it
    }
    seen = tracer.first_calls.setdefault(like, set(_calls(tracer, site, model)))
    if seen != known:
        raise RewriteError(
            f"{site.owner or 'the model'}.{site.method} makes {len(seen)} calls of {site.name or 'it'} where a whole "
            f"forward makes {len(known)}: one decision would change several"
        )
