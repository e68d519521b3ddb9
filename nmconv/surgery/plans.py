"""Drawing up a plan for a model, and resolving a plan to the changes that it makes to a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from nmconv.errors import NoSitesError, PlanError
from nmconv.finding import copied_sums, fingerprint, flows_of, structure_of
from nmconv.flow import forward_argument_structures, registered_names, signature_of
from nmconv.planning import Changes, Hoist, Options, Plan, Signature, Structure, changes_of, decide
from nmconv.recording import Recordings
from nmconv.surgery.apply import MethodCache, Surgery
from nmconv.surgery.hoist import find_hoists
from nmconv.surgery.working_copy import structure_only_copy

__all__ = ["ResolvedPlan", "draft_plan", "hoists_after", "resolve_plan"]


@dataclass(frozen=True)
class ResolvedPlan:
    """What a plan does to a model.

    Attributes:
        changes: The changes.
        argument_structure: That of each forward from which a sum is removed, by the module's qualified name.
    """

    changes: Changes
    argument_structure: Mapping[str, str] = field(default_factory=dict)


def resolve_plan(model: nn.Module, plan: Plan, recordings: Recordings, way_out: str = "") -> ResolvedPlan:
    """Return what a plan does to a model, found in the model's recordings.

    Args:
        model: The model.
        plan: The plan.
        recordings: Of the model.
        way_out: What the user may do if the plan is for another model, for the message.

    Raises:
        PlanError: If the plan is for another model, or changes something that this one does not have.
    """
    missing = [pair for pair in plan.registered if pair not in registered_names(model)]
    for name, kind in missing[:1]:
        raise PlanError(
            f"the plan was made with {name} registered as {kind!r}, but it is not registered now, or the model has "
            f"none: call nmconv.register({name.rpartition('.')[2]}, {kind!r}) first"
        )
    structure = structure_of(model, recordings, linear=plan.linear)
    model_fingerprint = fingerprint(model, structure)
    if model_fingerprint != plan.fingerprint:
        raise PlanError(
            f"this plan is for a {plan.model} with fingerprint {plan.fingerprint}, the model is a "
            f"{type(model).__name__} with {model_fingerprint}: other layers, or a forward that does something else "
            f"with them{'; ' * bool(way_out)}{way_out}"
        )
    for kernel in plan.kernels:
        for name in kernel.convs:
            try:
                model.get_submodule(name.partition(":")[0])
            except AttributeError as error:
                raise PlanError(f"the plan makes a kernel of {name!r}, which the model does not have") from error
    if not plan.branches:
        return ResolvedPlan(changes_of(plan, structure))
    sums = [branch.sum for branch in plan.branches]
    flows = [flow for training in (False, True) for flow in flows_of(model, recordings, training=training)]
    copied = copied_sums(flows, sums)
    return ResolvedPlan(
        changes_of(plan, structure, copied), forward_argument_structures(flows, [each.owner for each in sums])
    )


def draft_plan(
    model: nn.Module,
    options: Options,
    example_inputs: Any,
    recordings: Recordings,
    call: Signature | None = None,
    *,
    advises_linear: bool = True,
) -> tuple[Plan, ResolvedPlan, MethodCache]:
    """Draw up a plan for a model.

    Args:
        model: The model.
        options: What the user asked for.
        example_inputs: What the model is called with.
        recordings: Of the model.
        call: The call signature that an earlier plan states.
        advises_linear: Whether an error may advise ``linear=True``.

    Returns:
        The plan, hoists included; what it does to the model; and the methods rewritten to find that out.

    Raises:
        NoSitesError: If no activation belongs to a convolution.
    """
    structure = structure_of(model, recordings, linear=options.linear)
    if not any(item.act is not None for chain in structure.chains for item in chain.items):
        raise NoSitesError(_no_sites_message(structure, advises_linear and not options.linear))
    plan, cache = _feasible_plan(model, structure, options)
    plan = replace(plan, call=signature_of(model, recordings), registered=registered_names(model))
    if options.hoist:
        resolved = ResolvedPlan(changes_of(plan, structure))
        plan = replace(plan, hoists=hoists_after(model, resolved, cache, example_inputs, call))
    return plan, ResolvedPlan(changes_of(plan, structure)), cache


def hoists_after(
    model: nn.Module, resolved: ResolvedPlan, cache: MethodCache, example_inputs: Any, call: Signature | None
) -> tuple[Hoist, ...]:
    """Return the hoists that are possible, and those that are not, once the other changes of a plan are made."""
    outline = structure_only_copy(model)
    Surgery(outline, replace(resolved.changes, hoists=()), cache, resolved.argument_structure).commit()
    return find_hoists(outline, example_inputs, call)


def _feasible_plan(model: nn.Module, structure: Structure, options: Options) -> tuple[Plan, MethodCache]:
    """Return a plan that keeps all activations in methods that cannot be rewritten, and the rewritten methods."""
    model_fingerprint = fingerprint(model, structure)
    locked: dict[int, str] = {}  # maps indices of activations that must stay to the reasons
    cache: MethodCache = {}
    while True:
        plan = decide(structure, options, model_fingerprint, locked)
        changes = changes_of(plan, structure)
        failures = Surgery(model, changes, cache, {}).failures()
        if not failures:
            break
        for index, change in enumerate(changes.calls):
            call, place = change.call, change.place
            methods = [(call.owner, call.method)] if call.how == "rewrite" and change.action != "keep" else []
            methods += [(place.owner, place.method)] if place is not None else []
            for method in methods:
                if method in failures:
                    locked[index] = str(failures[method])
    all_dropped = _drop_in_untouched_methods(changes)
    if all_dropped is None:
        return plan, cache
    # Lock what the plan keeps but could not drop, so that users who edit the plan see that.
    failures = Surgery(model, all_dropped, {}, {}).failures()
    for index, change in enumerate(changes.calls):
        call = change.call
        if change.action == "keep" and (call.owner, call.method) in failures and call.how == "rewrite":
            locked[index] = str(failures[call.owner, call.method])
    return decide(structure, options, model_fingerprint, locked), cache


def _drop_in_untouched_methods(changes: Changes) -> Changes | None:
    """Return the changes with all sites in unchanged methods dropped, too, or None if there are no such sites."""
    touched = {(change.call.owner, change.call.method) for change in changes.made}
    calls = tuple(
        replace(change, action="drop")
        if change.action == "keep"
        and change.call.how == "rewrite"
        and (change.call.owner, change.call.method) not in touched
        else change
        for change in changes.calls
    )
    return None if calls == changes.calls else replace(changes, calls=calls)


# The beginning of a reason to keep an activation, and its summary for one activation and for several.
_REASONS = (
    ("gate", "is a gate", "are gates"),
    ("it activates a linear layer", "follows a linear layer", "follow linear layers"),
    ("the value before it", "follows a value with other readers", "follow values with other readers"),
    ("it activates a parameter", "is of a parameter", "are of parameters"),
    ("no convolution next to it", "has no convolution next to it", "have no convolution next to them"),
    ("nothing that is returned", "reaches no output", "reach no output"),
    ("stands before a chain", "stands before a chain", "stand before chains"),
    ("the forward never calls it", "is never called", "are never called"),
    ("inside a handwritten activation", "is a part of another activation", "are parts of other activations"),
    ("a part of", "is a part of one indivisible layer", "are parts of indivisible layers"),
)


def _no_sites_message(structure: Structure, advises_linear: bool) -> str:
    text = f"no activation of this {structure.model} belongs to a convolution"
    if structure.untraced:
        parts = "; ".join(f"{part.name or 'the model itself'}: {part.reason}" for part in structure.untraced[:3])
        hints = dict.fromkeys(part.hint for part in structure.untraced)
        return f"{text} that runs ({parts}). {'. '.join(hints)}"
    leading = dict(structure.leading)
    reasons = [leading.get(index, act.skip) for index, act in enumerate(structure.activations)]
    counts = Counter(next((known for known in _REASONS if reason.startswith(known[0])), reason) for reason in reasons)
    summaries = [
        f"{count} stay{'s' * (count == 1)}: {reason}"
        if isinstance(reason, str)
        else f"{count} {reason[1 + (count > 1)]}"
        for reason, count in counts.items()
    ]
    summary = ", ".join(summaries) or (
        "it calls none that nmconv knows; a handwritten one, such as x * torch.sigmoid(x), must be an expression in "
        "one value, within one forward, and nothing else may read a part of it; declare activation modules with "
        "nmconv.register"
    )
    return f"{text}: {summary}{'; linear=True counts linear layers as well' * advises_linear}"
