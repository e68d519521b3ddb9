"""Editing the graphs of a method: removing, mixing and inserting calls of activations, and removing sums."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn
from torch.fx import Node

from nmconv.errors import RewriteError
from nmconv.flow import Op, held, is_inplace, leaf_op, mixed, mixed_into
from nmconv.planning import Activation, Change, Place, ReplacedSum
from nmconv.surgery.codegen import method_source, return_changed_lists
from nmconv.surgery.rewritten_classes import RewrittenMethod, rewritten_class
from nmconv.tracing import MethodSpec, MethodTrace, MethodTracer, trace_methods

__all__ = ["Edit", "MethodKey", "rewrite_methods"]

MethodKey = tuple[str, str]  # the qualified name of a method's owner, and the method's name


@dataclass
class Edit:
    """The changes to one method.

    Attributes:
        argument_structure: The structure of the method's arguments, as JSON.
        remove: Activation calls to remove.
        others: Activation calls to remove from the owner's other methods: where this method calls those, they are
            inlined here.
        insert: Pairs of a place and the name of the child to call on its value.
        sums: Additions to remove.
        copied: Those of ``sums`` that are replaced by a copy of the operand.
        mixing: Maps the ids of calls to mix with their inputs, instead of removing them, to the names of their slopes.
    """

    argument_structure: str
    remove: list[Activation] = field(default_factory=list)
    others: list[Activation] = field(default_factory=list)
    insert: list[tuple[Place, str]] = field(default_factory=list)
    sums: list[ReplacedSum] = field(default_factory=list)
    copied: set[ReplacedSum] = field(default_factory=set)
    mixing: dict[str, str] = field(default_factory=dict)


def rewrite_methods(
    model: nn.Module, edits: Mapping[MethodKey, Edit], calls: Sequence[Change]
) -> dict[MethodKey, RewrittenMethod | RewriteError]:
    """Rewrite methods of a model.

    Args:
        model: Read only.
        edits: The edits by method.
        calls: All activation calls of the model, with what becomes of them.

    Returns:
        For each method the rewritten one, or a RewriteError: if it cannot be traced faithfully, does not make a call
        that the plan names, or runs several times in one forward, so that one decision would change several calls.
    """
    specs = [
        MethodSpec(model.get_submodule(owner), owner, name, edit.argument_structure)
        for (owner, name), edit in edits.items()
    ]
    results: dict[MethodKey, RewrittenMethod | RewriteError] = {}
    for (key, edit), trace in zip(edits.items(), trace_methods(model, specs), strict=True):
        try:
            results[key] = trace if isinstance(trace, RewriteError) else _edited(model, *key, edit, calls, trace)
        except RewriteError as error:
            results[key] = error
    return results


def _edited(
    model: nn.Module, path: str, method: str, edit: Edit, calls: Sequence[Change], trace: MethodTrace
) -> RewrittenMethod:
    """Edit the graphs of a traced method in place; return its new source."""
    owner = model.get_submodule(path)
    changed_lists = return_changed_lists(owner, method, trace)
    for tracer, modes, training in _graphs(trace):
        _remove_sums(tracer, edit, path, owner)
        for place, child in edit.insert:
            _insert(tracer, place, child)
        for site in edit.remove:
            if site.modes in modes:
                _check_calls_are_known(tracer, site, modes, training, model, calls)
                _remove_or_mix(tracer, site, training, model, edit)
        for site in edit.others:
            if site.modes in modes and _node_of(tracer, site, training, model) is not None:
                _remove_or_mix(tracer, site, training, model, edit)
    result = method_source(owner, method, trace, changed_lists)
    rewritten_class(type(owner), (result,))  # raises if it does not compile or the owner cannot be subclassed
    return result


def _graphs(trace: MethodTrace) -> Iterable[tuple[MethodTracer, tuple[str, ...], bool]]:
    """Return each graph, the modes of the sites in it, and whether it is that of train mode alone."""
    if trace.train is trace.eval:
        return [(trace.eval, ("both", "eval", "train"), False)]
    return [(trace.eval, ("both", "eval"), False), (trace.train, ("both", "train"), True)]


# -- activations -------------------------------------------------------------------------------------------------------


def _calls_by_step(tracer: MethodTracer, site: Activation, model: nn.Module) -> dict[int, Node]:
    """Return the calls of a site's activation in a graph, by their number."""
    module = None if site.function else model.get_submodule(site.name)
    return {
        call.step: node
        for node, call in tracer.acts.items()
        if call.method == site.method
        and call.function == site.function
        and (module is None or model.get_submodule(f"{site.owner}.{call.name}".strip(".")) is module)
    }


def _node_of(tracer: MethodTracer, site: Activation, training: bool, model: nn.Module) -> Node | None:
    return _calls_by_step(tracer, site, model).get(_step_of(site, training) or 0)


def _step_of(site: Activation, training: bool) -> int | None:
    return site.train_step if training or site.modes == "train" else site.step


def _check_calls_are_known(
    tracer: MethodTracer,
    site: Activation,
    modes: tuple[str, ...],
    training: bool,
    model: nn.Module,
    calls: Sequence[Change],
) -> None:
    """Raise RewriteError unless a graph calls an activation as often as the plan knows."""
    key = (site.owner, site.method, site.name, site.function)
    known_steps = {
        _step_of(other, training)
        for other, action in ((change.call, change.action) for change in calls)
        if (other.owner, other.method, other.name, other.function) == key
        and other.modes in modes
        and action != "gone"  # removed from the graph with its sum
    }
    steps = tracer.first_calls.setdefault(key, set(_calls_by_step(tracer, site, model)))
    if steps != known_steps:
        raise RewriteError(
            f"{site.owner or 'the model'}.{site.method} makes {len(steps)} calls of {site.name or 'it'} where a whole "
            f"forward makes {len(known_steps)}: one decision would change several"
        )


def _remove_or_mix(tracer: MethodTracer, site: Activation, training: bool, model: nn.Module, edit: Edit) -> None:
    node = _node_of(tracer, site, training, model)
    if node is None:
        raise RewriteError(f"{site.id} is not in {site.owner or 'the model'}.{site.method}: was the model changed?")
    value = tracer.input_of(node)
    if not isinstance(value, Node):
        raise RewriteError(f"{site.id} is called on something that is not a tensor")
    if site.id in edit.mixing:
        _mix(tracer, node, value, edit.mixing[site.id], into=site.inplace)
        return
    if site.copy:
        with tracer.graph.inserting_before(node):
            value = tracer.graph.call_method("clone", (value,))
    node.replace_all_uses_with(value)
    tracer.erase_act(node)


def _mix(tracer: MethodTracer, act: Node, value: Node, slope: str, *, into: bool) -> None:
    """Mix an activation's output with its input.

    Args:
        tracer: The tracer with the graph.
        act: The activation.
        value: Its input.
        slope: The name of the slope's buffer.
        into: Whether the result is written to the input's memory.
    """
    parts = tracer.parts_of(act)
    with tracer.graph.inserting_before(parts[0]):
        slope_node = tracer.graph.get_attr(slope)
        held_value = tracer.graph.call_function(held, (value, slope_node, 1))
    for part in parts:
        part.replace_input_with(value, held_value)
    with tracer.graph.inserting_after(act):
        mix = tracer.graph.call_function(mixed_into if into else mixed, (value, act, slope_node))
    act.replace_all_uses_with(mix)
    mix.args = (value, act, slope_node)


def _insert(tracer: MethodTracer, place: Place, child: str) -> None:
    """Insert a call of a child after the operation that a place names."""
    for node, (label, number) in tracer.labels.items():
        if label == place.op and number == place.call:
            with tracer.graph.inserting_after(node):
                call = tracer.graph.call_module(child, (node,))
            node.replace_all_uses_with(call)
            call.args = (node,)
            return
    raise RewriteError(f"{place.op}#{place.call} is not in {place.owner}.{place.method}: was the model changed?")


# -- sums --------------------------------------------------------------------------------------------------------------


def _remove_sums(tracer: MethodTracer, edit: Edit, path: str, owner: nn.Module) -> None:
    """Replace each sum by one operand, and remove what only the other operand was computed for."""
    nodes = {label: node for node, label in tracer.labels.items()}
    for addition in edit.sums:
        node = nodes.get((addition.label, addition.number))
        args = () if node is None or node.kwargs else node.args
        if node is None or len(args) != 2 or not all(isinstance(operand, Node) for operand in args):
            raise RewriteError(
                f"{addition.label}#{addition.number} is not in {path or 'the model'}.forward: was the model changed?"
            )
        kept = args[addition.keep]
        assert isinstance(kept, Node)
        if addition in edit.copied:
            with tracer.graph.inserting_before(node):
                kept = tracer.graph.call_method("clone", (kept,))
        node.replace_all_uses_with(kept)
        _erase_unused(tracer, owner, node)


def _erase_unused(tracer: MethodTracer, owner: nn.Module, addition: Node) -> None:
    """Erase an addition without users, and all that was computed for it alone."""
    unused = [addition]
    while unused:
        node = unused.pop()
        if node.users or node.op == "placeholder" or node not in tracer.graph.nodes:
            continue
        if node is not addition and _overwrites_shared_memory(tracer, owner, node):
            continue
        inputs = node.all_input_nodes
        tracer.graph.erase_node(node)
        tracer.acts.pop(node, None)
        unused += inputs


def _overwrites_shared_memory(tracer: MethodTracer, owner: nn.Module, node: Node) -> bool:
    """Return whether an in-place call may overwrite memory that others read."""
    module = owner.get_submodule(str(node.target)) if node.op == "call_module" else None
    if not is_inplace(node, module, tracer.label_of(node)):
        return False
    source = node.args[0] if node.args else None
    while isinstance(source, Node) and source.op == "call_module" and len(source.users) == 1:
        op = leaf_op(owner.get_submodule(str(source.target)))
        if op not in (Op.PASS, Op.DROP):
            return op not in (Op.CONV, Op.NORM)  # these return new memory, which only this call reads
        source = source.args[0] if source.args else None
    return True
